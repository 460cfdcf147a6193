"""The grid in this process: order, errors, what clients see of each other, and memory."""

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from server.local_grid import LocalGrid, node_configs
from strategies.fedsb import FedSB
from strategies.records import EXAMPLES, LOSS, SECONDS, Identity, Order, pack_state, reply_content
from strategies.rounds import Exchange, run_rounds
from tests.federation.bench import LAYOUT, START, Desk
from tests.federation.echo import app as echo


def _ask(grid: LocalGrid) -> list[Message]:
    return [Message(RecordDict({"arrays": START}), node, "train") for node in grid.get_node_ids()]


def test_clients_are_called_in_order_each_when_its_reply_is_asked_for() -> None:
    app, called = ClientApp(), []

    @app.train()
    def train(message: Message, context: Context) -> Message:
        called.append(context.node_config["name"])
        return Message(RecordDict(), reply_to=message)

    grid = LocalGrid(app, node_configs(["a", "b", "c"], "sites"))
    replies = iter(grid.pull_messages(grid.push_messages(_ask(grid))))
    assert called == []
    assert next(replies).metadata.src_node_id == 2 and called == ["a"]
    assert [reply.metadata.src_node_id for reply in replies] == [3, 4] and called == ["a", "b", "c"]


def test_a_message_is_answered_once() -> None:
    grid = LocalGrid(echo, [{}])
    ids = grid.push_messages(_ask(grid))
    assert len(list(grid.pull_messages(ids))) == 1
    assert list(grid.pull_messages([*ids, "unknown"])) == []


def test_a_reply_names_its_message_and_its_client() -> None:
    grid = LocalGrid(echo, [{}, {}])
    ids = grid.push_messages(_ask(grid))
    for message_id, node, reply in zip(ids, grid.get_node_ids(), grid.pull_messages(ids), strict=True):
        assert (reply.metadata.reply_to_message_id, reply.metadata.src_node_id) == (message_id, node)
    assert len(grid.send_and_receive(_ask(grid))) == 2


def test_an_error_of_a_client_is_raised_here() -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        raise ZeroDivisionError("mine")

    grid = LocalGrid(app, [{}])
    with pytest.raises(ZeroDivisionError, match="mine"):
        grid.send_and_receive(_ask(grid))


def test_clients_keep_their_own_state_and_configuration() -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        past = context.state["past"]["n"] if "past" in context.state else 0
        context.state["past"] = MetricRecord({"n": past + 1})
        numbers = MetricRecord({"n": past, "part": context.node_config["partition-id"]})
        return Message(RecordDict({"m": numbers}), reply_to=message)

    grid = LocalGrid(app, node_configs(["a", "b"], "sites"))
    for past in (0, 1):
        seen = [dict(reply.content["m"]) for reply in grid.send_and_receive(_ask(grid))]
        assert seen == [{"n": past, "part": 0}, {"n": past, "part": 1}]


def test_node_configurations_are_those_of_supernodes() -> None:
    assert node_configs(["a", "b"], "x") == [
        {"name": "a", "partition-id": 0, "num-partitions": 2, "folder": "x"},
        {"name": "b", "partition-id": 1, "num-partitions": 2, "folder": "x"},
    ]


class Census:
    """A client app whose replies are counted while they live."""

    def __init__(self, make: Any) -> None:
        self.alive: weakref.WeakValueDictionary[int, ArrayRecord] = weakref.WeakValueDictionary()
        self.most = 0
        self.app = ClientApp()

        @self.app.train()
        def train(message: Message, context: Context) -> Message:
            reply: Message = make(message)
            self.alive[message.metadata.dst_node_id] = reply.content["arrays"]
            self.most = max(self.most, len(self.alive))
            return reply


def test_with_five_hundred_clients_no_more_than_a_few_replies_are_alive() -> None:
    def answer(message: Message) -> Message:
        array = Array(np.zeros(1000, dtype=np.float32))
        return Message(RecordDict({"arrays": ArrayRecord({"state": array})}), reply_to=message)

    census = Census(answer)
    grid = LocalGrid(census.app, [{}] * 500)
    gc.disable()  # so that it is no cycle that the collector happened to break
    try:
        assert sum(1 for _ in Exchange(grid, 60)(_ask(grid))) == 500
    finally:
        gc.enable()
    assert census.most <= 3


def test_the_whole_round_holds_no_more_replies_either() -> None:
    desk = Desk(300)

    def answer(message: Message) -> Message:
        order = Order.of(message.content)
        name = desk.roster[message.metadata.dst_node_id]
        identity = Identity(name, order.round, order.basis, LAYOUT.fingerprint)
        metrics = {EXAMPLES: 1, LOSS: 1.0, SECONDS: 0.0}
        return Message(reply_content(identity, metrics, pack_state(torch.ones(LAYOUT.size), "fp32")), reply_to=message)

    census = Census(answer)
    grid = LocalGrid(census.app, [{}] * 300)
    gc.disable()
    try:
        counted: list[Any] = []
        run_rounds(grid, desk.strategy, START, first=1, last=2, seconds=60, after_round=lambda r: counted.append(r.metrics))
    finally:
        gc.enable()
    assert [metrics["clients"] for metrics in counted] == [300, 300]
    assert census.most <= 4 and isinstance(desk.strategy, FedSB)
    assert isinstance(grid.pull_messages([]), Iterator)
