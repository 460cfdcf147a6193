"""The round loop: bounded waits, replies handled one by one as they come, every byte counted, resumable at any round.

Flower's own loop waits without bound, loses the whole run to one bad reply and cannot resume; this one drives the same
`Strategy` interface, so Flower's strategies drop in.
"""

import contextlib
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedsb.errors import FederationError
from strategies.records import bytes_of

POLL_SECONDS = 0.2
LATE_SECONDS = 10.0  # for which a question outlives its round, since clocks differ by some seconds
AWAY = {ErrorCode.NODE_UNAVAILABLE, ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE}  # said by Flower itself


@dataclass
class Traffic:
    """Bytes of all messages of a run, by purpose."""

    basis: int = 0
    up: int = 0
    down: int = 0

    def add(self, other: "Traffic") -> None:
        """Add another count to this one."""
        self.basis, self.up, self.down = self.basis + other.basis, self.up + other.up, self.down + other.down


@dataclass(frozen=True)
class RoundResult:
    """What one round brought."""

    round: int
    arrays: ArrayRecord
    metrics: MetricRecord | None
    traffic: Traffic
    silent: list[int]
    late: list[int]
    seconds: float
    memory: Mapping[str, Tensor] = field(default_factory=dict)  # what a strategy of ours remembers from round to round
    notes: Mapping[str, Any] = field(default_factory=dict)  # the same, as JSON


@dataclass
class Exchange:
    """Sends messages and yields their replies, each as it comes, for at most `seconds`.

    A question dies with its round, so a site that was away is not asked what nobody waits for any more.

    Attributes:
        grid: where the nodes are.
        seconds: the bound; replies that have not arrived by then are dropped.
        traffic: what this exchange moved, counted as it moves.
        silent: nodes that had not answered in time, that Flower could not ask, or of which it says that they are gone.
        late: nodes that had not answered when the caller had enough replies and closed the generator.
    """

    grid: Grid
    seconds: float
    traffic: Traffic = field(default_factory=Traffic)
    silent: list[int] = field(default_factory=list)
    late: list[int] = field(default_factory=list)

    def __call__(self, messages: Iterable[Message]) -> Generator[Message]:
        """Yield the replies in order of arrival."""
        outgoing = list(messages)
        for message in outgoing:
            message.metadata.ttl = self.seconds + LATE_SECONDS
        self.traffic.down += sum(map(bytes_of, outgoing))
        ids = list(self.grid.push_messages(outgoing))
        asked = list(zip(ids, (m.metadata.dst_node_id for m in outgoing), strict=True))
        waiting = {message_id: node for message_id, node in asked if message_id}
        self.silent = [node for message_id, node in asked if not message_id]
        deadline = time.monotonic() + self.seconds
        try:
            while waiting:
                progressed = False
                for reply in self.grid.pull_messages(list(waiting)):
                    progressed = True
                    node = waiting.pop(reply.metadata.reply_to_message_id, None)
                    if node is None:  # a second reply to the same message
                        continue
                    if self.taken(reply, node):
                        yield reply
                if time.monotonic() > deadline:
                    break
                if waiting and not progressed:
                    time.sleep(POLL_SECONDS)
        except GeneratorExit:
            self.late = list(waiting.values())
            raise
        self.silent += waiting.values()

    def taken(self, reply: Message, node: int) -> bool:
        """Whether a reply to a question that a node was asked is one; it is counted then, and the node silent otherwise."""
        if reply.has_error() and reply.error.code in AWAY:
            self.silent.append(node)
            return False
        reply.metadata.__dict__["_src_node_id"] = node  # Flower itself answers for an app that crashed
        self.traffic.up += bytes_of(reply)
        return True


def wait_for_nodes(grid: Grid, count: int, seconds: float) -> list[int]:
    """Node ids once at least `count` nodes are there, sorted. Raises FederationError after `seconds`."""
    deadline = time.monotonic() + seconds
    while len(nodes := sorted(grid.get_node_ids())) < count:
        if time.monotonic() > deadline:
            raise FederationError(
                f"{len(nodes)} clients are connected where federation.min_clients = {count} are needed, after waiting "
                f"{seconds:.0f} s; start more clients or lower federation.min_clients"
            )
        time.sleep(POLL_SECONDS)
    return nodes


def run_rounds(
    grid: Grid,
    strategy: Strategy,
    arrays: ArrayRecord,
    *,
    first: int,
    last: int,
    seconds: float,
    admit: Callable[[], None] = lambda: None,
    before_round: Callable[[int, int], None] = lambda server_round, clients: None,
    after_round: Callable[[RoundResult], None],
    config: Callable[[int], ConfigRecord] = lambda _: ConfigRecord(),
) -> ArrayRecord:
    """Configure → train → aggregate → hand over, from round `first` to round `last`, both included.

    Args:
        grid: where the clients are.
        strategy: any Flower strategy; it gets the replies as an iterator, one at a time.
        arrays: the global state before round `first`.
        seconds: longest wait for the replies of one round.
        admit: called before each round's clients are drawn: the place to take in those that have appeared since.
        before_round: called with each round's number and how many clients it asks.
        after_round: called with each result, before the next round begins: the place to write a checkpoint.
        config: round → what to tell the clients.

    Returns:
        The global state after round `last`.

    Raises:
        FederationError: a round without enough usable replies.
    """
    for server_round in range(first, last + 1):
        started = time.monotonic()
        exchange = getattr(strategy, "exchange", Exchange)(grid, seconds)
        admit()
        messages = list(strategy.configure_train(server_round, arrays, config(server_round), grid))
        before_round(server_round, len(messages))
        with contextlib.closing(exchange(messages)) as replies:
            aggregated, metrics = strategy.aggregate_train(server_round, replies)
        if aggregated is None:
            raise FederationError(
                f"round {server_round}: too few usable replies from {len(messages)} clients ({len(exchange.silent)} did not "
                f"answer within {seconds:.0f} s); events.jsonl names what was refused, and --resume tries the round again"
            )
        arrays = aggregated
        for more in getattr(strategy, "exchanges", ()):  # of a strategy that asks more than once a round
            exchange.traffic.add(more.traffic)
        seconds_taken = time.monotonic() - started
        silent, late = exchange.silent, exchange.late
        memory, notes = getattr(strategy, "memory", {}), getattr(strategy, "notes", {})
        after_round(RoundResult(server_round, arrays, metrics, exchange.traffic, silent, late, seconds_taken, memory, notes))
    return arrays
