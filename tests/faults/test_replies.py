"""A site whose trainer sends what must not be counted: each reply is refused and named, and the run is as if it had not come."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import uvicorn
from flwr.app import Array, ArrayRecord, RecordDict
from torch import Tensor

from clients.answers import Node, answer
from clients.worker import trainer_app
from fedsb.deploy import processes
from strategies.records import ARRAYS, IDENTITY, STATE, TRAIN, Order, pack_state, unpack_state
from tests.faults.harness import SITES, Federation, until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1200)]
Spoil = Callable[[RecordDict, Tensor], None]


def _sends(change: Callable[[Tensor], Tensor]) -> Spoil:
    def spoil(reply: RecordDict, _: Tensor) -> None:
        reply[ARRAYS] = pack_state(change(unpack_state(reply[ARRAYS])), "fp32")

    return spoil


def _says(**identity: Any) -> Spoil:
    return lambda reply, _: reply[IDENTITY].update(identity)


def _as_fp64(reply: RecordDict, _: Tensor) -> None:
    reply[ARRAYS] = ArrayRecord({STATE: Array(unpack_state(reply[ARRAYS]).double().numpy())})


def _hundredfold(reply: RecordDict, sent: Tensor) -> None:
    reply[ARRAYS] = pack_state(sent + 100 * (unpack_state(reply[ARRAYS]) - sent), "fp32")


FAULTS: list[tuple[Spoil, str]] = [
    (_sends(lambda v: v.index_fill(0, torch.tensor([3]), torch.nan)), "NaN or infinite"),
    (_sends(lambda v: v[:-1]), "shape (223,) where (224,)"),
    (_as_fp64, "float64 where float32"),
    (_says(round=1), "round 1 where 4"),
    (_says(basis="ab" * 32), "basis abababababababab where"),
    (_hundredfold, "where its steps can move it by"),
]


@contextlib.contextmanager
def trainer(federation: Federation, site: str, respond: Callable[[str, RecordDict, Node], RecordDict]) -> Iterator[None]:
    """Serve a site's socket from here in its trainer's stead."""
    program = f"site-{site}-trainer"
    processes.stop(federation.home, program)
    place = federation.home.site(site).resolve()
    node = {"name": site, "partition-id": SITES.index(site), "num-partitions": len(SITES), "folder": str(place)}
    path = processes.trainer_socket(federation.home, site)
    path.unlink(missing_ok=True)
    config = uvicorn.Config(trainer_app(node, respond), uds=str(path), ws="none", log_level="warning", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(path.is_socket, "the socket")
        yield
    finally:
        server.should_exit = True
        thread.join()
        processes.start(federation.home, program)


def test_replies_that_must_not_count(federation: Federation, scratch: Path) -> None:
    """One round for each fault, and a last one in which the site answers truly."""

    def respond(kind: str, content: RecordDict, node: Node) -> RecordDict:
        reply = answer(kind, content, node)
        number = Order.of(content).round
        if kind == TRAIN and number <= len(FAULTS):
            FAULTS[number - 1][0](reply, unpack_state(content[ARRAYS]))
        return reply

    with trainer(federation, "alpha", respond):
        run = federation.start("replies", federation={"rounds": len(FAULTS) + 1, "strikes": 0})
        run.whole()
    refused = {event["round"]: event["reason"] for event in run.events("refused", client="alpha")}
    assert len(run.events("refused")) == len(refused) == len(FAULTS)
    for number, (_, reason) in enumerate(FAULTS, 1):
        assert reason in refused[number]
        assert run.heard()[number] == {"beta", "gamma"}
    assert run.heard()[len(FAULTS) + 1] == set(SITES)
    (row,) = [row for row in federation.status()["runs"] if row["run"] == "replies"]
    assert row["refused"] == len(FAULTS)
    run.assert_equals_simulation(scratch)


@pytest.mark.parametrize("size", [200_000_000, pytest.param(1_000_000_000, marks=pytest.mark.apart)], ids=["200 MB", "1 GB"])
def test_a_huge_reply_and_a_site_that_goes_on_so(federation: Federation, scratch: Path, size: int) -> None:
    """Numbers that all differ, since Flower sends equal parts once. The third refused reply is the site's last."""

    def respond(kind: str, content: RecordDict, node: Node) -> RecordDict:
        reply, number = answer(kind, content, node), Order.of(content).round
        if kind == TRAIN and number == 1:
            reply[ARRAYS] = ArrayRecord({STATE: Array(np.arange(size // 4, dtype=np.int32).view(np.float32))})
        elif kind == TRAIN:
            FAULTS[0][0](reply, unpack_state(content[ARRAYS]))
        return reply

    with trainer(federation, "alpha", respond):
        run = federation.start(f"huge-{size}", federation={"rounds": 4, "round_seconds": 600.0})
        run.whole()
    refused = [event["reason"] for event in run.events("refused", client="alpha")]
    assert f"sent {size:,} bytes"[:9] in refused[0] and "at the most" in refused[0]
    assert [event["round"] for event in run.events("left-out", client="alpha")] == [3]
    assert run.heard() == {number: {"beta", "gamma"} for number in (1, 2, 3, 4)}
    assert not run.events("silent")
    run.assert_equals_simulation(scratch)
