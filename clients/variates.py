"""A client's side of SCAFFOLD: its control variates, one file for each question that it has answered.

The server names the one that a question is about, and none is ever changed. So a question that is asked again, of whatever
process and after whatever the client did since, has the same answer.
"""

import re
from pathlib import Path

import torch
from flwr.app import ArrayRecord, RecordDict
from torch import Tensor

from clients.session import Session, Site
from fedsb.errors import FedsbError, StoreError
from fedsb.store.tensors import load_tensors, save_tensors
from fedsb.training.drift import Control
from strategies.records import VARIATES, Order, pack_state, unpack_state
from strategies.scaffold import answer_key

KEY = re.compile(r"round-\d{4,}-[0-9a-f]{16}")
KEPT = 3  # the newest: what the next question names, and what it names if the server has lost its newest checkpoint
VARIATE = "variate"


def control(content: RecordDict, session: Session, site: Site) -> Control:
    """What corrects the gradients of a round: the server's variate and the client's own, of the client's share of the state.

    What a method leaves with each client is not corrected: nobody else has it. Raises FedsbError if the variate that the
    server names is not here.
    """
    layout = session.share(site).layout
    own, common = _before(content, session, site), unpack_state(content.get(VARIATES))
    return Control(layout.unflatten(own), layout.unflatten(common))


def change(content: RecordDict, session: Session, site: Site, trained: Control) -> ArrayRecord:
    """What the client's variate changes by, after training; the new one is on the disk before this returns."""
    before, layout = _before(content, session, site), session.share(site).layout
    changed = pack_state(layout.flatten(trained.variate()) - before, session.config.federation.wire_dtype)
    folder = _folder(session, site)
    path = folder / f"{answer_key(content)}.safetensors"
    if not path.exists():
        save_tensors(path, {VARIATE: _sum(before, unpack_state(changed))})  # as the server adds it up, rounding included
    named = f"{Order.of(content).variate}.safetensors"  # the server may go on naming it for as long as no later answer counts
    for old in sorted(folder.glob("round-*.safetensors"))[:-KEPT]:
        if old.name != named:
            old.unlink()
    return changed


def _before(content: RecordDict, session: Session, site: Site) -> Tensor:
    """The variate that the server names (size of the client's share,); zero if it names none."""
    order = Order.of(content)
    if not order.variate:
        return torch.zeros(session.share(site).layout.size)
    if not KEY.fullmatch(order.variate):
        raise FedsbError(f"is asked for the control variate {order.variate[:40]!r}, which is none; use one version of fedsb")
    try:
        return load_tensors(_folder(session, site) / f"{order.variate}.safetensors")[0][VARIATE]
    except StoreError as error:
        raise FedsbError(f"{site.name} has lost its control variate: {error}; restore it, or start another run") from None


def _folder(session: Session, site: Site) -> Path:
    return site.folder / site.name / "variates" / session.config.digest()[:16]


def _sum(before: Tensor, change: Tensor) -> Tensor:
    return (before.double() + change.double()).to(torch.float32)
