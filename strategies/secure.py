"""Fed-SB under a secure sum: the server sees what all clients' updates add up to, and no single one.

    keys → roster → encrypted shares → (global core, shares) → masked update → who survived → shares of secrets → the sum

Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017, eprint 2017/281, over
Flower's messages. The mathematics is `fedsb/privacy/secure_sum.py`; docs/privacy.md says what it promises and what not.
"""

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid

from fedsb.aggregation.checks import check_weight
from fedsb.aggregation.mean import Mean
from fedsb.errors import FederationError, ReplyError, SecureSumError
from fedsb.privacy.secure_sum import SecureSum
from fedsb.training.loop import round_plan
from strategies.fedsb import FedSB
from strategies.records import ARRAYS, LOSS, TRAIN, order_message, pack_state
from strategies.rounds import Exchange
from strategies.sums import ADVERTISE, REVEAL, SECRETS, SHARE, context_of, fixed_point_of, pack_payload, unpack_payload

NUMBERS_A_MEMBER = 32  # fp32 numbers' worth of bytes that a client says of each other member at the most


class SecureFedSB(FedSB):
    """`FedSB` whose mean is that of a secure sum. A client that fails at any stage counts as one that did not answer."""

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """Draw clients, exchange keys and shares with them, and ask those who took part to train."""
        nodes, self.wanted = self.sample(server_round)
        self.expect(arrays, round_plan(self.config, server_round), "fp32")
        self.grid, self.round, self.members, self.exchanges = grid, server_round, len(nodes), []
        self.sum = SecureSum(context_of(self.config, self.basis, server_round, self.layout.size, len(nodes)))
        names = {self.roster[node]: node for node in nodes}
        self._ask(ADVERTISE, dict.fromkeys(names, b""), self.sum.advertise)
        self._ask(SHARE, self._ended(self.sum.roster), self.sum.share)
        shares, order = self._ended(self.sum.shares), self.order(server_round, members=self.members)
        messages = []
        for name, share in shares.items():
            message = order_message(names[name], TRAIN, order, arrays)
            message.content[SECRETS] = pack_payload(share)
            messages.append(message)
        return messages

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Add up the masked updates, take the masks away, and move the global core by their mean."""
        losses, count = Mean(1), 0
        for client, reply in self.accepted(server_round, replies, self.layout.size):
            try:
                examples, loss, seconds = self.told(reply)
                check_weight(examples)
                self.sum.add(client, unpack_payload(reply.content, ARRAYS))
            except (ReplyError, SecureSumError) as error:
                self.refuse(server_round, client, ReplyError(str(error)))
                continue
            count += 1
            losses.add(torch.tensor([loss]), 1.0)
            told = {} if self.private else {"examples": examples, "loss": loss, "seconds": seconds}
            self.tell("reply", round=server_round, client=client, **told)
        if count < max(self.sum.context.threshold, self.config.federation.min_clients):
            return None, None
        self._ask(REVEAL, self._ended(self.sum.survivors), self.sum.reveal)
        fixed = fixed_point_of(self.config, server_round, self.members)
        try:
            total = fixed.decode(self.sum.total(), count)
        except SecureSumError as error:
            raise FederationError(f"round {server_round}: {error}; --resume tries the round again") from error
        divisor = self.config.federation.clients if self.config.privacy.unit == "client" else count
        record = pack_state(self.sent + torch.from_numpy(total / divisor).float(), self.config.federation.wire_dtype)
        self.tell("secure-sum", round=server_round, asked=self.members, summed=count, error=fixed.mean_error)
        return record, MetricRecord({LOSS: float(losses.result()), "aggregation-error": math.nan, "clients": count})

    def _ask(self, kind: str, payloads: Mapping[str, bytes], take: Callable[[str, bytes], None]) -> None:
        """One stage: to each client its payload, and what it answers to `take`. Who fails is named, and takes no further part."""
        nodes = {name: node for node, name in self.roster.items()}
        order, messages = self.order(self.round, members=self.members), []
        for name in payloads.keys() & nodes.keys():
            message = order_message(nodes[name], kind, order)
            message.content[SECRETS] = pack_payload(payloads[name])
            messages.append(message)
        exchange = Exchange(self.grid, self.config.federation.round_seconds)
        self.exchanges.append(exchange)
        for client, reply in self.accepted(self.round, exchange(messages), NUMBERS_A_MEMBER * self.members):
            try:
                take(client, unpack_payload(reply.content))
            except (ReplyError, SecureSumError) as error:
                self.refuse(self.round, client, ReplyError(str(error)))
        for node in exchange.silent:
            self.tell("silent", round=self.round, client=self.roster.get(node, f"node {node}"))

    def _ended(self, end: Callable[[], dict[str, bytes]]) -> dict[str, bytes]:
        """What goes out next. Raises FederationError if too few are left."""
        try:
            return end()
        except SecureSumError as error:
            raise FederationError(f"round {self.round}: {error}; events.jsonl names who failed, --resume tries again") from error
