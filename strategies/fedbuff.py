"""FedBuff: nobody waits for the slowest (`fedsb/aggregation/buffered.py`).

`strategy.concurrency` clients are kept at work. A round is one aggregation: it is over when `strategy.buffer` updates have come,
whenever they were asked for; those still at work go on. A client is asked once a version of the state: it would answer the same.

The states that somebody still works on, and who, are in the checkpoint. What was at work when a server was killed is lost, and
the resumed run asks for it again, from the same states and in the same order: where replies come in the order of asking, the bits
are the same.
"""

import math
import random
import time
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid

from fedsb.aggregation.buffered import Buffer
from fedsb.aggregation.checks import check_weight
from fedsb.aggregation.mean import Mean
from fedsb.errors import ReplyError
from fedsb.training.loop import round_plan
from strategies import rounds
from strategies.fedsb import FedSB
from strategies.records import LOSS, TRAIN, bytes_of, pack_state, unpack_state
from strategies.rounds import LATE_SECONDS, Exchange, Traffic

AT_WORK, STATE_OF = "at-work", "state-"


@dataclass
class Flight(Exchange):
    """An exchange of messages that outlives a round: what has not come yet may come in the next. Each question has its own bound.

    Attributes:
        waiting: message → node, and until when.
        pulled: replies that the grid has handed over, and that nobody has heard yet.
    """

    waiting: dict[str, tuple[int, float]] = field(default_factory=dict)
    pulled: Iterator[Message] = field(default_factory=lambda: iter(()))

    def begin(self) -> None:
        """A new round: count from nothing."""
        self.traffic, self.silent, self.late = Traffic(), [], []

    def send(self, messages: Iterable[Message]) -> None:
        """Ask."""
        outgoing = list(messages)
        for message in outgoing:
            message.metadata.ttl = self.seconds + LATE_SECONDS
        self.traffic.down += sum(map(bytes_of, outgoing))
        for message_id, message in zip(self.grid.push_messages(outgoing), outgoing, strict=True):
            if message_id:
                self.waiting[message_id] = message.metadata.dst_node_id, time.monotonic() + self.seconds
            else:
                self.silent.append(message.metadata.dst_node_id)

    def __call__(self, messages: Iterable[Message]) -> Generator[Message]:
        """Ask, and yield the replies to all that was ever asked. Who stops listening hears the others the next time."""
        self.send(messages)
        progressed = True
        while self.waiting:
            reply = next(self.pulled, None)
            if reply is None:
                for message_id in [i for i, (_, until) in self.waiting.items() if not progressed and time.monotonic() > until]:
                    self.silent.append(self.waiting.pop(message_id)[0])
                if not progressed:
                    time.sleep(rounds.POLL_SECONDS)
                progressed = False
                self.pulled = iter(self.grid.pull_messages(list(self.waiting)))
                continue
            progressed = True
            node, _ = self.waiting.pop(reply.metadata.reply_to_message_id, (0, 0.0))
            if not node:  # a second reply, or one that nobody waits for any more
                continue
            if self.taken(reply, node):
                yield reply


