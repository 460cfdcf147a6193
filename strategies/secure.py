"""Fed-SB under a secure sum: the server sees what all clients' updates add up to, and no single one.

    keys → roster → encrypted shares → (global core, shares) → masked update → who survived → shares of secrets → the sum

Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017, eprint 2017/281, over
Flower's messages. The mathematics is `fedsb/privacy/secure_sum.py`; docs/privacy.md says what it promises and what not.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from torch import Tensor

from fedsb.aggregation.checks import check_weight
from fedsb.aggregation.mean import Mean
from fedsb.errors import FederationError, ReplyError, SecureSumError
from fedsb.privacy.fixed_point import FixedPoint
from fedsb.privacy.roster import Context
from fedsb.privacy.secure_sum import SecureSum
from fedsb.training.loop import round_plan
from strategies.fedsb import FedSB
from strategies.records import ARRAYS, LOSS, TRAIN, Order, order_message, pack_state
from strategies.rounds import Exchange
from strategies.sums import ADVERTISE, REVEAL, SECRETS, SHARE, context_of, fixed_point_of, pack_payload, unpack_payload

NUMBERS_A_MEMBER = 32  # fp32 numbers' worth of bytes that a client says of each other member at the most


@dataclass
class Summing:
    """The stages of one secure sum, as exchanges of messages. A client that fails at any of them counts as one that did not
    answer.

    Attributes:
        exchange: makes an exchange of messages; it keeps count of what that moves.
        order: what goes with each question.
        context: what the sum is for.
        accepted: (replies, how many numbers each may have) → those that count, with their clients' names.
        refuse: (client, why) is called for all others.
        silent: called with the nodes that did not answer.
    """

    exchange: Callable[[], Exchange]
    order: Order
    context: Context
    accepted: Callable[[Iterable[Message], int], Iterator[tuple[str, Message]]]
    refuse: Callable[[str, ReplyError], None]
    silent: Callable[[list[int]], None]
    nodes: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Begin the sum."""
        self.sum = SecureSum(self.context)

    def begin(self, nodes: Iterable[int]) -> dict[int, ArrayRecord]:
        """Exchange keys and shares: node → what goes along, as `SECRETS`, with the question that a masked vector answers.

        Raises FederationError if too few take part.
        """
        self._ask(ADVERTISE, dict.fromkeys(nodes, b""), self.sum.advertise)
        self._ask(SHARE, self._ended(self.sum.roster), self.sum.share)
        return {node: pack_payload(shares) for node, shares in self._ended(self.sum.shares).items()}

    def add(self, client: str, reply: Message) -> None:
        """Count a client's masked vector. Raises ReplyError if it must not be counted."""
        self._check_node(client, reply)
        try:
            self.sum.add(client, unpack_payload(reply.content, ARRAYS))
        except SecureSumError as error:
            raise ReplyError(str(error)) from error

    def total(self, fixed: FixedPoint, count: int) -> Tensor:
        """The sum (size,), fp64, of the vectors of `count` clients: ask them what takes the masks off, and take them off.

        Raises FederationError if too few answer, or if what they sent is no sum of vectors within the bound.
        """
        self._ask(REVEAL, self._ended(self.sum.survivors), self.sum.reveal)
        try:
            return torch.from_numpy(fixed.decode(self.sum.total(), count))
        except SecureSumError as error:
            raise FederationError(f"{self._place}: {error}; --resume tries again") from error

    def _ask(self, kind: str, payloads: Mapping[int, bytes], take: Callable[[str, bytes], None]) -> None:
        """One stage: to each client its payload, and what it answers to `take`. Who fails takes no further part."""
        messages = []
        for node, payload in payloads.items():
            message = order_message(node, kind, self.order)
            message.content[SECRETS] = pack_payload(payload)
            messages.append(message)
        exchange = self.exchange()
        for client, reply in self.accepted(exchange(messages), NUMBERS_A_MEMBER * self.order.members):
            try:
                self._check_node(client, reply)
                take(client, unpack_payload(reply.content))
            except (ReplyError, SecureSumError) as error:
                self.refuse(client, ReplyError(str(error)))
        self.silent(exchange.silent)

    def _check_node(self, client: str, reply: Message) -> None:
        """A name belongs to the node that bore it first."""
        if self.nodes.setdefault(client, reply.metadata.src_node_id) != reply.metadata.src_node_id:
            raise ReplyError(f"bears the name {client}, which another client has")

    def _ended(self, end: Callable[[], dict[str, bytes]]) -> dict[int, bytes]:
        """What goes out next, by node. Raises FederationError if too few are left."""
        try:
            return {self.nodes[name]: payload for name, payload in end().items()}
        except SecureSumError as error:
            raise FederationError(f"{self._place}: {error}; events.jsonl names who failed, --resume tries again") from error

    @property
    def _place(self) -> str:
        return f"round {self.order.round}" if self.order.round else "the sum of sketches"


class SecureFedSB(FedSB):
    """`FedSB` whose mean is that of a secure sum."""

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """Draw clients, exchange keys and shares with them, and ask those who took part to train."""
        nodes, self.wanted = self.sample(server_round)
        self.expect(arrays, round_plan(self.config, server_round), "fp32")
        self.exchanges = []

        def exchange() -> Exchange:
            self.exchanges.append(Exchange(grid, self.config.federation.round_seconds))
            return self.exchanges[-1]

        def silent(gone: list[int]) -> None:
            for node in gone:
                self.tell("silent", round=server_round, client=self.roster.get(node, f"node {node}"))

        order = self.order(server_round, members=len(nodes))
        self.summing = Summing(
            exchange,
            order,
            context_of(self.config, self.basis, server_round, self.layout.size, len(nodes)),
            lambda replies, numbers: self.accepted(server_round, replies, numbers),
            lambda client, error: self.refuse(server_round, client, error),
            silent,
        )
        messages = []
        for node, shares in self.summing.begin(nodes).items():
            message = order_message(node, TRAIN, order, arrays)
            message.content[SECRETS] = shares
            messages.append(message)
        return messages

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Add up the masked updates, take the masks away, and move the global core by their mean."""
        losses, count, members = Mean(1), 0, self.summing.order.members
        for client, reply in self.accepted(server_round, replies):
            try:
                examples, loss, seconds = self.told(reply)
                check_weight(examples)
                self.summing.add(client, reply)
            except ReplyError as error:
                self.refuse(server_round, client, error)
                continue
            count += 1
            losses.add(torch.tensor([loss]), 1.0)
            told = {} if self.private else {"examples": examples, "loss": loss, "seconds": seconds}
            self.tell("reply", round=server_round, client=client, **told)
        if count < max(self.summing.context.threshold, self.config.federation.min_clients):
            return None, None
        fixed = fixed_point_of(self.config, server_round, members, self.sent)
        total = self.summing.total(fixed, count)
        divisor = self.config.federation.clients if self.config.privacy.unit == "client" else count
        average = self.sent + (total / divisor).float()
        record = pack_state(self.step(average, server_round), self.config.federation.wire_dtype)
        self.tell("secure-sum", round=server_round, asked=members, summed=count, error=fixed.mean_error)
        return record, MetricRecord({LOSS: float(losses.result()), "aggregation-error": math.nan, "clients": count})
