"""Step 1 where the basis comes from the clients' data: ask each for the sketch of its first gradient, add them up, and take the
subspaces of the sum (`fedsb/basis/sketch.py`). No client sends a gradient; with privacy each sketch is a release, paid for.
"""

from collections.abc import Callable

import torch
from flwr.app import Message
from flwr.serverapp import Grid
from torch import Tensor

from fedsb.aggregation.checks import check_equal, check_size, check_vector
from fedsb.aggregation.mean import Mean
from fedsb.aggregation.private import PrivateMean
from fedsb.basis.frames import DTYPES, Basis
from fedsb.basis.sketch import SketchPlan, sketched_basis
from fedsb.config import RunConfig
from fedsb.errors import FederationError, ReplyError
from fedsb.privacy.mechanism import sketch_mechanism
from fedsb.privacy.noise import KeyStream
from strategies.records import (
    ARRAYS,
    SKETCH,
    Identity,
    Order,
    largest_reply,
    order_message,
    reason_of,
    size_of,
    unpack_state,
)
from strategies.rounds import Exchange, Traffic, wait_for_nodes

Check = Callable[[int, Identity], None]


def basis_from_clients(
    config: RunConfig, grid: Grid, plan: SketchPlan, check: Check, tell: Callable[..., None]
) -> tuple[Basis, Traffic]:
    """Ask all clients that are there, and make the basis of what they answer.

    Args:
        config: the run.
        grid: where the clients are.
        plan: what a sketch consists of.
        check: (node, identity of its reply) → raises ReplyError if it is not who it may be.
        tell: the journal.

    Returns:
        The basis in the dtype in which it is kept, and the bytes that this took. Raises FederationError if fewer than
        `federation.min_clients` sketches can be used.
    """
    federation = config.federation
    nodes = wait_for_nodes(grid, federation.min_clients, federation.wait_seconds)
    tell("stage", title="sketching", clients=len(nodes))
    exchange = Exchange(grid, federation.round_seconds)
    order = Order(config.to_json(), 0, "")
    total, seen = _sum(config, plan.size), set[str]()
    for reply in exchange([order_message(node, SKETCH, order) for node in nodes]):
        node = reply.metadata.src_node_id
        try:
            client, vector = _read(reply, plan, check)
            if client in seen:
                raise ReplyError(f"bears the name {client}, which another client has")
        except ReplyError as error:
            tell("refused", round=0, client=f"node {node}", reason=str(error))
            continue
        seen.add(client)
        total.add(vector)
        tell("sketched", client=client)
    for node in exchange.silent:
        tell("silent", round=0, client=f"node {node}")
    if len(seen) < max(1, federation.min_clients) and config.privacy.unit != "client":
        raise FederationError(
            f"{len(seen)} clients sent a sketch where federation.min_clients = {federation.min_clients} are needed; events.jsonl "
            "names what was refused"
        )
    return sketched_basis(plan, total.result()).to(DTYPES[config.basis.dtype]), exchange.traffic


def _sum(config: RunConfig, size: int) -> Mean | PrivateMean:
    if config.privacy.unit != "client":
        return Mean(size)
    clients = config.federation.clients
    return PrivateMean(torch.zeros(size), sketch_mechanism(config, clients), clients, KeyStream())


def _read(reply: Message, plan: SketchPlan, check: Check) -> tuple[str, Tensor]:
    """A client's name and its sketch (plan.size,). Raises ReplyError if it must not be counted."""
    if reply.has_error():
        raise ReplyError(f"failed: {reason_of(reply.error)}")
    check_size(size_of(reply), largest_reply(plan.size, "fp32"))
    identity = Identity.of(reply)
    check_equal("round", identity.round, 0)
    check(reply.metadata.src_node_id, identity)
    vector = unpack_state(reply.content.get(ARRAYS), "fp32")
    check_vector(vector, plan.size)
    return identity.client, vector
