"""Clients that do harm in whole runs: the final core is that of the run without them, whatever they do and whenever."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, Message

from fedsb.config import RunConfig
from fedsb.deploy.home import Admitted, Home
from fedsb.report.journal import Journal
from server.local_grid import FIRST_NODE
from strategies.records import ALLOWANCE, EXAMPLES, pack_state, unpack_state
from tests.federation.bench import Desk, vectors
from tests.federation.tiny import config_of, equal, events, federate, final_state, personal_states, table
from tests.federation.twisted import Twist, Twisted, failure, twisted

MEMBERS = {"client-0", "client-2"}


def _by_one(change: Callable[[Message], Message], *, kind: str = "train", rounds: Iterable[int] = range(1, 99)) -> Twist:
    """Client-1's replies of a kind, in some rounds, changed; all others as they are."""

    def twist(asked: str, client: int, reply: Message) -> list[Message]:
        said = reply.content.config_records["identity"]["round"] if reply.has_content() else 0
        return [change(reply) if (asked, client) == (kind, 1) and said in set(rounds) else reply]

    return twist


def _scaled(factor: float, dtype: Any = "fp32") -> Callable[[Message], Message]:
    def scale(reply: Message) -> Message:
        reply.content["arrays"] = pack_state(factor * unpack_state(reply.content["arrays"]), dtype)
        return reply

    return scale


def _poisoned(reply: Message) -> Message:
    reply.content["arrays"] = pack_state(torch.full((224,), torch.nan), "fp32")
    return reply


def _refused(folder: Path) -> list[tuple[int, str]]:
    return [(event["round"], event["client"]) for event in events(folder, "refused")]


def _kinds(grid: Twisted, client: int) -> list[str]:
    return [kind for kind, number in grid.asked if number == client]


@pytest.mark.parametrize("wire", ["fp32", "bf16"])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_hundred_times_the_norm_counts_in_no_round(number: int, wire: str, llama: str, words: str, tmp_path: Path) -> None:
    config = config_of(table(llama, words, federation={"wire_dtype": wire}, personal={"steps": 0}))
    hostile, without = tmp_path / "hostile", tmp_path / "without"
    federate(config, hostile, grid=twisted(config, hostile, _by_one(_scaled(100, wire), rounds=[number])))
    federate(config, without, grid=twisted(config, without, _by_one(failure, rounds=[number])))
    assert _refused(hostile) == _refused(without) == [(number, "client-1")]
    assert "moved a number by" in events(hostile, "refused")[0]["reason"]
    assert equal(final_state(hostile), final_state(without))


@pytest.mark.parametrize("wire", ["fp32", "bf16"])
def test_honest_clients_are_within_the_bound_and_near_it(wire: str, llama: str, words: str, out: Path) -> None:
    """Else the test above would show nothing, or honest work would be refused."""
    config = config_of(table(llama, words, federation={"wire_dtype": wire}))
    federate(config, out, grid=twisted(config, out, _by_one(_scaled(1.5, wire), rounds=[1])))
    assert _refused(out) == [(1, "client-1")]
    assert all(event["norm"] > 0 for event in events(out, "reply"))


def test_a_personal_adapter_beyond_its_steps_is_not_published(llama: str, words: str, tmp_path: Path) -> None:
    config = config_of(table(llama, words, federation={"rounds": 1}))
    hostile, honest = tmp_path / "hostile", tmp_path / "honest"
    summary = federate(config, hostile, grid=twisted(config, hostile, _by_one(_scaled(100), kind="train.personalise")))
    federate(config, honest)
    assert _refused(hostile) == [(1, "client-1")]
    mine, others = personal_states(hostile), personal_states(honest)
    assert mine.keys() == MEMBERS and all(equal(mine[name], others[name]) for name in MEMBERS)
    assert {"client-0", "client-1", "client-2"} == summary["evaluation"]["global"].keys()


