"""A strategy and replies to feed it by hand, without any model."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from torch import Tensor

from clients.app import app as client_app
from fedsb.adapters.lora_sb import LORA_SB
from fedsb.adapters.state import Layout
from fedsb.aggregation.checks import Strikes
from fedsb.aggregation.error import AggregationError
from fedsb.basis.spectral import random_basis, seeded
from fedsb.config import RunConfig
from server.local_grid import LocalGrid, node_configs
from strategies.fedsb import FedSB
from strategies.records import EXAMPLES, LOSS, SECONDS, Identity, Order, pack_state, reply_content
from strategies.shared import Shared
from tests.federation.tiny import config_of, table

SHAPES = {"a": (12, 10), "b": (9, 16)}
BASIS = random_basis(SHAPES, 4, seed=1)
LAYOUT = Layout((("a.core", (4, 4)), ("b.core", (4, 4)), ("head.classifier.bias", (3,))))
START = pack_state(torch.zeros(LAYOUT.size), "fp32")


class Desk:
    """A FedSB strategy for clients client-0, client-1, … and the events it tells."""

    def __init__(self, clients: int = 3, **federation: Any) -> None:
        sizes = {"clients": clients, "rounds": 3}
        far = {"learning_rate": 10.0, "head_learning_rate": 10.0, "warmup_steps": 0}  # random states are within reach of START
        self.config: RunConfig = config_of(table("model", "jsonl:words", federation=sizes | federation, train=far))
        self.events: list[dict[str, Any]] = []
        self.roster = dict(enumerate(self.config.client_names, 2))
        self.strategy = FedSB(
            self.config,
            LAYOUT,
            Shared(BASIS),
            self.roster,
            Strikes(self.config.federation.strikes, {}),
            AggregationError(LORA_SB, BASIS, SHAPES, 1.0, seeded(0, "probe")),
            self.tell,
        )
        self.grid = LocalGrid(client_app, node_configs(self.config.client_names, "sites"))

    def tell(self, event: str, **fields: Any) -> None:
        self.events.append({"event": event, **fields})

    @property
    def refused(self) -> dict[str, str]:
        """Client → why it was left out."""
        return {event["client"]: event["reason"] for event in self.events if event["event"] == "refused"}

    def questions(self, server_round: int = 1) -> list[Message]:
        """What the strategy sends."""
        return list(self.strategy.configure_train(server_round, START, ConfigRecord(), self.grid))

    def reply(
        self,
        question: Message,
        vector: Tensor | ArrayRecord | None,
        metrics: Mapping[str, Any] | None = None,
        **identity: Any,
    ) -> Message:
        """A client's reply, honest but for what is given."""
        order = Order.of(question.content)
        says = {"client": self.roster[question.metadata.dst_node_id], "round": order.round, "basis": order.basis}
        who = Identity(**({**says, "layout": LAYOUT.fingerprint} | identity))
        state = pack_state(vector, "fp32") if isinstance(vector, Tensor) else vector
        reply = Message(reply_content(who, None, state), reply_to=question)
        numbers = {EXAMPLES: 10, LOSS: 1.5, SECONDS: 0.1} | dict(metrics or {})
        reply.content["metrics"] = MetricRecord({key: value for key, value in numbers.items() if value is not None})
        return reply

    def aggregate(self, replies: Iterable[Message], server_round: int = 1) -> tuple[ArrayRecord | None, MetricRecord | None]:
        return self.strategy.aggregate_train(server_round, replies)


def vectors(count: int, seed: int = 0) -> list[Tensor]:
    """Random states."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(LAYOUT.size, generator=draw) for _ in range(count)]


Spoil = Callable[[Desk, Message, Tensor], Message]
