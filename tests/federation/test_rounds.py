"""Waits that end, samples that depend on names and seed alone, and the loop itself."""

import contextlib
import random
import time
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from hypothesis import given
from hypothesis import strategies as st

from fedsb.errors import FederationError
from server.local_grid import LocalGrid
from strategies import rounds
from strategies.records import bytes_of, pack_state
from strategies.rounds import Exchange, RoundResult, Traffic, run_rounds, wait_for_nodes
from tests.federation.bench import START, Desk, vectors
from tests.federation.echo import app


class Slow(LocalGrid):
    """A grid on which node n answers with the n-th pull, and the nodes in `never` not at all."""

    never: frozenset[int] = frozenset()
    pulls = 0

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        self.pulls += 1
        due = [i for i in message_ids if (node := self._pending[i].metadata.dst_node_id) <= self.pulls and node not in self.never]
        return super().pull_messages(due)


def _slow(clients: int, never: Iterable[int] = ()) -> Slow:
    grid = Slow(app, [{}] * clients)
    grid.never = frozenset(never)
    return grid


def _questions(clients: int) -> list[Message]:
    return [Message(RecordDict({"arrays": START}), node, "train") for node in range(2, 2 + clients)]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "POLL_SECONDS", 0.001)


def test_replies_come_one_by_one_and_every_byte_is_counted() -> None:
    exchange, questions = Exchange(_slow(3), 10), _questions(3)
    replies = list(exchange(questions))
    assert [reply.metadata.src_node_id for reply in replies] == [2, 3, 4]
    assert exchange.traffic == Traffic(0, sum(map(bytes_of, replies)), sum(map(bytes_of, questions)))
    assert exchange.silent == []


def test_who_does_not_answer_in_time_is_named_and_not_waited_for() -> None:
    exchange = Exchange(_slow(4, never=[3, 5]), 0.2)
    started, questions = time.monotonic(), _questions(4)
    replies = list(exchange(questions))
    assert {question.metadata.ttl for question in questions} == {0.2 + rounds.LATE_SECONDS}  # nor asked much later
    assert [reply.metadata.src_node_id for reply in replies] == [2, 4]
    assert exchange.silent == [3, 5]
    assert 0.2 <= time.monotonic() - started < 5


def test_a_reply_that_has_arrived_counts_however_long_the_ones_before_it_took() -> None:
    """A simulation of an hour's round must not lose the clients that happen to be computed last."""
    grid = LocalGrid(app, [{}] * 3)
    exchange, seen = Exchange(grid, 0.01), []
    for reply in exchange(_questions(3)):
        time.sleep(0.02)
        seen.append(reply.metadata.src_node_id)
    assert seen == [2, 3, 4] and exchange.silent == []


