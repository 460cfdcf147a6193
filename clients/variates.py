"""A client's side of SCAFFOLD: its control variates, one file for each question that it has answered.

The server names the one that a question is about, and none is ever changed. So a question that is asked again, of whatever
process and after whatever the client did since, has the same answer.
"""

import re

import torch
from flwr.app import ArrayRecord, RecordDict
from torch import Tensor

from clients.session import Session, Site, Trained
from fedsb.errors import FedsbError, StoreError
from fedsb.store.tensors import load_tensors, save_tensors
from fedsb.training.drift import Control
from fedsb.training.loop import round_plan
from strategies.records import ARRAYS, VARIATES, Order, pack_state, unpack_state
from strategies.scaffold import answer_key

KEY = re.compile(r"round-\d{4,}-[0-9a-f]{16}")
KEPT = 3  # the newest: what the next question names, and what it names if the server has lost its newest checkpoint
VARIATE = "variate"


def train(content: RecordDict, session: Session, site: Site) -> tuple[Trained, ArrayRecord]:
    """Train with corrected gradients: the result, and what the client's variate changes by.

    Raises FedsbError if the variate that the server names is not here.
    """
    order, layout = Order.of(content), session.layout
    folder = site.folder / site.name / "variates" / session.config.digest()[:16]
    before = torch.zeros(layout.size)
    if order.variate:
        if not KEY.fullmatch(order.variate):
            raise FedsbError(f"is asked for the control variate {order.variate[:40]!r}, which is none; use one version of fedsb")
        try:
            before = load_tensors(folder / f"{order.variate}.safetensors")[0][VARIATE]
        except StoreError as error:
            raise FedsbError(f"{site.name} has lost its control variate: {error}; restore it, or start another run") from None
    control = Control(layout.unflatten(before), layout.unflatten(unpack_state(content.get(VARIATES))))
    trained = session.train(site, unpack_state(content.get(ARRAYS)), round_plan(session.config, order.round), control)
    change = pack_state(layout.flatten(control.variate()) - before, session.config.federation.wire_dtype)
    path = folder / f"{answer_key(content)}.safetensors"
    if not path.exists():
        save_tensors(path, {VARIATE: _sum(before, unpack_state(change))})  # as the server adds it up, rounding included
    for old in sorted(folder.glob("round-*.safetensors"))[:-KEPT]:
        old.unlink()
    return trained, change


def _sum(before: Tensor, change: Tensor) -> Tensor:
    return (before.double() + change.double()).to(torch.float32)
