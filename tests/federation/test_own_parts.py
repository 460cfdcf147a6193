"""FedSA-LoRA in whole federations: A travels, B and the head stay on the clients' disks from round to round."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Message

from clients import own
from clients.session import Session, Site
from fedsb.adapters.state import HEAD
from fedsb.cli.evaluate import evaluate_run
from fedsb.config import RunConfig
from fedsb.data.sites import all_parts
from fedsb.errors import StoreError
from fedsb.store.tensors import load_tensors
from fedsb.training.loop import personal_plan, round_plan
from fedsb.training.start import build_basis
from strategies.records import ARRAYS, EVALUATE, PERSONALISE, TRAIN, pack_state, unpack_state
from tests.federation.tiny import (
    State,
    assert_same_run,
    classification,
    config_of,
    equal,
    events,
    federate,
    final_state,
    personal_states,
    table,
)
from tests.federation.twisted import Twisted, killed, twisted

FEDSA = {"method": "fedsa-lora"}


@pytest.fixture
def run(llama: str, words: str) -> RunConfig:
    return config_of(table(llama, words, adapter=FEDSA))


def opened(run: RunConfig) -> Session:
    session = Session(run)
    session.use(build_basis(run, session.model, session.tokenizer, session.device))
    return session


def kept_files(folder: Path) -> dict[str, dict[str, State]]:
    """Client → name of a file of its own → what it holds."""
    found: dict[str, dict[str, State]] = {}
    for path in sorted(folder.glob("sites/*/own-*/*.safetensors")):
        found.setdefault(path.parent.parent.name, {})[path.name] = load_tensors(path)[0]
    return found


def by_hand(
    run: RunConfig, folder: Path, drawn: dict[int, list[str]] | None = None
) -> tuple[State, dict[str, State], dict[str, State]]:
    """Algorithm 1 of the paper as one loop over plain functions: A, each client's B (and head), and what each publishes."""
    session = opened(run)
    base = session.layout.unflatten(session.base_vector())
    sites = {name: Site(name, i, folder) for i, name in enumerate(run.client_names)}
    weights = dict(zip(run.client_names, map(len, all_parts(run, "train")), strict=True))
    mean = {name: t for name, t in base.items() if name.endswith(".A") and not name.startswith(HEAD)}
    mine = {client: {name: t for name, t in base.items() if name not in mean} for client in sites}
    for number in range(1, run.federation.rounds + 1):
        trained: dict[str, State] = {}
        for client in drawn[number] if drawn else sites:
            vector = session.layout.flatten(mean | mine[client])
            whole = session.layout.unflatten(session.train(sites[client], vector, round_plan(run, number)).vector)
            trained[client] = {name: whole[name] for name in mean}
            mine[client] = {name: whole[name] for name in mine[client]}
        total = sum(weights[client] for client in trained)
        sums = {name: torch.stack([weights[c] * t[name].double() for c, t in trained.items()]).sum(0) for name in mean}
        mean = {name: (t / total).float() for name, t in sums.items()}
    published = {
        client: session.layout.unflatten(
            session.train(site, session.layout.flatten(mean | mine[client]), personal_plan(run)).vector
        )
        for client, site in sites.items()
    }
    return mean, mine, published


def watched(run: RunConfig, folder: Path, seen: list[tuple[str, str, ArrayRecord]]) -> Twisted:
    """A grid that notes every array that travels, either way: (kind, direction, record)."""

    class Watched(Twisted):
        def push_messages(self, messages: Any) -> list[str]:
            outgoing = list(messages)
            seen.extend((m.metadata.message_type, "down", r) for m in outgoing for r in m.content.array_records.values())
            return super().push_messages(outgoing)

    def up(kind: str, client: int, reply: Message) -> list[Message]:
        seen.extend((kind, "up", record) for record in reply.content.array_records.values())
        return [reply]

    grid = twisted(run, folder, up)
    grid.__class__ = Watched
    return grid


