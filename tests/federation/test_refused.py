"""Replies that must not count: the round goes on without them, says who and why, and comes out as if they were not there."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord
from torch import Tensor

from fedsb.deploy.home import Admitted, Home
from fedsb.errors import FederationError
from server.local_grid import LocalGrid
from strategies.records import EXACT_MATCH, EXAMPLES, LOSS, RAW_BF16, SECONDS, pack_state, unpack_state
from tests.federation.bench import LAYOUT, Desk, Spoil, vectors
from tests.federation.tiny import config_of, equal, events, federate, final_state, local_grid, personal_states, table
from tests.federation.twisted import failure, twisted


def _saved(numbers: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, numbers, allow_pickle=True)
    return buffer.getvalue()


def _array(data: bytes, stype: str = "numpy.ndarray", shape: tuple[int, ...] = (LAYOUT.size,)) -> ArrayRecord:
    return ArrayRecord({"state": Array("float32", shape, stype, data)})


def _zipped() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, state=np.zeros(3, dtype=np.float32))
    return buffer.getvalue()


def _with(vector: Tensor, place: int, number: float) -> Tensor:
    spoilt = vector.clone()
    spoilt[place] = number
    return spoilt


def _without(reply: Message, key: str) -> Message:
    del reply.content[key]
    return reply


def _instead(reply: Message, key: str, record: Any) -> Message:
    reply.content[key] = record
    return reply


def _failed(_: Desk, question: Message, vector: Tensor) -> Message:
    return Message(Error(2, "out of memory"), reply_to=question)


def _arrays(make: Callable[[Tensor], ArrayRecord]) -> Spoil:
    return lambda desk, question, vector: desk.reply(question, make(vector))


def _state(make: Callable[[Tensor], Tensor]) -> Spoil:
    return _arrays(lambda vector: pack_state(make(vector), "fp32"))


def _named(count: int) -> Callable[[Tensor], ArrayRecord]:
    return lambda v: ArrayRecord({f"layer-{i:04d}": Array(v[:1].numpy()) for i in range(count)})


def _metric(**metrics: Any) -> Spoil:
    return lambda desk, question, vector: desk.reply(question, vector, {k.replace("_", "-"): v for k, v in metrics.items()})


def _says(**identity: Any) -> Spoil:
    return lambda desk, question, vector: desk.reply(question, vector, **identity)


SPOILT: dict[str, tuple[Spoil, str]] = {
    "NaN": (_arrays(lambda v: pack_state(_with(v, 3, torch.nan), "fp32")), "NaN or infinite"),
    "infinity in the head": (_arrays(lambda v: pack_state(_with(v, -1, -torch.inf), "fp32")), "NaN or infinite"),
    "too few numbers": (_arrays(lambda v: pack_state(v[:-1], "fp32")), "shape (34,) where (35,)"),
    "too many numbers": (_arrays(lambda v: pack_state(torch.cat([v, v]), "fp32")), "shape (70,) where (35,)"),
    "one number": (_arrays(lambda v: pack_state(v[:1], "fp32")), "shape (1,)"),
    "a matrix": (_arrays(lambda v: pack_state(v[None], "fp32")), "shape (1, 35)"),
    "a number beyond its steps": (_state(lambda v: _with(v, 3, 35.0)), "moved a number by 35 where its steps can move it by 1"),
    "a head beyond its steps": (_state(lambda v: _with(v, -1, -35.0)), "moved a number by 35"),
    "100 times the norm": (_state(lambda v: 100 * v), "moved a number by"),
    "the largest number there is": (_state(lambda v: _with(v, 0, 3.4e38)), "moved a number by 3.4e+38"),
    "megabytes": (_state(lambda v: v.new_zeros(1 << 20)), "sent 4,194,"),
    "a flood of tiny arrays": (_arrays(_named(2000)), "where an answer has 65,676 at the most"),
    "a label without end": (_arrays(lambda v: _array(b"", "x" * 70_000)), "where an answer has 65,676 at the most"),
    "a shape without end": (_arrays(lambda v: _array(b"", shape=(1,) * 9_000)), "where an answer has 65,676 at the most"),
    "records without end": (
        lambda d, q, v: _instead(d.reply(q, v), "x" * 70_000, ConfigRecord()),
        "where an answer has 65,676 at the most",
    ),
    "metrics without end": (_metric(more=[1] * 9_000), "where an answer has 65,676 at the most"),
    "some tiny arrays": (_arrays(_named(5)), "['layer-0000', 'layer-0001', 'layer-0002']"),
    "long integers": (_arrays(lambda v: ArrayRecord({"state": Array(v.long().numpy())})), "int64"),
    "bf16": (_arrays(lambda v: pack_state(v, "bf16")), "bfloat16 where float32"),
    "fp64": (_arrays(lambda v: ArrayRecord({"state": Array(v.double().numpy())})), "float64"),
    "fp16": (_arrays(lambda v: ArrayRecord({"state": Array(v.half().numpy())})), "float16"),
    "integers": (_arrays(lambda v: ArrayRecord({"state": Array(v.int().numpy())})), "int32"),
    "big-endian": (_arrays(lambda v: ArrayRecord({"state": Array(v.numpy().astype(">f4"))})), "float32"),
    "text": (_arrays(lambda v: ArrayRecord({"state": Array(np.array(["x"] * 35))})), "<U1"),
    "pickled objects": (_arrays(lambda v: _array(_saved(np.array([{}], dtype=object)))), "cannot be decoded"),
    "torn": (_arrays(lambda v: _array(_saved(v.numpy())[:-3])), "cannot be decoded"),
    "empty": (_arrays(lambda v: _array(b"")), "cannot be decoded"),
    "an archive": (_arrays(lambda v: _array(_zipped())), "NpzFile"),
    "unknown code": (_arrays(lambda v: _array(v.numpy().tobytes(), "gzip")), "cannot be decoded"),
    "torn bf16": (_arrays(lambda v: _array(v.bfloat16().view(torch.uint8).numpy().tobytes()[:-1], RAW_BF16)), "cannot be"),
    "bf16 of another shape": (_arrays(lambda v: _array(b"\0" * 68, RAW_BF16)), "cannot be decoded"),
    "another key": (_arrays(lambda v: ArrayRecord({"weights": Array(v.numpy())})), "['weights']"),
    "two arrays": (_arrays(lambda v: ArrayRecord({"state": Array(v.numpy()), "x": Array(v.numpy())})), "['state', 'x']"),
    "no array": (_arrays(lambda v: ArrayRecord()), "[]"),
    "no arrays": (lambda d, q, v: _without(d.reply(q, v), "arrays"), "no arrays"),
    "numbers for arrays": (lambda d, q, v: _instead(d.reply(q, v), "arrays", MetricRecord({"state": 1.0})), "MetricRecord"),
    "no metrics": (lambda d, q, v: _without(d.reply(q, v), "metrics"), "num-examples"),
    "no identity": (lambda d, q, v: _without(d.reply(q, v), "identity"), "does not say"),
    "half an identity": (lambda d, q, v: _instead(d.reply(q, v), "identity", ConfigRecord({"round": 1})), "does not say"),
    "a list of rounds": (
        lambda d, q, v: _instead(
            d.reply(q, v), "identity", ConfigRecord({"client": "x", "round": [1], "basis": "", "layout": "", "task": ""})
        ),
        "does not say",
    ),
    "stale round": (_says(round=0), "round 0 where 1"),
    "other basis": (_says(basis="ab" * 32), "basis abababababababab where"),
    "other layout": (_says(layout="cd" * 32), "layout cdcdcdcdcdcdcdcd where"),
    "another client's name": (_says(client="client-0"), "client client-0 where client-1"),
    "error": (_failed, "failed: out of memory"),
    "no examples": (_metric(num_examples=0), "0 as its number of examples"),
    "negative examples": (_metric(num_examples=-5), "-5 as"),
    "half an example": (_metric(num_examples=2.5), "2.5 as"),
    "too many examples": (_metric(num_examples=2**29), f"{2**29} as"),
    "a list of examples": (_metric(num_examples=[1, 2]), "[1, 2] as metric num-examples"),
    "no number of examples": (_metric(num_examples=None), "num-examples"),
    "no loss": (_metric(loss=None), "loss"),
    "NaN loss": (_metric(loss=float("nan")), "nan as metric loss"),
    "infinite loss": (_metric(loss=float("inf")), "inf as metric loss"),
    "a loss beyond all bounds": (_metric(loss=1e300), "1e+300 as metric loss"),
    "a negative loss": (_metric(loss=-0.5), "-0.5 as metric loss"),
    "negative seconds": (_metric(seconds=-1.0), "-1.0 as metric seconds"),
    "no seconds": (_metric(seconds=None), "seconds"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILT)
def test_a_bad_reply_is_named_and_left_out(name: str) -> None:
    spoil, reason = SPOILT[name]
    desk, sent = Desk(3), vectors(3)
    questions = desk.questions()
    replies = [desk.reply(q, v) for q, v in zip(questions, sent, strict=True)]
    replies[1] = spoil(desk, questions[1], sent[1])
    arrays, metrics = desk.aggregate(replies)
    assert desk.refused.keys() == {"client-1"}
    assert reason in desk.refused["client-1"]
    assert [event["client"] for event in desk.events if event["event"] == "reply"] == ["client-0", "client-2"]
    honest, expected = Desk(3), vectors(3)
    without, _ = honest.aggregate([honest.reply(honest.questions()[i], expected[i]) for i in (0, 2)])
    assert arrays is not None and without is not None and metrics is not None
    assert torch.equal(unpack_state(arrays), unpack_state(without))
    assert metrics["clients"] == 2
    json.dumps(desk.events, allow_nan=False)


def test_a_true_or_false_number_of_examples_is_no_number() -> None:
    """Flower's MetricRecord refuses a bool, but on the wire it is an integer like any other; ours refuses it anyhow."""
    desk, (vector,) = Desk(1), vectors(1)
    reply = desk.reply(desk.questions()[0], vector)
    reply.content["metrics"] = ConfigRecord({EXAMPLES: True, LOSS: 1.0, SECONDS: 1.0})
    assert desk.aggregate([reply]) == (None, None)
    assert "True as metric num-examples" in desk.refused["client-0"]