def test_a_personal_core_of_no_steps_is_the_global_one(llama: str, words: str, out: Path) -> None:
    config = config_of(table(llama, words, federation={"rounds": 1}, personal={"steps": 0}))
    federate(config, out, grid=twisted(config, out, _by_one(_scaled(1.001), kind="train.personalise")))
    assert _refused(out) == [(1, "client-1")] and personal_states(out).keys() == MEMBERS


@pytest.mark.parametrize("kind", ["query.prepare", "train", "train.personalise", "evaluate"])
def test_a_reply_larger_than_any_answer_is_not_decoded(kind: str, llama: str, words: str, tmp_path: Path) -> None:
    def bloat(reply: Message) -> Message:
        reply.content["arrays"] = ArrayRecord({"state": Array("float32", (224,), "what is decoded is refused", b"\0" * 10**6)})
        return reply

    config = config_of(table(llama, words, federation={"rounds": 1}))
    hostile, without = tmp_path / "hostile", tmp_path / "without"
    summary = federate(config, hostile, grid=twisted(config, hostile, _by_one(bloat, kind=kind, rounds=[0, 1])))
    federate(config, without, grid=twisted(config, without, _by_one(failure, kind=kind, rounds=[0, 1])))
    (event,) = events(hostile, "refused")
    assert event["client"] == ("node 3" if kind == "query.prepare" else "client-1")
    most = ALLOWANCE + (4 * 224 if kind.startswith("train") else 0)
    assert event["reason"].startswith("sent 1,000,") and event["reason"].endswith(f"an answer has {most:,} at the most")
    assert equal(final_state(hostile), final_state(without))
    assert personal_states(hostile).keys() == (
        MEMBERS if kind in ("query.prepare", "train.personalise") else MEMBERS | {"client-1"}
    )
    assert ("client-1" in summary["evaluation"]["global"]) == (kind in ("train", "train.personalise"))


def test_who_claims_a_world_of_examples_does_not_take_over_the_mean() -> None:
    """2^28 examples count as `max_examples` many; without that setting they are all the mean there is."""

    def mean(claim: int, **federation: Any) -> torch.Tensor:
        desk, sent = Desk(2, **federation), vectors(2)
        replies = [desk.reply(q, v, {EXAMPLES: n}) for q, v, n in zip(desk.questions(), sent, (20, claim), strict=True)]
        arrays, _ = desk.aggregate(replies)
        assert arrays is not None and not desk.refused
        assert [event["examples"] for event in desk.events] == [20, claim]
        return unpack_state(arrays)

    assert torch.equal(mean(2**28, max_examples=30), mean(30))
    assert torch.equal(mean(2**28, max_examples=10), mean(20))  # the other has more than 10 as well
    assert not torch.allclose(mean(2**28), mean(30), atol=1e-2)


def test_a_norm_of_the_operators_choice(llama: str, words: str, tmp_path: Path) -> None:
    """Between what the clients' updates are: the larger ones are refused, the smaller ones count."""
    free = config_of(table(llama, words, federation={"rounds": 1, "strikes": 0}))
    federate(free, tmp_path / "free")
    norms = {event["client"]: event["norm"] for event in events(tmp_path / "free", "reply")}
    smallest, middle, largest = sorted(norms, key=lambda client: norms[client])
    bound = (norms[middle] + norms[largest]) / 2
    bounded = config_of(
        table(llama, words, federation={"rounds": 1, "strikes": 0, "max_update_norm": bound}, personal={"steps": 0})
    )
    federate(bounded, tmp_path / "bounded")
    assert _refused(tmp_path / "bounded") == [(1, largest)]
    assert "where federation.max_update_norm =" in events(tmp_path / "bounded", "refused")[0]["reason"]
    assert {event["client"] for event in events(tmp_path / "bounded", "reply")} == {smallest, middle}


