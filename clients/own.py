"""What of a state stays with a client: kept on its disk from round to round (`Method.kept`; FedSA-LoRA's B and head).

    <site>/<client>/own-<run's digest>/round-0003.safetensors       as round 3 left it

A round begins with what the newest round before it left, so the same question gets the same answer, however often it is
asked. The newest three are kept: FedBuff's server, resumed, may ask again for the last but one, which began with the file
before that.
"""

import re
from pathlib import Path

import torch
from torch import Tensor

from clients.session import Session, Site
from fedsb.errors import StoreError
from fedsb.store.tensors import load_tensors, save_tensors

FILE = re.compile(r"round-(\d{4,})\.safetensors")
KEPT = 3  # rounds
BEFORE = "before"  # in a file's metadata: the round whose file this round began with; 0: with none


def whole(session: Session, site: Site, part: Tensor, server_round: int) -> Tensor:
    """The whole state (size,) with which a client begins a round: its share of the global one, and what it kept to itself.

    Without a file of its own it is as at the start: B = 0, so the base model. Raises StoreError if what it kept is gone, and
    AdapterError if `part` is no share of this client.
    """
    share = session.received(site, server_round)
    if share.index is None:
        return share.put(part, part)
    rest = {name: torch.zeros(shape) for name, shape in session.layout.shapes}
    if session.kept:
        start = session.layout.unflatten(session.base_vector())
        rest |= {name: start[name] for name in session.kept}
        newest = _newest(session, site, server_round)
        rest |= load_tensors(_file(session, site, newest))[0] if newest else {}
    return share.put(part, session.layout.flatten(rest))


def keep(session: Session, site: Site, vector: Tensor, server_round: int) -> None:
    """Keep what stays here of the state (size,) that a round of training ended with. Raises DiskError."""
    if not session.kept:
        return
    before = _newest(session, site, server_round)
    state = session.layout.unflatten(vector)
    save_tensors(_file(session, site, server_round), {name: state[name] for name in session.kept}, {BEFORE: str(before)})
    kept = sorted(number for number in _rounds(session, site) if number <= server_round)[-KEPT:]
    for number in set(_rounds(session, site)).difference(kept):
        _file(session, site, number).unlink()


def _newest(session: Session, site: Site, server_round: int) -> int:
    """The newest round before `server_round` with a file; 0: there was none."""
    rounds = _rounds(session, site)
    earlier = [number for number in rounds if number < server_round]
    if earlier or not rounds or server_round == 1:
        return max(earlier, default=0)
    if load_tensors(_file(session, site, min(rounds)))[1].get(BEFORE) != "0":
        raise StoreError(
            f"{site.name} is asked for round {server_round} and has kept its own part of rounds {min(rounds)} to {max(rounds)} "
            f"alone; begin anew under another name, or delete the site's {_folder(session, site).name} and begin with B = 0"
        )
    return 0


def _rounds(session: Session, site: Site) -> list[int]:
    matches = (FILE.fullmatch(path.name) for path in _folder(session, site).glob("round-*"))
    return [int(match[1]) for match in matches if match]


def _file(session: Session, site: Site, number: int) -> Path:
    return _folder(session, site) / f"round-{number:04d}.safetensors"


def _folder(session: Session, site: Site) -> Path:
    return site.folder / site.name / f"own-{session.config.digest()[:16]}"