def test_the_second_of_two_answers_is_refused() -> None:
    desk, (first, second) = Desk(1), vectors(2)
    question = desk.questions()[0]
    arrays, metrics = desk.aggregate([desk.reply(question, first), desk.reply(question, second)])
    assert arrays is not None and metrics is not None and metrics["clients"] == 1
    assert torch.equal(unpack_state(arrays), first)
    assert desk.refused == {"client-0": "answered twice"}


def test_a_refused_answer_does_not_use_up_a_clients_turn() -> None:
    desk, (vector,) = Desk(1), vectors(1)
    question = desk.questions()[0]
    arrays, _ = desk.aggregate([desk.reply(question, vector, round=7), desk.reply(question, vector)])
    assert arrays is not None and torch.equal(unpack_state(arrays), vector)


def test_a_stranger_is_refused() -> None:
    desk, (vector,) = Desk(1), vectors(1)
    reply = desk.reply(desk.questions()[0], vector)
    reply.metadata.__dict__["_src_node_id"] = 99
    assert desk.aggregate([reply]) == (None, None)
    assert desk.refused.keys() == {"node 99"}


def test_too_few_usable_replies_are_no_round() -> None:
    desk, sent = Desk(3, min_clients=3), vectors(3)
    replies = [desk.reply(q, v) for q, v in zip(desk.questions(), sent, strict=True)]
    assert desk.aggregate(replies[:2]) == (None, None)