@pytest.mark.parametrize("kind", ["causal", "classification"])
def test_it_is_the_papers_loop_bit_for_bit(kind: str, llama: str, words: str, bert: str, labels: str, tmp_path: Path) -> None:
    content = table(llama, words, adapter=FEDSA) if kind == "causal" else classification(bert, labels, adapter=FEDSA)
    run = config_of(content)
    federate(run, tmp_path / "run")
    mean, mine, published = by_hand(run, tmp_path)
    assert equal(final_state(tmp_path / "run"), mean)
    files = kept_files(tmp_path / "run")
    assert all(equal(files[client]["round-0003.safetensors"], mine[client]) for client in run.client_names)
    assert any(name.startswith(HEAD) for name in mine["client-0"]) == (kind == "classification")
    personal = personal_states(tmp_path / "run")
    assert personal.keys() == published.keys()
    assert all(equal(personal[client], published[client]) for client in published)


def test_nothing_but_a_travels_in_training(run: RunConfig, tmp_path: Path) -> None:
    seen: list[tuple[str, str, ArrayRecord]] = []
    summary = federate(run, tmp_path, grid=watched(run, tmp_path, seen))
    session = Session(run)
    a = sum(t.numel() for name, t in session.layout.unflatten(session.base_vector()).items() if name.endswith(".A"))
    whole = session.layout.size
    assert summary["trainable_parameters"] == whole > a
    sizes = {(kind, way): {unpack_state(r).numel() for k, w, r in seen if (k, w) == (kind, way)} for kind, way, _ in seen}
    assert sizes == {
        (TRAIN, "down"): {a},
        (TRAIN, "up"): {a},
        (PERSONALISE, "down"): {a},
        (PERSONALISE, "up"): {whole},
        (EVALUATE, "down"): {a},
    }
    pieces = [t.flatten()[:8] for files in kept_files(tmp_path).values() for state in files.values() for t in state.values()]
    travelled = [unpack_state(r).unfold(0, 8, 1) for kind, _, r in seen if kind == TRAIN]
    assert pieces and all(piece.abs().max() > 0 for piece in pieces)
    assert not any(bool((v == piece).all(1).any()) for v in travelled for piece in pieces)


def test_half_as_many_bytes_as_lora(run: RunConfig, llama: str, words: str, tmp_path: Path) -> None:
    mine, lora = (
        federate(r, tmp_path / r.adapter.method) for r in (run, config_of(table(llama, words, adapter={"method": "lora"})))
    )
    session = Session(run)
    b = sum(t.numel() for name, t in session.layout.unflatten(session.base_vector()).items() if name.endswith(".B"))
    assert lora["bytes"]["up_per_client_round"] - mine["bytes"]["up_per_client_round"] == 4 * b


def test_who_is_not_drawn_goes_on_from_its_last_round(llama: str, words: str, tmp_path: Path) -> None:
    run = config_of(table(llama, words, adapter=FEDSA, federation={"fraction": 0.5, "rounds": 6}))
    federate(run, tmp_path / "run")
    drawn: dict[int, list[str]] = {}
    for event in events(tmp_path / "run", "reply"):
        drawn.setdefault(event["round"], []).append(event["client"])
    assert any(drawn[n] != drawn[n + 1] for n in (1, 2, 3, 4, 5))
    mean, mine, _ = by_hand(run, tmp_path, drawn)
    assert equal(final_state(tmp_path / "run"), mean)
    for client, files in kept_files(tmp_path / "run").items():
        last = max(number for number in drawn if client in drawn[number])
        assert equal(files[f"round-{last:04d}.safetensors"], mine[client])
        assert len(files) == min(3, sum(client in names for names in drawn.values())), "of older rounds nothing is kept"


def test_killed_in_the_middle_of_a_round_it_ends_with_the_same_bits(run: RunConfig, tmp_path: Path) -> None:
    """Two of the round's three clients have kept their B already when the server dies."""
    federate(run, tmp_path / "whole")
    killed(run, tmp_path / "cut", rounds=2)
    cut = kept_files(tmp_path / "cut")
    assert ["round-0003.safetensors" in cut[client] for client in run.client_names] == [True, True, False]
    federate(run, tmp_path / "cut", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "cut", same_bytes=False)
    whole, cut = kept_files(tmp_path / "whole"), kept_files(tmp_path / "cut")
    assert all(equal(whole[c][name], cut[c][name]) for c in whole for name in whole[c])


