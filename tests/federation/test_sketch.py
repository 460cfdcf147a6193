"""Whole federations whose basis comes from the clients' sketches: what is sent, what it costs, and that it is the pooled one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message

from clients.session import Session, Site
from fedsb.basis.sketch import sketched_basis
from fedsb.config import RunConfig
from fedsb.errors import ConfigError, FederationError
from fedsb.privacy.accounting import epsilon
from fedsb.store.basis_files import load_basis
from fedsb.store.ledger import NAME, Entry, Ledger, spent
from strategies.records import ARRAYS, METRICS, SKETCH, unpack_state
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


def test_the_basis_is_that_of_the_pooled_gradient(llama: str, words: str, tmp_path: Path) -> None:
    """Clients of equal size: the mean of their sketches is the sketch of all examples together."""
    run = config(llama, words)
    federate(run, tmp_path)
    (stored,) = (tmp_path / "basis").glob("*.safetensors")
    found = load_basis(tmp_path, stored.stem)
    session = Session(run)
    rows = [row for i, name in enumerate(run.client_names) for row in session.rows(Site(name, i, tmp_path), "train")]
    sketcher = session.sketcher()
    expected = sketched_basis(sketcher.plan, sketcher.summed(rows))
    for name in expected.B:
        overlap = torch.linalg.svdvals(expected.B[name].T @ found.B[name].float())
        assert overlap.min() > 0.99
    assert len(events(tmp_path, "sketched")) == 3


def test_no_client_sends_a_gradient_and_every_byte_is_counted(llama: str, words: str, tmp_path: Path) -> None:
    run = config(llama, words)
    seen = sketches(run, tmp_path)
    session = Session(run)
    plan = session.sketcher().plan
    gradients = sum(out * in_ for _, (out, in_) in plan.shapes)
    assert {len(sketch) for sketch in seen.values()} == {plan.size} and plan.size < gradients
    summary = federate(run, tmp_path / "again")
    assert summary["bytes"]["up"] > 3 * 4 * plan.size
    assert summary["bytes"]["basis"] > 0  # nobody can rebuild it, so it was sent


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
    (stored,) = (tmp_path / "basis").glob("*.safetensors")
    plan = Session(run).sketcher().plan
    exact, found = sketched_basis(plan, sum(seen.values(), torch.zeros(plan.size))), load_basis(tmp_path, stored.stem)
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
    with pytest.raises(FederationError, match="0 clients sent a sketch where federation.min_clients = 1 are needed"):
        federate(
            run, tmp_path, grid=twisted(run, tmp_path, lambda kind, _, reply: [failure(reply)] if kind == SKETCH else [reply])
        )


@pytest.mark.parametrize(
    ("privacy", "said"),
    [
        ({"secure_sum": True}, "is not summed in secret yet"),
        ({"unit": "record", "noise_multiplier": 1.0}, "needs privacy.epsilon, of which it takes its share"),
    ],
)
def test_what_it_cannot_be_combined_with_is_refused(privacy: dict[str, Any], said: str, llama: str, words: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config(llama, words, privacy)