def test_a_bad_score_is_named_and_left_out() -> None:
    desk = Desk(4)
    questions = list(
        desk.strategy.configure_evaluate(3, pack_state(vectors(1)[0], "fp32"), ConfigRecord({"which": "base"}), desk.grid)
    )
    assert all("arrays" not in question.content for question in questions)
    loss, exact = f"base-{LOSS}", f"base-{EXACT_MATCH}"
    numbers: list[dict[str, Any]] = [
        {loss: 1.5, exact: 0.5},
        {loss: 1.5, exact: float("nan")},
        {loss: 1.5, exact: 0.5, EXAMPLES: 0},
        {f"other-{LOSS}": 1.0},
    ]
    replies = [desk.reply(q, None, m) for q, m in zip(questions, numbers, strict=True)]
    scores = dict(desk.strategy.scores(3, replies))
    assert scores == {"client-0": {"base": {"loss": 1.5, "exact_match": 0.5, "n": 10, "task": ""}}}
    assert desk.refused.keys() == {"client-1", "client-2", "client-3"}
    assert desk.refused["client-3"] == "left out all scores"


def test_a_whole_run_goes_on_without_a_client_that_always_sends_nan(llama: str, words: str, tmp_path: Path) -> None:
    """Round after round, and as if it had never been asked; it is still scored, and gets no personal adapter."""
    config = config_of(table(llama, words, federation={"strikes": 0}))

    def poison(kind: str, client: int, reply: Message) -> list[Message]:
        if client == 1 and kind.startswith("train"):
            reply.content["arrays"] = pack_state(torch.full((224,), torch.nan), "fp32")
        return [reply]

    def drop(kind: str, client: int, reply: Message) -> list[Message]:
        return [failure(reply)] if client == 1 and kind == "train" else [reply]

    poisoned, without = tmp_path / "poisoned", tmp_path / "without"
    summary = federate(config, poisoned, grid=twisted(config, poisoned, poison))
    federate(config, without, grid=twisted(config, without, drop))
    assert summary["trainable_parameters"] == 224
    assert equal(final_state(poisoned), final_state(without))
    assert [(e["round"], e["client"]) for e in events(poisoned, "refused")] == [(n, "client-1") for n in (1, 2, 3, 3)]
    assert {e["reason"] for e in events(poisoned, "refused")} == {"sent NaN or infinite numbers"}
    assert personal_states(poisoned).keys() == {"client-0", "client-2"}
    assert [entry["clients"] for entry in summary["history"]] == [2, 2, 2]
    assert {"client-0", "client-1", "client-2"} == summary["evaluation"]["global"].keys()