class FedBuff(FedSB):
    """Buffered asynchrony. It remembers who is at work on which version of the state, and those versions.

    It asks in the middle of a round, so it runs in our loop and not in Flower's.
    """

    version: int = -1  # of the state: aggregations before this round; -1: this process has begun none

    def exchange(self, grid: Grid, seconds: float) -> Exchange:
        """The one exchange of the run."""
        if not hasattr(self, "flight"):
            self.flight = Flight(grid, seconds)
            self.at_work: dict[int, int] = {}  # node → version, in the order of asking
            self.states: dict[int, ArrayRecord] = {}
        self.flight.begin()
        return self.flight

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """Questions to as many clients as are to be at work, after those that a killed server had asked."""
        messages = self._asked_before()
        self.version, self.states[server_round - 1] = server_round - 1, arrays
        self.done: set[int] = set()  # nodes that were asked for this version
        return [*messages, *self._questions()]

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The state moved by the first `strategy.buffer` usable updates; None if fewer than `min_clients` come."""
        federation, strategy = self.config.federation, self.config.strategy
        buffer, losses = Buffer(self.layout.size), Mean(1)
        for reply in replies:
            version = self.at_work.pop(reply.metadata.src_node_id)
            self.expect(self.states[version], round_plan(self.config, version + 1), federation.wire_dtype)
            for client, usable in self.accepted(version + 1, [reply]):
                staleness = self.version - version
                if staleness > strategy.max_staleness:
                    reason = f"comes {staleness} rounds late where strategy.max_staleness = {strategy.max_staleness}"
                    self.tell("refused", round=server_round, client=client, reason=reason)  # no strike: slow is not false
                    continue
                try:
                    examples, loss, seconds = self.told(usable)
                    check_weight(examples)
                    vector, norm = self.usable(client, usable)
                except ReplyError as error:
                    self.refuse(server_round, client, error)
                    continue
                counted = min(examples, federation.max_examples or examples)
                weight = float(counted) if federation.weighting == "examples" else 1.0
                buffer.add(self.sent, vector, weight, staleness)
                losses.add(vector.new_tensor([loss]), weight)
                told = {"examples": examples, "loss": loss, "seconds": seconds, "staleness": staleness}
                self.tell("reply", round=server_round, client=client, norm=norm, **told)
            if buffer.count == strategy.buffer:
                break
            self._forget_silent()
            self.flight.send(self._questions())
        self._forget_silent()
        if buffer.count < federation.min_clients:
            return None, None
        if server_round == federation.rounds:
            self.flight.late = list(self.at_work)
        moved = buffer.result(unpack_state(self.states[self.version]))
        self._remember()
        metrics = MetricRecord({LOSS: float(losses.result()), "aggregation-error": math.nan, "clients": buffer.count})
        return pack_state(moved, federation.wire_dtype), metrics

    def _questions(self) -> list[Message]:
        """For those who are free and have not been asked for this version, in an order drawn for it, up to the number at work."""
        by_name = sorted((name, node) for node, name in self.roster.items())
        random.Random(f"{self.config.seed}:sample:{self.version + 1}").shuffle(by_name)
        free = [node for _, node in by_name if node not in self.at_work and node not in self.done]
        return [self._question(node, self.version) for node in free[: self.config.strategy.concurrency - len(self.at_work)]]

    def _question(self, node: int, version: int) -> Message:
        self.at_work[node] = version
        if version == self.version:
            self.done.add(node)
        return self.question(node, TRAIN, self.order(version + 1), self.states[version])

    def _asked_before(self) -> list[Message]:
        """What a killed server had asked, from its checkpoint; nothing in a server that goes on."""
        if self.version >= 0:
            return []
        named = {name: node for node, name in self.roster.items()}
        dtype = self.config.federation.wire_dtype
        self.states = {int(name.removeprefix(STATE_OF)): pack_state(t, dtype) for name, t in self.memory.items()}
        asked = self.notes.get(AT_WORK, [])
        return [self._question(named[client], version) for client, version in asked if client in named]

    def _remember(self) -> None:
        """Keep what somebody still works on, and put it where the checkpoint finds it."""
        self.states = {version: self.states[version] for version in sorted(set(self.at_work.values()))}
        self.memory = {f"{STATE_OF}{version}": unpack_state(record) for version, record in self.states.items()}
        names = [(self.roster.get(node), version) for node, version in self.at_work.items()]
        self.notes = {AT_WORK: [[name, version] for name, version in names if name]}

    def _forget_silent(self) -> None:
        """Who did not answer in time, or is gone, is not at work; but who was asked anew since then is."""
        asked = {node for node, _ in self.flight.waiting.values()}
        for node in set(self.flight.silent) - asked:
            self.at_work.pop(node, None)
