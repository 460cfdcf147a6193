"""Whole federations whose basis comes from the clients' sketches: what is sent, what it costs, and that it is the pooled one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message, RecordDict

from clients.answers import answer
from clients.session import Session, Site
from fedsb.basis.frames import Basis
from fedsb.basis.sketch import sketched_basis
from fedsb.config import RunConfig
from fedsb.errors import ConfigError, FederationError, FedsbError
from fedsb.privacy.accounting import epsilon
from fedsb.privacy.clipping import clip
from fedsb.privacy.mechanism import sketch_mechanism
from fedsb.store.basis_files import load_basis
from fedsb.store.ledger import NAME, Entry, Ledger, spent
from strategies.records import ARRAYS, CONFIG, METRICS, SKETCH, TRAIN, Order, pack_state, unpack_state
from strategies.sums import ADVERTISE, PAYLOAD, REVEAL, SHARE, noise_share, pack_payload
from tests.federation.tiny import classification, config_of, events, federate, final_state, table
from tests.federation.twisted import failure, twisted


def config(llama: str, words: str, privacy: dict[str, Any] | None = None, **basis: Any) -> RunConfig:
    sections = {"federation": {"weighting": "uniform"}, "data": {"partition": "iid"}}
    return config_of(table(llama, words, **sections, basis={"source": "sketch", **basis}, privacy=privacy or {}))


def entries(out: Path, client: str = "client-0") -> list[Entry]:
    return Ledger(out / "sites" / client / NAME, client).entries()


def sketches(run: RunConfig, out: Path) -> dict[int, torch.Tensor]:
    """Client → the sketch that it sends, in a run that is done."""
    seen: dict[int, torch.Tensor] = {}

    def watch(kind: str, client: int, reply: Message) -> list[Message]:
        if kind == SKETCH:
            assert set(reply.content) == {"identity", METRICS, ARRAYS} and dict(reply.content[METRICS]) == {}
            seen[client] = unpack_state(reply.content[ARRAYS])
        return [reply]

    federate(run, out, grid=twisted(run, out, watch))
    return seen


def basis_of(out: Path) -> Basis:
    """The basis of a run that is done."""
    (stored,) = (out / "basis").glob("*.safetensors")
    return load_basis(out, stored.stem)


def overlap(one: Basis, other: Basis) -> float:
    """The least cosine between the spaces of two bases, over all layers; 1 for the same."""
    cosines = [torch.linalg.svdvals(one.B[name].float().T @ other.B[name].float()).min() for name in one.B]
    return float(torch.stack(cosines).min())


def test_the_basis_is_that_of_the_pooled_gradient(llama: str, words: str, tmp_path: Path) -> None:
    """Clients of equal size, none clipped: the mean of their sketches is the sketch of all examples together."""
    run = config(llama, words, {"clip_norm": 1e3})
    federate(run, tmp_path)
    found = basis_of(tmp_path)
    session = Session(run)
    rows = [row for i, name in enumerate(run.client_names) for row in session.rows(Site(name, i, tmp_path), "train")]
    sketcher = session.sketcher()
    assert overlap(sketched_basis(sketcher.plan, sketcher.summed(rows)), found) > 0.99
    assert len(events(tmp_path, "sketched")) == 3


def test_no_client_sends_a_gradient_and_every_byte_is_counted(llama: str, words: str, tmp_path: Path) -> None:
    run = config(llama, words)
    seen = sketches(run, tmp_path)
    session = Session(run)
    plan = session.sketcher().plan
    gradients = sum(out * in_ for _, (out, in_) in plan.shapes)
    assert {len(sketch) for sketch in seen.values()} == {plan.size} and plan.size < gradients
    summary = federate(run, tmp_path / "again")
    assert summary["bytes"]["basis"] > 3 * (4 * plan.size + summary["basis"]["bytes"])  # sketches up; and nobody can rebuild it


def test_it_trains_and_a_resumed_run_asks_for_no_second_sketch(llama: str, words: str, tmp_path: Path) -> None:
    run = config(llama, words)

    class Died(Exception):
        pass

    def die(kind: str, client: int, reply: Message) -> list[Message]:
        if kind == "train" and not (tmp_path / "died").exists():
            (tmp_path / "died").touch()
            raise Died
        return [reply]

    with pytest.raises(Died):
        federate(run, tmp_path / "run", grid=twisted(run, tmp_path / "run", die))
    grid = twisted(run, tmp_path / "run", lambda *args: [args[2]])
    federate(run, tmp_path / "run", resume=True, grid=grid)
    assert SKETCH not in {kind for kind, _ in grid.asked}
    assert all(state.any() for state in final_state(tmp_path / "run").values())


def test_a_classifier_can_be_sketched_too(bert: str, labels: str, tmp_path: Path) -> None:
    run = config_of(classification(bert, labels, basis={"source": "sketch"}))
    assert federate(run, tmp_path)["basis"]["source"] == "sketch"


def test_by_record_it_is_a_release_within_its_share(llama: str, words: str, tmp_path: Path) -> None:
    run = config(llama, words, {"unit": "record", "epsilon": 20.0, "basis_share": 0.3}, examples=3)
    federate(run, tmp_path)
    found = entries(tmp_path)
    assert (found[0].what, found[0].round, found[0].steps) == (SKETCH, 0, 1)
    assert found[0].sample_rate == pytest.approx(3 / 7) and len(found) == 5
    assert 0.25 * 20 < epsilon([found[0].release], 1 / 7).best <= 0.3 * 20
    assert 0.9 * 20 < spent(found, 1 / 7).best <= 20.0
    assert {entry.noise_multiplier for entry in found[1:]} != {found[0].noise_multiplier}


def test_by_record_two_sketches_of_the_same_data_differ(llama: str, words: str, tmp_path: Path) -> None:
    run = config(llama, words, {"unit": "record", "epsilon": 20.0})
    one, other = (sketches(run, tmp_path / name) for name in ("a", "b"))
    assert all(not torch.equal(one[client], other[client]) for client in one)


def test_by_client_each_is_clipped_and_the_server_adds_noise(llama: str, words: str, tmp_path: Path) -> None:
    run = config(llama, words, {"unit": "client", "epsilon": 8.0, "clip_norm": 0.25})
    seen = sketches(run, tmp_path)
    assert all(float(sketch.norm()) <= 0.25 for sketch in seen.values()) and len(seen) == 3
    plan = Session(run).sketcher().plan
    exact, found = sketched_basis(plan, sum(seen.values(), torch.zeros(plan.size))), basis_of(tmp_path)
    assert all(torch.linalg.svdvals(exact.B[name].T @ found.B[name].float()).min() < 0.9 for name in exact.B)
    first = entries(tmp_path)[0]
    assert (first.what, first.unit) == (SKETCH, "client")


def test_a_sketch_that_must_not_count_is_refused_and_named(llama: str, words: str, tmp_path: Path) -> None:
    run = config(llama, words)

    def spoil(kind: str, client: int, reply: Message) -> list[Message]:
        if kind == SKETCH and client == 0:
            reply.content["identity"]["client"] = "client-1"
        if kind == SKETCH and client == 2:
            return [failure(reply)]
        return [reply]

    federate(run, tmp_path, grid=twisted(run, tmp_path, spoil))
    reasons = " ".join(event["reason"] for event in events(tmp_path, "refused"))
    assert "failed: gone" in reasons and "bears the name client-1, which another client has" in reasons
    assert len(events(tmp_path, "sketched")) == 1


def test_without_enough_sketches_the_run_ends_with_a_sentence(llama: str, words: str, tmp_path: Path) -> None:
    run = config(llama, words)
    with pytest.raises(FederationError, match="0 clients sent a sketch where 1 are needed"):
        federate(
            run, tmp_path, grid=twisted(run, tmp_path, lambda kind, _, reply: [failure(reply)] if kind == SKETCH else [reply])
        )


@pytest.mark.parametrize(
    ("privacy", "said"),
    [
        ({"unit": "record", "noise_multiplier": 1.0}, "needs privacy.epsilon, of which it takes its share"),
    ],
)
def test_what_it_cannot_be_combined_with_is_refused(privacy: dict[str, Any], said: str, llama: str, words: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config(llama, words, privacy)


@pytest.mark.parametrize("privacy", [{}, {"unit": "record", "epsilon": 1e3}])
def test_one_client_counts_for_no_more_than_the_clip_norm(
    privacy: dict[str, Any], llama: str, words: str, tmp_path: Path
) -> None:
    """Also without privacy, and also if it does not clip by itself."""
    run, sent = config(llama, words, {"clip_norm": 0.5, **privacy}), {}

    def shout(kind: str, client: int, reply: Message) -> list[Message]:
        if kind == SKETCH:
            sent[client] = unpack_state(reply.content[ARRAYS]) * (1e6 if client == 0 else 1)
            reply.content[ARRAYS] = pack_state(sent[client], "fp32")
        return [reply]

    federate(run, tmp_path, grid=twisted(run, tmp_path, shout))
    plan = Session(run).sketcher().plan
    expected = sum((clip(sketch, 0.5).vector for sketch in sent.values()), torch.zeros(plan.size))
    assert overlap(sketched_basis(plan, expected), basis_of(tmp_path)) > 0.99
    assert overlap(sketched_basis(plan, sent[0]), basis_of(tmp_path)) < 0.9


def secured(llama: str, words: str, **privacy: Any) -> RunConfig:
    """Four clients under a secure sum."""
    run = config(llama, words, {"secure_sum": True, "clip_norm": 0.5, **privacy})
    return run.model_copy(update={"federation": run.federation.model_copy(update={"clients": 4, "rounds": 1})})


def test_with_a_secure_sum_the_basis_is_the_plain_one_and_no_sketch_is_seen(llama: str, words: str, tmp_path: Path) -> None:
    run, kinds = secured(llama, words), []
    plan = Session(run).sketcher().plan

    def watch(kind: str, client: int, reply: Message) -> list[Message]:
        kinds.append(kind)
        if kind == SKETCH:
            assert list(reply.content[ARRAYS]) == [PAYLOAD] and dict(reply.content[METRICS]) == {}
            words_sent = np.frombuffer(reply.content[ARRAYS][PAYLOAD].data, "<u4")
            assert len(words_sent) == plan.size
            bits = np.unpackbits(words_sent.view(np.uint8)).mean()
            assert abs(bits - 0.5) < 5 * 0.5 / np.sqrt(32 * plan.size)
        return [reply]

    summary = federate(run, tmp_path / "secure", grid=twisted(run, tmp_path / "secure", watch))
    assert kinds[:16] == [ADVERTISE] * 4 + [SHARE] * 4 + [SKETCH] * 4 + [REVEAL] * 4
    content = run.model_dump(mode="json", exclude_none=True)
    content["privacy"]["secure_sum"] = False
    federate(config_of(content), tmp_path / "plain")
    assert overlap(basis_of(tmp_path / "secure"), basis_of(tmp_path / "plain")) > 0.99
    told = [(event["round"], event["asked"], event["summed"]) for event in events(tmp_path / "secure", "secure-sum")]
    assert told == [(0, 4, 4), (1, 4, 4)]
    assert summary["bytes"]["basis"] > 4 * 4 * plan.size


@pytest.mark.parametrize("stage", [ADVERTISE, SHARE, SKETCH, REVEAL])
def test_a_client_that_is_lost_in_the_sum_of_sketches_costs_its_own_at_most(
    stage: str, llama: str, words: str, tmp_path: Path
) -> None:
    run = secured(llama, words)

    def lose(kind: str, client: int, reply: Message) -> list[Message]:
        early = not events(tmp_path, "basis")
        return [failure(reply)] if early and kind == stage and client == 3 else [reply]

    federate(run, tmp_path, grid=twisted(run, tmp_path, lose))
    first = events(tmp_path, "secure-sum")[0]
    assert (first["round"], first["summed"]) == (0, 4 if stage == REVEAL else 3)
    assert len(events(tmp_path, "refused")) == 1
    session, total = Session(run), 0
    for i in range(4 if stage == REVEAL else 3):
        total = total + clip(session.sketch(Site(f"client-{i}", i, tmp_path)), 0.5).vector
    assert overlap(sketched_basis(session.sketcher().plan, total), basis_of(tmp_path)) > 0.99


def test_with_too_few_sketches_nothing_is_learned_and_the_run_ends(llama: str, words: str, tmp_path: Path) -> None:
    run = secured(llama, words)

    def lose(kind: str, client: int, reply: Message) -> list[Message]:
        return [failure(reply)] if kind == SKETCH and client > 1 else [reply]

    grid = twisted(run, tmp_path, lose)
    with pytest.raises(FederationError, match="2 clients sent a sketch where 3 are needed"):
        federate(run, tmp_path, grid=grid)
    assert REVEAL not in {kind for kind, _ in grid.asked}
    with pytest.raises(FederationError, match="the sum of sketches: 2 clients take part .* threshold is 3"):
        federate(
            run,
            tmp_path / "again",
            grid=twisted(
                run,
                tmp_path / "again",
                lambda kind, client, reply: [failure(reply)] if kind == ADVERTISE and client > 1 else [reply],
            ),
        )


def test_a_private_sketch_is_summed_in_secret_too(llama: str, words: str, tmp_path: Path) -> None:
    run = secured(llama, words, unit="record", epsilon=20.0)
    seen: list[list[str]] = []

    def watch(kind: str, client: int, reply: Message) -> list[Message]:
        if kind == SKETCH:
            seen.append(list(reply.content[ARRAYS]))
        return [reply]

    federate(run, tmp_path, grid=twisted(run, tmp_path, watch))
    assert seen == [[PAYLOAD]] * 4
    session, exact = Session(run), 0
    for i in range(4):
        exact = exact + clip(session.sketch(Site(f"client-{i}", i, tmp_path)), 0.5).vector
    assert overlap(sketched_basis(session.sketcher().plan, exact), basis_of(tmp_path)) < 0.9, "there is noise in it"
    assert entries(tmp_path)[0].what == SKETCH and spent(entries(tmp_path), 1 / 5).best <= 20.0


def test_by_client_the_clients_add_the_noise_of_the_sketch(llama: str, words: str, tmp_path: Path) -> None:
    """Three of four suffice for the sum, so two parts make up the noise: whoever knows its own takes it off."""
    run = secured(llama, words, unit="client", epsilon=8.0)
    mechanism = sketch_mechanism(run, 4)
    assert noise_share(run, 0, 4) == pytest.approx(mechanism.noise_multiplier * 0.5 / 2**0.5)
    assert noise_share(run, 0, 4) != noise_share(run, 1, 4)
    federate(run, tmp_path)
    assert [entry.what for entry in entries(tmp_path)] == [SKETCH, "train"]
    session, exact = Session(run), 0
    for i in range(4):
        exact = exact + clip(session.sketch(Site(f"client-{i}", i, tmp_path)), 0.5).vector
    assert overlap(sketched_basis(session.sketcher().plan, exact), basis_of(tmp_path)) < 0.9


def test_the_sum_begins_anew_with_those_who_may_take_part(llama: str, words: str, tmp_path: Path) -> None:
    """Five are connected and two refuse: four of five would be needed, three of three are there."""
    run = secured(llama, words)
    run = run.model_copy(update={"federation": run.federation.model_copy(update={"clients": 5})})

    def refuse(kind: str, client: int, reply: Message) -> list[Message]:
        return [failure(reply)] if client > 2 and not events(tmp_path, "round") else [reply]

    federate(run, tmp_path, grid=twisted(run, tmp_path, refuse))
    told = [(event["round"], event["asked"], event["summed"]) for event in events(tmp_path, "secure-sum")]
    assert told == [(0, 3, 3), (1, 3, 3)]


@pytest.mark.parametrize("stage", [SKETCH, "train"])
def test_numbers_that_are_no_vectors_end_the_round_and_lose_nothing(stage: str, llama: str, words: str, tmp_path: Path) -> None:
    run = secured(llama, words)

    def garble(kind: str, client: int, reply: Message) -> list[Message]:
        if kind == stage and client == 1:
            size = len(reply.content[ARRAYS][PAYLOAD].data)
            reply.content[ARRAYS] = pack_payload(np.random.default_rng(0).bytes(size))
        return [reply]

    place = "the sum of sketches" if stage == SKETCH else "round 1"
    with pytest.raises(FederationError, match=f"{place}: .*--resume tries again"):
        federate(run, tmp_path, grid=twisted(run, tmp_path, garble))
    assert (tmp_path / "events.jsonl").exists()
    federate(run, tmp_path, resume=True)


def test_a_sketch_is_given_only_before_training_and_in_a_run_that_has_one(llama: str, words: str, tmp_path: Path) -> None:
    run = config(llama, words, {"unit": "record", "epsilon": 20.0})
    federate(run, tmp_path)
    node = {"partition-id": 0, "num-partitions": 3, "folder": str(tmp_path / "sites")}

    def ask(config: RunConfig, kind: str = SKETCH, server_round: int = 0, basis: str = "") -> None:
        state = pack_state(torch.zeros(Session(config).layout.size), "fp32")
        answer(kind, RecordDict({CONFIG: Order(config.to_json(), server_round, basis).record(), ARRAYS: state}), node)

    before = entries(tmp_path)
    with pytest.raises(FedsbError, match="has trained in this run already, and a sketch comes before that"):
        ask(run)
    with pytest.raises(FedsbError, match="is asked for a sketch, which this run does not have"):
        ask(config_of(table(llama, words)))
    with pytest.raises(FedsbError, match="is asked for a sketch, which this run does not have"):
        ask(run, server_round=1)
    with pytest.raises(FedsbError, match="is asked to train in round 0, which is none"):
        ask(run, TRAIN, basis=basis_of(tmp_path).fingerprint)
    assert entries(tmp_path) == before