def test_a_reply_that_comes_twice_counts_once(llama: str, words: str, tmp_path: Path) -> None:
    config = config_of(table(llama, words, federation={"rounds": 2}))
    once, twice = tmp_path / "once", tmp_path / "twice"
    expected = federate(config, once)
    summary = federate(config, twice, grid=twisted(config, twice, lambda kind, client, reply: [reply, reply]))
    assert equal(final_state(once), final_state(twice))
    assert summary["bytes"] == expected["bytes"]


def test_too_few_clients_end_the_run_and_leave_its_events(llama: str, words: str, out: Path) -> None:
    config = config_of(table(llama, words, federation={"min_clients": 3}))

    def fail(kind: str, client: int, reply: Message) -> list[Message]:
        return [failure(reply, "no memory")] if client == 2 and kind == "train" else [reply]

    with pytest.raises(FederationError, match=r"round 1: too few usable replies from 3 clients.*events.jsonl.*--resume"):
        federate(config, out, grid=twisted(config, out, fail))
    assert [(e["client"], e["reason"]) for e in events(out, "refused")] == [("client-2", "failed: no memory")]
    assert not (out / "checkpoints").exists()
    federate(config, out, resume=True)
    assert [entry["clients"] for entry in events(out, "round")] == [3, 3, 3]


def test_an_error_that_flower_itself_sends_is_named_after_the_client(llama: str, words: str, out: Path) -> None:
    """For a node that is gone, Flower answers in its own name (node 1)."""
    config = config_of(table(llama, words, federation={"rounds": 1}))

    def gone(kind: str, client: int, reply: Message) -> list[Message]:
        if client != 1 or kind != "train":
            return [reply]
        error = failure(reply, "Node unavailable")
        error.metadata.__dict__["_src_node_id"] = 1
        return [error]

    federate(config, out, grid=twisted(config, out, gone))
    assert [e["client"] for e in events(out, "refused")] == ["client-1"]


@pytest.mark.parametrize("name", ["client-0", "../escape", "", "Hospital A", "x" * 64])
def test_a_client_needs_a_name_of_its_own(llama: str, words: str, out: Path, name: str) -> None:
    config = config_of(table(llama, words, federation={"rounds": 1}))

    def rename(kind: str, client: int, reply: Message) -> list[Message]:
        if client == 1:
            reply.content["identity"]["client"] = name
        return [reply]

    summary = federate(config, out, grid=twisted(config, out, rename))
    (refused,) = events(out, "refused")
    assert (refused["client"], refused["round"]) == ("node 3", 0) and "bears the name" in refused["reason"]
    assert summary["clients"] == 2 and personal_states(out).keys() == {"client-0", "client-2"}


def test_two_clients_of_one_name_are_one_too_few(llama: str, words: str, out: Path) -> None:
    config = config_of(table(llama, words, federation={"rounds": 1, "min_clients": 3}))

    def rename(kind: str, client: int, reply: Message) -> list[Message]:
        reply.content["identity"]["client"] = f"client-{min(client, 1)}"
        return [reply]

    with pytest.raises(FederationError, match=r"2 clients hold the basis where federation.min_clients = 3"):
        federate(config, out, grid=twisted(config, out, rename))


@pytest.mark.parametrize(("key", "complaint"), [("layout", "answered for layout"), ("model", "answered for base model")])
def test_a_client_with_another_model_is_refused_before_the_first_round(
    key: str, complaint: str, llama: str, words: str, out: Path
) -> None:
    config = config_of(table(llama, words, federation={"rounds": 1}))

    def reshape(kind: str, client: int, reply: Message) -> list[Message]:
        if client == 1:
            reply.content["identity"][key] = "ef" * 32
        return [reply]

    summary = federate(config, out, grid=twisted(config, out, reshape))
    assert complaint in events(out, "refused")[0]["reason"]
    assert summary["clients"] == 2


