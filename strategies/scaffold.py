"""SCAFFOLD: clients correct their gradients by what they and the server know of each other's (`fedsb/training/drift.py`).

    x ← mean of yᵢ;     c ← c + (|S|/N) · mean of (cᵢ⁺ - cᵢ) over the clients S of the round, of N

Karimireddy et al., arXiv 1910.06378, algorithm 1 with option II and ηg = 1. A variate is as large as a state and travels
each way beside it.

A client's variate stays on its disk, one file for each question (`answer_key`). The server remembers which of them counted and
names it in the next question, so what a client answers follows from the question and from files that are never changed.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import replace

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fedsb.aggregation.checks import check_vector
from fedsb.aggregation.mean import Mean
from strategies.envelope import to_bytes
from strategies.fedsb import FedSB
from strategies.records import ARRAYS, CONFIG, VARIATES, Order, pack_state, unpack_state

COMMON, COUNTED = "c", "variates"


def answer_key(content: RecordDict) -> str:
    """The name of the variate that answers a question: of its round, and of all that it depends on."""
    order = Order.of(content)
    asked = to_bytes(RecordDict({name: content[name] for name in (ARRAYS, VARIATES)})) + order.variate.encode()
    return f"round-{order.round:04d}-{hashlib.sha256(asked).hexdigest()[:16]}"


class Scaffold(FedSB):
    """The mean of clients that correct their drift. It remembers c, and which variate of each client c holds."""

    vectors = 2

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """The global state and c to every client drawn, and the name of its own variate."""
        messages = list(super().configure_train(server_round, arrays, config, grid))
        self.common = self.memory.get(COMMON, torch.zeros(self.layout.size))
        self.known, self.asked = len(self.roster), dict[str, str]()
        common = pack_state(self.common, self.config.federation.wire_dtype)
        for message in messages:
            client = self.roster[message.metadata.dst_node_id]
            order = replace(Order.of(message.content), variate=self.notes.get(COUNTED, {}).get(client, ""))
            message.content[CONFIG], message.content[VARIATES] = order.record(), common
            self.asked[client] = answer_key(message.content)
        return messages

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The mean of the states, and of what the variates of the same replies changed by."""
        self.changes, self.counted = Mean(self.layout.size), list[str]()
        record, metrics = super().aggregate_train(server_round, replies)
        if record is not None:
            change = self.changes.result().double() * (self.changes.count / self.known)
            self.memory = {COMMON: (self.common.double() + change).to(torch.float32)}
            counted = {client: self.asked[client] for client in self.counted}
            self.notes = {COUNTED: self.notes.get(COUNTED, {}) | counted}
        return record, metrics

    def also(self, client: str, reply: Message) -> None:
        """Count what a client's variate has changed by."""
        change = unpack_state(reply.content.get(VARIATES), self.dtype)
        check_vector(change, self.layout.size)
        self.changes.add(change)
        self.counted.append(client)