def test_after_its_strikes_a_client_is_left_out(llama: str, words: str, tmp_path: Path) -> None:
    """No more messages, no score and no personal adapter; the core is that of the run in which it never answered."""
    config = config_of(table(llama, words, federation={"rounds": 4, "strikes": 2}))
    hostile, without = tmp_path / "hostile", tmp_path / "without"
    grid = twisted(config, hostile, _by_one(_poisoned))
    summary = federate(config, hostile, grid=grid)
    federate(config, without, grid=twisted(config, without, _by_one(failure)))
    assert _refused(hostile) == [(1, "client-1"), (2, "client-1")]
    (left,) = events(hostile, "left-out")
    assert (left["round"], left["client"], left["refused"]) == (2, "client-1", 2)
    assert _kinds(grid, 1) == ["query.prepare", "train", "train"]
    assert _kinds(grid, 0) == ["query.prepare", *["train"] * 4, "train.personalise", "evaluate"]
    assert equal(final_state(hostile), final_state(without))
    assert personal_states(hostile).keys() == summary["evaluation"]["base"].keys() == MEMBERS
    assert summary["clients"] == 2


@pytest.mark.parametrize("change", [_poisoned, failure], ids=["no limit", "failures"])
def test_without_a_limit_and_for_failures_nobody_is_left_out(
    change: Callable[[Message], Message], llama: str, words: str, out: Path
) -> None:
    """A site that fails, or whose policy refuses, says nothing false, and its error comes at once: it holds nothing up."""
    config = config_of(table(llama, words, federation={"strikes": 0 if change is _poisoned else 1}))
    summary = federate(config, out, grid=twisted(config, out, _by_one(change)))
    assert _refused(out) == [(number, "client-1") for number in (1, 2, 3)]
    assert not events(out, "left-out") and summary["clients"] == 3
    assert "client-1" in personal_states(out)


def test_silence_is_no_strike(llama: str, words: str, out: Path) -> None:
    def silent(kind: str, client: int, reply: Message) -> list[Message]:
        return [] if (kind, client) == ("train", 1) else [reply]

    config = config_of(table(llama, words, federation={"rounds": 2, "strikes": 1, "round_seconds": 0.01}))
    federate(config, out, grid=twisted(config, out, silent))
    assert [(event["round"], event["client"]) for event in events(out, "silent")] == [(1, "client-1"), (2, "client-1")]
    assert not events(out, "left-out") and "client-1" in personal_states(out)


class Killed(BaseException):
    """Stands for kill -9."""


def _killed_at(event: str, number: int, config: RunConfig, out: Path, twist: Twist, *, home: Path | str = "") -> None:
    """A run that ends when an event of round `number` has been written down."""
    original = Journal.tell

    def tell(self: Journal, name: str, **fields: Any) -> None:
        original(self, name, **fields)
        if (name, fields.get("round")) == (event, number):
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "tell", tell)
        with pytest.raises(Killed):
            federate(config, out, grid=twisted(config, out, twist), home=home)


def test_strikes_are_remembered_when_a_run_is_resumed(llama: str, words: str, tmp_path: Path) -> None:
    """A round that is repeated counts once: killed in round 2, after the second refusal, the third one is that of round 3."""
    config = config_of(table(llama, words, federation={"rounds": 4}))
    whole, out = tmp_path / "whole", tmp_path / "run"
    federate(config, whole, grid=twisted(config, whole, _by_one(_poisoned)))
    _killed_at("refused", 2, config, out, _by_one(_poisoned))
    federate(config, out, resume=True, grid=twisted(config, out, _by_one(_poisoned)))
    assert _refused(out) == [(number, "client-1") for number in (1, 2, 2, 3)]
    assert [event["round"] for event in events(out, "left-out")] == [3]
    assert equal(final_state(out), final_state(whole)) and personal_states(out).keys() == MEMBERS