def test_a_node_bears_only_the_name_that_it_was_admitted_under(llama: str, words: str, tmp_path: Path) -> None:
    """Node 3 was admitted as client-1 and says it is client-2; nobody admitted node 4."""
    config, out = config_of(table(llama, words, federation={"rounds": 1})), tmp_path / "run"
    home = Home(tmp_path / "home")
    home.write_admitted({f"client-{i}": Admitted(node=str(i + 2), key_sha256="", since="") for i in range(2)})

    def rename(kind: str, client: int, reply: Message) -> list[Message]:
        if client == 1:
            reply.content["identity"]["client"] = "client-2"
        return [reply]

    summary = federate(config, out, grid=twisted(config, out, rename), home=home.folder)
    refused = {event["client"]: event["reason"] for event in events(out, "refused")}
    assert refused.keys() == {"client-1", "node 4"}
    assert "answered for site client-2 where client-1" in refused["client-1"]
    assert "answered for site client-2 where none that was" in refused["node 4"]
    assert summary["clients"] == 1 and personal_states(out).keys() == {"client-0"}


def test_a_personal_adapter_that_is_missing_is_a_fault_and_not_a_policy(llama: str, words: str, out: Path) -> None:
    config = config_of(table(llama, words, federation={"rounds": 1}))

    def forget(kind: str, client: int, reply: Message) -> list[Message]:
        if client == 1 and kind == "train.personalise":
            del reply.content["arrays"]
        return [reply]

    federate(config, out, grid=twisted(config, out, forget))
    assert [(e["client"], e["reason"]) for e in events(out, "refused")] == [("client-1", "sent no arrays")]
    assert not events(out, "kept")


class Comings(LocalGrid):
    """A LocalGrid whose `absent` nodes are not there until `arrive` says so at a question about who is."""

    absent: set[int]
    looks = 0

    def get_node_ids(self) -> list[int]:
        self.looks += 1
        if self.looks == 3:  # once at the start, then before every round
            self.absent = set()
        return [node for node in super().get_node_ids() if node not in self.absent]


def test_a_client_that_comes_late_takes_part_from_the_next_round_on(llama: str, words: str, out: Path) -> None:
    config = config_of(table(llama, words))
    grid = local_grid(config, out)
    grid.__class__ = Comings
    grid.absent = {4}  # type: ignore[attr-defined]
    summary = federate(config, out, grid=grid)
    assert [entry["clients"] for entry in summary["history"]] == [2, 3, 3]
    assert [event["client"] for event in events(out, "prepared")] == ["client-0", "client-1", "client-2"]
    assert personal_states(out).keys() == {"client-0", "client-1", "client-2"}


def test_a_client_that_comes_back_as_another_node_keeps_its_name(llama: str, words: str, out: Path) -> None:
    config = config_of(table(llama, words))
    contexts: dict[int, Any] = {}

    def restart(kind: str, client: int, reply: Message) -> list[Message]:
        if kind == "train" and 3 in contexts:  # the site of client-1 ends, and starts anew without its node key
            contexts[9] = contexts.pop(3)
        return [reply]

    grid = twisted(config, out, restart)
    contexts = grid._contexts
    config = config.model_copy(update={"federation": config.federation.model_copy(update={"fraction": 0.1})})
    summary = federate(config, out, grid=grid)
    assert not events(out, "refused")
    assert summary["clients"] == 3
    assert personal_states(out).keys() == {"client-0", "client-1", "client-2"}


def test_a_client_that_fails_at_first_is_asked_again(llama: str, words: str, out: Path) -> None:
    """In the second round, then in the fourth after that: it fails twice and takes part from the sixth on."""
    config, asked = config_of(table(llama, words, federation={"rounds": 7})), 0

    def fail(kind: str, client: int, reply: Message) -> list[Message]:
        nonlocal asked
        asked += client == 1 and kind == "query.prepare"
        return [failure(reply) if client == 1 and kind == "query.prepare" and asked <= 2 else reply]

    summary = federate(config, out, grid=twisted(config, out, fail))
    assert [entry["clients"] for entry in summary["history"]] == [2, 2, 2, 2, 2, 3, 3]
    assert asked == 3
