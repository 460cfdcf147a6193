"""Fed-SB: clients train cores on one frozen basis, and the server takes their exact mean.

Singhal et al., "Fed-SB: A Silver Bullet for Extreme Communication Efficiency and Performance in (Private) Federated LoRA
Fine-Tuning", arXiv 2502.15436, section 3. This file translates between messages and `fedsb/aggregation`; it has no
arithmetic of its own.
"""

import dataclasses
import math
import random
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from typing import Any, ClassVar

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedsb.adapters.attach import restarted, scale_of
from fedsb.adapters.methods import METHODS
from fedsb.adapters.state import Layout
from fedsb.aggregation.checks import Strikes, check_equal, check_size, check_weight
from fedsb.aggregation.error import AggregationError
from fedsb.aggregation.factors import mean_of, padded
from fedsb.aggregation.folding import fold_of
from fedsb.aggregation.mean import Aggregate, Mean
from fedsb.aggregation.private import PrivateMean
from fedsb.config import RunConfig
from fedsb.errors import ReplyError
from fedsb.privacy.mechanism import mechanism_of
from fedsb.privacy.noise import KeyStream
from fedsb.training.loop import round_plan
from strategies.records import (
    DTYPES,
    EVALUATE,
    EXACT_MATCH,
    EXAMPLES,
    FOLDS,
    LOSS,
    METRICS,
    SECONDS,
    TRAIN,
    WER,
    WHICH,
    Identity,
    Order,
    largest_reply,
    metric,
    order_message,
    pack_folds,
    pack_state,
    reason_of,
    size_of,
)
from strategies.rounds import Exchange
from strategies.shared import Shared
from strategies.shares import Shares

Tell = Callable[..., None]