def test_who_was_left_out_stays_so_when_a_run_is_resumed(llama: str, words: str, tmp_path: Path) -> None:
    """In a simulation it must be asked who it is; where nodes are admitted by name, it is asked nothing."""
    config, out = config_of(table(llama, words, federation={"strikes": 1})), tmp_path / "run"
    _killed_at("round", 2, config, out, _by_one(_poisoned))
    grid = twisted(config, out, _by_one(_poisoned))
    federate(config, out, resume=True, grid=grid)
    assert _kinds(grid, 1) == ["query.prepare"]
    assert events(out, "refused")[-1]["reason"] == "is client-1, which was left out of this run"
    home, again = Home(tmp_path / "home"), tmp_path / "again"
    home.write_admitted({f"client-{i}": Admitted(node=str(i + FIRST_NODE), key_sha256="", since="") for i in range(3)})
    _killed_at("round", 2, config, again, _by_one(_poisoned), home=home.folder)
    grid = twisted(config, again, _by_one(_poisoned))
    federate(config, again, resume=True, grid=grid, home=home.folder)
    assert _kinds(grid, 1) == []
    assert personal_states(out).keys() == personal_states(again).keys() == MEMBERS


def test_a_mended_client_is_taken_back_on_resume_with_other_strikes(llama: str, words: str, out: Path) -> None:
    config = config_of(table(llama, words, federation={"strikes": 1}))
    _killed_at("round", 2, config, out, _by_one(_poisoned))
    kinder = config.model_copy(update={"federation": config.federation.model_copy(update={"strikes": 9})})
    summary = federate(kinder, out, resume=True)
    assert [entry["clients"] for entry in summary["history"]] == [2, 2, 3]
    assert "client-1" in personal_states(out)


class Slow(Twisted):
    """A grid on which only some clients, by number, have answered yet."""

    quick: set[int]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        wanted = [i for i in message_ids if self._pending[i].metadata.message_type != "train" or self._quick(i)]
        yield from super().pull_messages(wanted)

    def _quick(self, message_id: str) -> bool:
        return self._pending[message_id].metadata.dst_node_id - FIRST_NODE in self.quick


def _slow(config: RunConfig, out: Path, quick: set[int], twist: Twist = lambda kind, client, reply: [reply]) -> Slow:
    grid = twisted(config, out, twist)
    grid.__class__ = Slow
    grid.quick = quick  # type: ignore[attr-defined]
    return grid  # type: ignore[return-value]


MORE = {"clients": 4, "rounds": 2, "fraction": 0.5, "over_sample": 2.0}


def test_a_round_of_more_clients_than_wanted_ends_with_the_wanted_replies(llama: str, words: str, tmp_path: Path) -> None:
    """Two of four are wanted: the round does not wait its 3600 s for the others, and names them."""
    config, out = config_of(table(llama, words, federation=MORE)), tmp_path / "run"
    grid = _slow(config, out, {1, 3})
    summary = federate(config, out, grid=grid)
    assert [client for kind, client in grid.asked if kind == "train"].count(0) == 2
    assert {(event["round"], event["client"]) for event in events(out, "reply")} == {
        (n, f"client-{i}") for n in (1, 2) for i in (1, 3)
    }
    assert {(event["round"], event["client"]) for event in events(out, "late")} == {
        (n, f"client-{i}") for n in (1, 2) for i in (0, 2)
    }
    assert not events(out, "silent") and not events(out, "refused") and not events(out, "left-out")
    assert [entry["clients"] for entry in summary["history"]] == [2, 2] and len(personal_states(out)) == 4
    all_fail = config_of(table(llama, words, federation={"clients": 4, "rounds": 2}))

    def without(kind: str, client: int, reply: Message) -> list[Message]:
        return [failure(reply)] if kind == "train" and client in (0, 2) else [reply]

    federate(all_fail, tmp_path / "two", grid=twisted(all_fail, tmp_path / "two", without))
    assert equal(final_state(out), final_state(tmp_path / "two"))


def test_a_refused_reply_is_none_of_the_wanted_ones(llama: str, words: str, out: Path) -> None:
    config = config_of(table(llama, words, federation=MORE))
    federate(config, out, grid=_slow(config, out, {0, 1, 3}, _by_one(_poisoned)))
    assert {event["client"] for event in events(out, "reply")} == {"client-0", "client-3"}
    assert [event["clients"] for event in events(out, "round")] == [2, 2]
    (spoilt,) = {number for number, _ in _refused(out)}  # of the other round it was cut off
    assert [event["client"] for event in events(out, "late") if event["round"] == spoilt] == ["client-2"]
