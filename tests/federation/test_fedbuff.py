"""Rounds that do not wait for the slowest."""

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from flwr.common.constant import ErrorCode

from fedsb.config import RunConfig
from fedsb.errors import ConfigError, FederationError
from fedsb.store.files import read_json
from strategies import rounds
from strategies.records import TRAIN
from tests.federation.tiny import assert_same_result, config_of, equal, events, federate, final_state, table
from tests.federation.twisted import Twisted, failure, killed_and_resumed, twisted


def config(llama: str, words: str, **sections: Any) -> RunConfig:
    strategy = {"name": "fedbuff", "concurrency": 3, "buffer": 2} | sections.pop("strategy", {})
    federation = {"clients": 4, "rounds": 5} | sections.pop("federation", {})
    return config_of(table(llama, words, strategy=strategy, federation=federation, **sections))


def _staleness(folder: Path) -> list[int]:
    return [event["staleness"] for event in events(folder, "reply")]


def test_rounds_end_with_the_buffer_and_what_is_at_work_counts_later(llama: str, words: str, out: Path) -> None:
    run = config(llama, words)
    grid = twisted(run, out, lambda kind, client, reply: [reply])
    summary = federate(run, out, grid=grid)
    assert [entry["clients"] for entry in summary["history"]] == [2] * 5 and summary["aggregation_error"] is None
    assert set(_staleness(out)) == {0, 1}
    asked = [client for kind, client in grid.asked if kind == TRAIN]
    late = events(out, "late")
    assert len(asked) == 10 + len(late) and 0 < len(late) <= 3 and {event["round"] for event in late} == {5}
    assert sum(score["loss"] for score in summary["evaluation"]["global"].values()) < sum(
        score["loss"] for score in summary["evaluation"]["base"].values()
    )


@pytest.mark.parametrize("wire", ["fp32", "bf16"])
@pytest.mark.parametrize(("rounds_done", "replies"), [(0, 0), (1, 0), (2, 1), (4, 1)])
def test_killed_and_resumed_ends_with_the_same_bits(
    rounds_done: int, replies: int, wire: str, llama: str, words: str, tmp_path: Path
) -> None:
    """What was at work is asked for again, from the states it was asked from."""
    run = config(llama, words, federation={"wire_dtype": wire})
    whole = federate(run, tmp_path / "whole")
    if rounds_done:
        killed_and_resumed(run, tmp_path / "cut", rounds=rounds_done, replies=replies)
        resumed = read_json(tmp_path / "cut" / "summary.json")
        assert [e["loss"] for e in whole["history"]] == [e["loss"] for e in resumed["history"]]
        assert_same_result(tmp_path / "whole", tmp_path / "cut")
    else:
        again = federate(run, tmp_path / "again")
        assert again["bytes"] == whole["bytes"]
        assert_same_result(tmp_path / "whole", tmp_path / "again")


def test_one_client_alone_is_local_training(llama: str, words: str, tmp_path: Path) -> None:
    alone = {"clients": 1, "rounds": 3}
    federate(config(llama, words, federation=alone, strategy={"concurrency": 1, "buffer": 1}), tmp_path / "buffered")
    federate(config_of(table(llama, words, federation=alone)), tmp_path / "plain")
    assert equal(final_state(tmp_path / "buffered"), final_state(tmp_path / "plain"))


def test_when_all_are_waited_for_it_is_the_mean(llama: str, words: str, tmp_path: Path) -> None:
    run = config(llama, words, strategy={"concurrency": 4, "buffer": 4}, personal={"steps": 0})
    federate(run, tmp_path / "buffered")
    federate(config_of(table(llama, words, federation={"clients": 4, "rounds": 5}, personal={"steps": 0})), tmp_path / "plain")
    for name, tensor in final_state(tmp_path / "plain").items():
        torch.testing.assert_close(final_state(tmp_path / "buffered")[name], tensor, rtol=1e-3, atol=1e-4)
    assert set(_staleness(tmp_path / "buffered")) == {0}


class Real(Twisted):
    """A grid like Flower's: it hands over all that has come by now at once, and once. Client 3 takes four times as long."""

    clock: int
    due: dict[str, int]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        outgoing = list(messages)
        ids = super().push_messages(outgoing)
        for message_id, message in zip(ids, outgoing, strict=True):
            self.due[message_id] = self.clock + (4 if message.metadata.dst_node_id == 5 else 1)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        self.clock += 1
        return iter(list(super().pull_messages([i for i in message_ids if self.due[i] <= self.clock])))


def _real(run: RunConfig, out: Path) -> Real:
    grid = twisted(run, out, lambda kind, client, reply: [reply])
    grid.__class__ = Real
    grid.clock, grid.due = 0, {}  # type: ignore[attr-defined]
    return grid  # type: ignore[return-value]