def test_a_reply_to_another_message_is_dropped() -> None:
    class Gossip(LocalGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
            for reply in super().pull_messages(message_ids):
                stray = Message(RecordDict(), reply_to=reply)
                yield stray
                yield reply
                yield reply

    exchange = Exchange(Gossip(app, [{}] * 2), 10)
    assert len(list(exchange(_questions(2)))) == 2


def test_who_has_not_answered_when_enough_have_is_late_and_not_silent() -> None:
    exchange, questions = Exchange(_slow(4, never=[3]), 100), _questions(4)
    with contextlib.closing(exchange(questions)) as replies:
        heard = [next(replies).metadata.src_node_id, next(replies).metadata.src_node_id]
    assert heard == [2, 4]
    assert exchange.late == [3, 5] and exchange.silent == []


def test_a_node_that_flower_cannot_ask_is_silent_at_once() -> None:
    """Flower gives "" for the id of a message that it did not take, such as one for a node that has just gone."""

    class Forgetful(LocalGrid):
        def push_messages(self, messages: Iterable[Message]) -> list[str]:
            outgoing = list(messages)
            ids = iter(super().push_messages([m for m in outgoing if m.metadata.dst_node_id not in (3, 4)]))
            return ["" if m.metadata.dst_node_id in (3, 4) else next(ids) for m in outgoing]

    exchange = Exchange(Forgetful(app, [{}] * 4), 100)
    assert [reply.metadata.src_node_id for reply in exchange(_questions(4))] == [2, 5]
    assert exchange.silent == [3, 4]


def test_a_node_of_which_flower_says_that_it_is_gone_is_silent_and_what_failed_there_is_not() -> None:
    class Answering(LocalGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
            for reply in super().pull_messages(message_ids):
                codes = {3: ErrorCode.NODE_UNAVAILABLE, 4: ErrorCode.CLIENT_APP_CRASHED}
                code = codes.get(reply.metadata.src_node_id)
                if code is not None:
                    reply.metadata.__dict__["_src_node_id"] = 1  # Flower answers in its own name
                    reply.__dict__["_content"], reply.__dict__["_error"] = None, Error(code, "said by Flower")
                yield reply

    exchange = Exchange(Answering(app, [{}] * 4), 100)
    assert [(reply.metadata.src_node_id, reply.has_error()) for reply in exchange(_questions(4))] == [
        (2, False),
        (4, True),
        (5, False),
    ]
    assert exchange.silent == [3]


def test_nobody_to_ask_is_no_wait() -> None:
    assert list(Exchange(_slow(1), 100)([])) == []


def test_waiting_for_nodes_ends() -> None:
    started = time.monotonic()
    with pytest.raises(FederationError, match=r"2 clients are connected where federation.min_clients = 3 .* after waiting 0 s"):
        wait_for_nodes(_slow(2), 3, 0.1)
    assert 0.1 <= time.monotonic() - started < 5


def test_nodes_may_come_late_and_are_sorted() -> None:
    class Filling(LocalGrid):
        calls = 0

        def get_node_ids(self) -> list[int]:
            self.calls += 1
            return [9, 4, 7][: self.calls]

    assert wait_for_nodes(Filling(app, []), 3, 10) == [4, 7, 9]


def test_a_round_without_enough_replies_says_how_many_were_silent() -> None:
    desk = Desk(3, min_clients=3)
    grid = _slow(3, never=[3])
    with pytest.raises(FederationError, match=r"round 1: .* from 3 clients \(1 did not answer within 0 s\)"):
        run_rounds(grid, desk.strategy, START, first=1, last=1, seconds=0.05, after_round=lambda result: None)


def test_the_loop_goes_from_first_to_last_and_hands_each_round_over() -> None:
    handed: list[RoundResult] = []
    asked: list[tuple[int, int]] = []

    desk = Desk(2)
    start = vectors(1)[0]

    def add_one(server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord, MetricRecord]:
        count = sum(1 for _ in replies)
        return pack_state(start + server_round, "fp32"), MetricRecord({"clients": count})

    desk.strategy.aggregate_train = add_one  # type: ignore[method-assign, assignment]
    grid = LocalGrid(app, [{}] * 2)
    last = run_rounds(
        grid,
        desk.strategy,
        pack_state(start, "fp32"),
        first=3,
        last=5,
        seconds=10,
        before_round=lambda number, clients: asked.append((number, clients)),
        after_round=handed.append,
    )
    assert asked == [(3, 2), (4, 2), (5, 2)]
    assert [result.round for result in handed] == [3, 4, 5]
    assert last is handed[-1].arrays
    assert all(result.traffic.up > 0 and result.traffic.down > 0 and result.seconds >= 0 for result in handed)


def test_no_rounds_left_returns_the_state_as_it_was() -> None:
    desk = Desk(1)
    assert run_rounds(_slow(1), desk.strategy, START, first=4, last=3, seconds=1, after_round=pytest.fail) is START


def _drawn(roster: dict[int, str], server_round: int = 1, **federation: Any) -> list[str]:
    desk = Desk(max(len(roster), 1), **federation)
    desk.strategy.roster = roster
    return [roster[node] for node in desk.strategy.sample(server_round)[0]]


@given(st.permutations(range(2, 22)), st.lists(st.integers(2, 2**62), min_size=20, max_size=20, unique=True))
def test_who_is_drawn_depends_on_names_and_seed_not_on_node_ids(order: list[int], ids: list[int]) -> None:
    names = [f"site-{i:02d}" for i in range(20)]
    expected = _drawn(dict(enumerate(names, 2)), fraction=0.3)
    assert len(expected) == 6
    assert _drawn({node: names[node - 2] for node in order}, fraction=0.3) == expected
    assert sorted(_drawn(dict(zip(ids, random.sample(names, 20), strict=True)), fraction=0.3)) == sorted(expected)


def test_another_round_or_seed_draws_others() -> None:
    roster = {i: f"site-{i:02d}" for i in range(20)}
    draws = {tuple(_drawn(roster, number, fraction=0.3)) for number in range(1, 9)}
    assert len(draws) == 8
    desk = Desk(20, fraction=0.3)
    desk.strategy.config = desk.config.model_copy(update={"seed": 99})
    assert sorted(desk.strategy.sample(1)[0]) != sorted(Desk(20, fraction=0.3).strategy.sample(1)[0])


def test_who_is_asked_beyond_the_wanted_ones_is_drawn_too() -> None:
    """In a simulation, where clients answer in the order asked, it is not always the last in the alphabet who is cut off."""
    desk = Desk(6, fraction=0.5, over_sample=1.3)
    last = set()
    for number in range(1, 41):
        nodes, wanted = desk.strategy.sample(number)
        assert (len(nodes), wanted) == (4, 3) and nodes[:3] == sorted(nodes[:3])
        last.add(nodes[-1])
    assert last == set(desk.roster)


def test_over_many_rounds_everybody_is_drawn_alike() -> None:
    roster = {i: f"site-{i:02d}" for i in range(10)}
    counts = dict.fromkeys(roster.values(), 0)
    for number in range(1, 401):
        for name in _drawn(roster, number, fraction=0.5):
            counts[name] += 1
    assert all(150 < count < 250 for count in counts.values())


@pytest.mark.parametrize(
    ("clients", "federation", "drawn"),
    [
        (100, {"fraction": 0.07}, 7),  # 0.07 * 100 is 7.000000000000001
        (10, {"fraction": 0.25}, 3),
        (10, {"fraction": 0.01}, 1),
        (10, {"fraction": 0.1, "min_clients": 4}, 4),
        (10, {"fraction": 1.0}, 10),
        (3, {"fraction": 0.9999999}, 3),
        (10, {"fraction": 0.5, "over_sample": 1.3}, 7),
        (10, {"fraction": 0.1, "over_sample": 1.1, "min_clients": 3}, 4),
        (10, {"fraction": 0.9, "over_sample": 3.0}, 10),
    ],
)
def test_how_many_are_drawn(clients: int, federation: dict[str, Any], drawn: int) -> None:
    roster = {i: f"site-{i:03d}" for i in range(clients)}
    names = _drawn(roster, **federation)
    assert len(names) == len(set(names)) == drawn


def test_every_client_is_scored_whatever_the_fraction() -> None:
    desk = Desk(6, fraction=0.1)
    questions = list(desk.strategy.configure_evaluate(3, START, ConfigRecord({"which": "global"}), desk.grid))
    assert sorted(question.metadata.dst_node_id for question in questions) == sorted(desk.roster)
    assert all("arrays" in question.content for question in questions)