class FedSB(Shares, Strategy):
    """Flower strategy for Fed-SB.

    Args:
        config: the run.
        layout: names and shapes of the state that the server keeps.
        shared: the basis, and who has which of it.
        roster: node id → client name, kept up to date by the server; who is left out goes from it.
        strikes: refused replies so far.
        error: measures the aggregation error on the real matrices; None for a method whose updates the server never sees.
        tell: called with an event's name and fields, for the journal.
    """

    vectors: ClassVar[int] = 1  # of the size of a state, in a reply

    def __init__(
        self,
        config: RunConfig,
        layout: Layout,
        shared: Shared,
        roster: MutableMapping[int, str],
        strikes: Strikes,
        error: AggregationError | None,
        tell: Tell,
    ) -> None:
        super().__init__(config, layout)
        self.shared, self.method, self.scale = shared, METHODS[config.adapter.method], scale_of(config)
        self.roster, self.strikes, self.error, self.tell = roster, strikes, error, tell
        self.private = config.privacy.unit != "none"
        self.score_names = {"loss": LOSS, "exact_match": EXACT_MATCH} | ({"wer": WER} if config.model.kind == "speech" else {})
        self.stream = KeyStream()
        self.exchanges: list[Exchange] = []  # of the round, besides that of training
        self.memory: dict[str, Tensor] = {}  # what a strategy remembers from round to round; a checkpoint holds it
        self.notes: dict[str, Any] = {}  # the same, as JSON

    @property
    def basis(self) -> str:
        """Fingerprint of the basis as it is now."""
        return self.shared.basis.fingerprint

    def order(self, server_round: int, which: str = "", members: int = 0) -> Order:
        """What clients are told in a round."""
        return Order(self.config.to_json(), server_round, self.basis, which, members=members)

    def question(self, node: int, kind: str, order: Order, arrays: ArrayRecord | None = None) -> Message:
        """A message to one node, with what it lacks of the basis."""
        before, folds = self.shared.lacks(self.roster.get(node, ""))
        if not folds:
            return order_message(node, kind, order, arrays)
        message = order_message(node, kind, dataclasses.replace(order, before=before), arrays)
        message.content[FOLDS] = pack_folds(folds)
        return message

    def sample(self, server_round: int) -> tuple[list[int], int]:
        """Nodes of the clients drawn for a round, and how many usable replies are wanted of them.

        Drawn by name and seed, so independent of node ids and order of arrival. With privacy by client and a fraction below 1
        each client is drawn by itself and from the operating system's chance: a sample that others know amplifies nothing.
        """
        by_name = sorted((name, node) for node, name in self.roster.items())
        federation = self.config.federation
        if self.config.privacy.unit == "client":
            poisson = self.stream.poisson_sample(len(by_name), federation.fraction)
            return [by_name[i][1] for i in poisson], len(poisson)
        share = math.ceil(round(federation.fraction * len(by_name), 9))  # 0.07 of 100 clients is 7, whatever floats say
        wanted = min(max(federation.min_clients, share), len(by_name))
        asked = min(math.ceil(round(federation.over_sample * wanted, 9)), len(by_name))
        drawn = random.Random(f"{self.config.seed}:sample:{server_round}").sample(by_name, asked)
        return [node for _, node in sorted(drawn[:wanted]) + sorted(drawn[wanted:])], wanted

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """The global state to every client drawn for this round."""
        nodes, self.wanted = self.sample(server_round)
        turn = self.config.turn(server_round) if self.method.in_turn else None
        self.expect(arrays, round_plan(self.config, server_round), self.config.federation.wire_dtype, turn)
        order = self.order(server_round)
        return [self.question(node, TRAIN, order, self.sent_to(self.roster[node], arrays, server_round)) for node in nodes]

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The exact mean of the cores that pass their checks; None if fewer than `min_clients` do.

        Where more were asked than are wanted, no reply is looked at once the wanted number has passed.
        """
        if self.config.privacy.unit == "client":
            return self._aggregate_private(server_round, replies)
        federation = self.config.federation
        mean, losses = self.mean(), Mean(1)
        kept: list[tuple[Tensor, float]] = []  # by methods that need them one by one
        if self.error:
            self.error.start()
        for client, reply in self.accepted(server_round, replies, vectors=self.vectors):
            try:
                examples, loss, seconds = self.told(reply)
                check_weight(examples)
                vector, norm = self.usable(client, reply)
                self.also(client, reply)
            except ReplyError as error:
                self.refuse(server_round, client, error)
                continue
            counted = min(examples, federation.max_examples or examples)
            weight = float(counted) if federation.weighting == "examples" else 1.0
            index = self.returned(client).index
            mean.add(vector, weight, index)
            losses.add(vector.new_tensor([loss]), weight)
            if self.method.fold:
                kept.append((vector, weight))
            if self.error:
                whole = vector if self.method.in_turn else padded(vector, index)  # heads that did not learn are as they were
                self.error.add(self.layout.unflatten(whole), weight)
            told = {} if self.private else {"examples": examples, "loss": loss, "seconds": seconds}
            self.tell("reply", round=server_round, client=client, norm=norm, **told)
            if federation.over_sample > 1 and mean.count == self.wanted:
                break
        if mean.count < federation.min_clients:
            return None, None
        average = self._fold(server_round, kept, mean.result(self.sent))
        distance = self.distance(average)
        metrics = MetricRecord({LOSS: float(losses.result()), "aggregation-error": distance, "clients": mean.count})
        return pack_state(self.step(average, server_round, mean.held), federation.wire_dtype), metrics

    def mean(self) -> Aggregate:
        """What makes one state of a round's states, empty."""
        return mean_of(self.config.adapter.method, self.layout)

    def also(self, client: str, reply: Message) -> None:
        """Take what else a strategy has in a reply whose state counts. Raises ReplyError, before it does, if that must not."""

    def step(self, average: Tensor, server_round: int, held: Tensor | None = None) -> Tensor:
        """The new global state (size,), of a round's mean; this is called once a round that counts.

        `held`: which numbers (size,) came back from somebody; None: all did.
        """
        return average

    def distance(self, average: Tensor) -> float:
        """The aggregation error of a round's mean in the dtype in which it travels; NaN where it is not meant to be the mean of
        updates, or the server sees none."""
        if self.error is None:
            return math.nan
        return self.error.result(self.layout.unflatten(average.to(DTYPES[self.config.federation.wire_dtype])))

    def _fold(self, server_round: int, clients: Sequence[tuple[Tensor, float]], mean: Tensor) -> Tensor:
        """The state that goes out next: the mean; or, where the method folds something into the weights, what is left."""
        if self.method.fold is None:
            return mean
        states, average = [(self.layout.unflatten(vector), weight) for vector, weight in clients], self.layout.unflatten(mean)
        fold = fold_of(self.method.fold, states, average, self.scale)
        if any(u.shape[1] for u, _ in fold.values()):  # one client alone leaves nothing
            self.shared.fold(fold)
            if self.error:
                self.error.fold(fold)
        if self.method.restarts:
            average = restarted(self.layout, self.config.seed, server_round, average)
        return self.layout.flatten(average)

    def _aggregate_private(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord, MetricRecord]:
        """The mean under privacy by client. However few answer there is one, since how many do is private."""
        federation, mechanism = self.config.federation, mechanism_of(self.config, self.config.federation.clients)
        mean = PrivateMean(self.sent, mechanism, federation.fraction * federation.clients, self.stream)
        for client, reply in self.accepted(server_round, replies):
            try:
                vector, norm = self.usable(client, reply)
            except ReplyError as error:
                self.refuse(server_round, client, error)
                continue
            mean.add(vector)
            self.tell("reply", round=server_round, client=client, norm=norm)
        record = pack_state(self.step(mean.result(), server_round), federation.wire_dtype)
        return record, MetricRecord({LOSS: math.nan, "aggregation-error": math.nan, "clients": mean.count})

    def told(self, reply: Message) -> tuple[float, float, float]:
        """Examples, loss and seconds of a reply. With privacy a client tells none of them: (1, NaN, NaN)."""
        if self.private:
            return 1, math.nan, math.nan
        return metric(reply, EXAMPLES), metric(reply, LOSS), metric(reply, SECONDS)

    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """The question `config["which"]` (some of base, global, personal, with commas) to every client in one message each;
        the state goes along only where `global` is asked."""
        which = str(config["which"])
        order, told = self.order(server_round, which), "global" in which.split(",")
        return [
            self.question(node, EVALUATE, order, self.sent_to(name, arrays, server_round + 1) if told else None)
            for name, node in sorted((n, i) for i, n in self.roster.items())
        ]

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Means over all test examples, such as `global-loss` and `global-exact-match`; and `n`, how many they are."""
        scores = dict(self.scores(server_round, replies))
        means: dict[str, float] = {}
        for which in WHICH:
            own = [score[which] for score in scores.values() if which in score]
            total = sum(score["n"] for score in own)
            for key, name in self.score_names.items():
                if total:
                    means[f"{which}-{name}"] = sum(score[key] * score["n"] for score in own) / total
        examples = sum(next(iter(score.values()))["n"] for score in scores.values())
        return MetricRecord({**means, "n": examples}) if means else None

    def scores(self, server_round: int, replies: Iterable[Message]) -> Iterator[tuple[str, dict[str, dict[str, Any]]]]:
        """Each client's own scores: its name, and base | global | personal → loss, exact_match, n, task; of recordings wer."""
        for client, reply in self.accepted(server_round, replies, 0):
            try:
                n, task = metric(reply, EXAMPLES), Identity.of(reply).task
                check_weight(n)
                told = [which for which in WHICH if f"{which}-{LOSS}" in reply.content[METRICS]]
                score = {
                    which: {key: metric(reply, f"{which}-{name}") for key, name in self.score_names.items()}
                    | {"n": n, "task": task}
                    for which in told
                }
                if not score:
                    raise ReplyError("left out all scores")
            except ReplyError as error:
                self.refuse(server_round, client, error)
                continue
            yield client, score

    def accepted(
        self, server_round: int, replies: Iterable[Message], numbers: int | None = None, vectors: int = 1
    ) -> Iterator[tuple[str, Message]]:
        """The replies that answer this round's question, with their clients' names; the others are refused and named.

        `numbers`: how many the state in a reply has, by default those of `returned`, `vectors` times; 0 if there is to be none.
        """
        answered: set[str] = set()
        for reply in replies:
            client = self.roster.get(reply.metadata.src_node_id, f"node {reply.metadata.src_node_id}")
            try:
                if reply.has_error():  # also a refusal by the site's policy: no strike, since nothing false was said
                    self.tell("refused", round=server_round, client=client, reason=f"failed: {reason_of(reply.error)}")
                    continue
                size = vectors * self.returned(client).layout.size if numbers is None else numbers
                check_size(size_of(reply), largest_reply(size, self.dtype if size else "fp32"))
                identity = Identity.of(reply)
                check_equal("client", identity.client, client)
                check_equal("round", identity.round, server_round)
                check_equal("basis", identity.basis, self.basis)
                check_equal("layout", identity.layout, self.share(client).layout.fingerprint)
                if client in answered:
                    raise ReplyError("answered twice")
            except ReplyError as error:
                self.refuse(server_round, client, error)
                continue
            answered.add(client)
            self.shared.has_all(client)
            yield client, reply

    def refuse(self, server_round: int, client: str, error: ReplyError) -> None:
        """Write down whose reply was refused, and why. After too many of them the client goes from the roster."""
        self.tell("refused", round=server_round, client=client, reason=str(error))
        nodes = [node for node, name in self.roster.items() if name == client]
        if nodes:
            self.strikes.add(client)
        if nodes and self.strikes.out(client):
            for node in nodes:
                del self.roster[node]
            self.tell("left-out", round=server_round, client=client, refused=self.strikes.counts[client])

    def summary(self) -> None:
        """Nothing to log: the journal tells it."""