@pytest.mark.parametrize("most", [0, 10])
def test_a_slow_client_holds_nobody_up_and_loses_no_reply(
    most: int, llama: str, words: str, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a grid hands over several replies at once and one fills the buffer, the others count in the next round."""
    monkeypatch.setattr(rounds, "POLL_SECONDS", 0.0)
    run = config(llama, words, federation={"rounds": 12}, strategy={"concurrency": 4, "max_staleness": most})
    federate(run, out, grid=_real(run, out))
    counted = Counter(event["client"] for event in events(out, "reply"))
    assert sum(counted.values()) == 24 and not events(out, "silent")
    slow = [event["staleness"] for event in events(out, "reply") if event["client"] == "client-3"]
    refused = [event["reason"] for event in events(out, "refused") if event["client"] == "client-3"]
    if most:
        assert slow and min(slow) > 1 and not refused
    else:
        assert not slow and "where strategy.max_staleness = 0" in refused[0]
    assert not events(out, "left-out"), "slow is not false"
    asked = len(events(out, "reply")) + len(events(out, "refused")) + len(events(out, "late"))
    assert max(_staleness(out)) <= most and asked >= 24


def test_an_update_on_another_basis_or_beyond_its_steps_does_not_count(llama: str, words: str, out: Path) -> None:
    def twist(kind: str, client: int, reply: Message) -> list[Message]:
        if kind == TRAIN and client == 1:
            reply.content["identity"]["basis"] = "0" * 64
        return [reply]

    run = config(llama, words, federation={"strikes": 2})
    federate(run, out, grid=twisted(run, out, twist))
    reasons = {event["reason"] for event in events(out, "refused")}
    assert reasons and all("answered for basis" in reason for reason in reasons)
    assert "client-1" not in {event["client"] for event in events(out, "reply")}
    assert [event["client"] for event in events(out, "left-out")] == ["client-1"]


def test_where_all_fail_the_round_does(llama: str, words: str, out: Path) -> None:
    run = config(llama, words)
    with pytest.raises(FederationError, match="round 1: too few usable replies"):
        federate(run, out, grid=twisted(run, out, lambda kind, client, reply: [failure(reply) if kind == TRAIN else reply]))


def test_who_is_silent_is_not_waited_for_in_the_next_round(llama: str, words: str, out: Path) -> None:
    def twist(kind: str, client: int, reply: Message) -> list[Message]:
        return [] if (kind, client) == (TRAIN, 2) else [reply]

    run = config(llama, words, federation={"rounds": 4, "round_seconds": 0.05})
    summary = federate(run, out, grid=twisted(run, out, twist))
    assert [entry["clients"] for entry in summary["history"]] == [2] * 4
    assert {event["client"] for event in events(out, "silent")} <= {"client-2"}


@pytest.mark.parametrize("when", range(3, 9))
def test_who_was_away_once_is_asked_again_and_only_once_at_a_time(when: int, llama: str, words: str, out: Path) -> None:
    """A site that restarts: Flower says that it is not there, and it answers the next question."""
    heard: list[int] = []

    def twist(kind: str, client: int, reply: Message) -> list[Message]:
        if kind == TRAIN:
            heard.append(client)
        if kind != TRAIN or len(heard) != when:
            return [reply]
        away = failure(reply)
        away.error.__dict__["_code"] = ErrorCode.NODE_UNAVAILABLE
        return [away]

    run = config(llama, words, strategy={"concurrency": 4, "buffer": 3}, federation={"rounds": 6})
    summary = federate(run, out, grid=twisted(run, out, twist))
    assert [entry["clients"] for entry in summary["history"]] == [3] * 6
    assert len(events(out, "silent")) == 1 and not events(out, "refused") and not events(out, "left-out")
    assert {event["client"] for event in events(out, "reply")} == set(run.client_names)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"privacy": {"unit": "record", "epsilon": 1.0}}, "takes single updates"),
        ({"privacy": {"secure_sum": True}}, "takes single updates"),
        ({"federation": {"fraction": 0.5}}, "has strategy.concurrency for federation.fraction"),
        ({"federation": {"min_clients": 3}}, "federation.min_clients is more than strategy.buffer = 2"),
        ({"strategy": {"buffer": 5}}, "strategy.buffer = 5 is more than federation.clients"),
    ],
)
def test_what_cannot_be_kept_is_refused_before_training(sections: dict[str, Any], said: str) -> None:
    federation = {"weighting": "uniform"} | sections.pop("federation", {})
    with pytest.raises(ConfigError, match=f'strategy.name = "fedbuff".*{said}'):
        config("model", "jsonl:words", federation=federation, **sections)