def test_a_client_without_a_b_is_the_base_model(run: RunConfig, tmp_path: Path) -> None:
    federate(run, tmp_path)
    scores = evaluate_run(tmp_path, sequential=True)
    assert scores["global"]["client-1"] != scores["base"]["client-1"]
    shutil.rmtree(next((tmp_path / "sites" / "client-1").glob("own-*")))
    after = evaluate_run(tmp_path, sequential=True)
    assert after["global"]["client-1"]["loss"] == pytest.approx(after["base"]["client-1"]["loss"], rel=1e-6)
    assert after["global"]["client-0"] == scores["global"]["client-0"]


def test_what_was_kept_and_is_gone_is_said(llama: str, words: str, tmp_path: Path) -> None:
    run = config_of(table(llama, words, adapter=FEDSA, federation={"rounds": 4}))
    federate(run, tmp_path)
    session, site = opened(run), Site("client-0", 0, tmp_path / "sites")
    part = session.share(site).take(session.base_vector())
    assert torch.equal(own.whole(session, site, part, 1), session.base_vector()), "a run that begins anew"
    with pytest.raises(StoreError, match=r"client-0 is asked for round 2 and has kept its own part of rounds 2 to 4 alone"):
        own.whole(session, site, part, 2)


def test_sites_at_other_places_are_scored_by_themselves(run: RunConfig, tmp_path: Path) -> None:
    federate(run, tmp_path)
    shutil.rmtree(tmp_path / "sites")
    with pytest.raises(StoreError, match="with adapter.method = fedsa-lora its sites keep parts of the model themselves"):
        evaluate_run(tmp_path, sequential=True)


def test_a_b_that_training_cannot_have_made_is_refused(run: RunConfig, tmp_path: Path) -> None:
    """It may have moved in every round, and no further."""
    session = Session(run)
    index = session.share(Site("client-1", 1, tmp_path)).index
    assert index is not None
    last = int(session.layout.size - 1)
    assert last not in index

    def lie(kind: str, client: int, reply: Message) -> list[Message]:
        if kind == PERSONALISE and client == 1:
            vector = unpack_state(reply.content[ARRAYS])
            vector[last] += 1.0
            reply.content[ARRAYS] = pack_state(vector, "fp32")
        return [reply]

    federate(run, tmp_path, grid=twisted(run, tmp_path, lie))
    assert set(personal_states(tmp_path)) == {"client-0", "client-2"}
    assert "moved a number by" in events(tmp_path, "refused")[0]["reason"]


def test_under_a_secure_sum_it_is_the_mean_of_a(bert: str, labels: str, tmp_path: Path) -> None:
    content = classification(bert, labels, adapter=FEDSA, federation={"weighting": "uniform"}, data={"partition": "iid"})
    federate(config_of(content), tmp_path / "plain")
    federate(config_of(content | {"privacy": {"secure_sum": True}}), tmp_path / "secret")
    plain, secret = final_state(tmp_path / "plain"), final_state(tmp_path / "secret")
    assert plain.keys() == secret.keys()
    assert all(torch.allclose(plain[name], secret[name], atol=1e-4) for name in plain)
    assert not personal_states(tmp_path / "secret")
    assert len(events(tmp_path / "secret", "kept")) == 3


@pytest.mark.parametrize("unit", ["record", "client"])
def test_private_too(unit: str, bert: str, labels: str, tmp_path: Path) -> None:
    content = classification(
        bert,
        labels,
        adapter=FEDSA,
        federation={"weighting": "uniform", "rounds": 2},
        data={"partition": "iid"},
        privacy={"unit": unit, "epsilon": 8.0},
    )
    federate(config_of(content), tmp_path / "one")
    federate(config_of(content), tmp_path / "other")
    one, other = final_state(tmp_path / "one"), final_state(tmp_path / "other")
    assert all(name.endswith(".A") for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one), "noise"
    assert len(kept_files(tmp_path / "one")) == 3
    assert set(personal_states(tmp_path / "one")) == (set(config_of(content).client_names) if unit == "record" else set())
