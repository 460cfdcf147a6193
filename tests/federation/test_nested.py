"""Nested cores in whole federations: clients of different ranks, and cores that may be cut."""

from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from peft import PeftModel
from typer.testing import CliRunner

from clients.session import Session, Site
from fedsb.adapters.nested_sb import at_rank_of, cut_to
from fedsb.adapters.state import layers_of, set_state
from fedsb.cli.evaluate import evaluate_run
from fedsb.cli.main import app, register
from fedsb.config import RunConfig
from fedsb.data.sites import all_parts
from fedsb.errors import AdapterError, ConfigError, StoreError
from fedsb.models import device_of, load_model, locate
from fedsb.store import adapters
from fedsb.store.basis_files import load_basis
from fedsb.store.export import export_core, export_lora
from fedsb.training.loop import round_plan
from fedsb.training.start import build_basis
from strategies.records import ARRAYS, EVALUATE, PERSONALISE, TRAIN, pack_state, unpack_state
from tests.federation.tiny import (
    assert_same_result,
    assert_same_run,
    config_of,
    equal,
    events,
    federate,
    final_state,
    personal_states,
    table,
)
from tests.federation.twisted import Twisted, killed_and_resumed, twisted

RANKS = {"client-0": 2, "client-1": 3}  # client-2: 4, as the run
TOKENS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


def config(llama: str, words: str, ranks: dict[str, int] | None = None, /, **sections: Any) -> RunConfig:
    adapter = {"method": "nested-sb", "ranks": RANKS if ranks is None else ranks} | sections.pop("adapter", {})
    return config_of(table(llama, words, adapter=adapter, **sections))


def opened(run: RunConfig) -> Session:
    session = Session(run)
    session.use(build_basis(run, session.model, session.tokenizer, session.device))
    return session


def test_equal_ranks_are_lora_sb_bit_for_bit(llama: str, words: str, tmp_path: Path) -> None:
    federate(config(llama, words, {"client-1": 4}), tmp_path / "nested")
    federate(config_of(table(llama, words)), tmp_path / "lora-sb")
    assert_same_result(tmp_path / "nested", tmp_path / "lora-sb")


def test_a_client_sends_and_receives_its_rank_squared_a_layer(llama: str, words: str, tmp_path: Path) -> None:
    run, sizes = config(llama, words), {}

    class Watched(Twisted):
        def push_messages(self, messages: Any) -> list[str]:
            outgoing = list(messages)
            for message in outgoing:
                if ARRAYS in message.content:
                    note(message.metadata.message_type, message.metadata.dst_node_id - 2, "down", message)
            return super().push_messages(outgoing)

    def note(kind: str, client: int, way: str, message: Message) -> list[Message]:
        if ARRAYS in message.content:
            sizes.setdefault((kind, way, client), set()).add(unpack_state(message.content[ARRAYS]).numel())
        return [message]

    grid = twisted(run, tmp_path, lambda kind, client, reply: note(kind, client, "up", reply))
    grid.__class__ = Watched
    summary = federate(run, tmp_path, grid=grid)
    layers = len(layers_of(Session(run).model))
    questions = {(kind, way) for kind in (TRAIN, PERSONALISE) for way in ("up", "down")} | {(EVALUATE, "down")}
    assert sizes == {(*q, client): {layers * rank**2} for q in questions for client, rank in enumerate((2, 3, 4))}
    whole = config(llama, words, {})
    full = federate(whole, tmp_path / "full")
    saved = 4 * layers * (3 * 16 - 4 - 9 - 16)
    told = 3 * (len(whole.to_json()) - len(run.to_json()))  # the table of ranks goes with each question
    for way, more in (("up", 0), ("down", told)):
        assert full["history"][0][way] - summary["history"][0][way] == saved + more


def test_each_number_is_averaged_over_those_who_hold_it(llama: str, words: str, tmp_path: Path) -> None:
    """One round by hand: local training of blocks, and a loop over entries."""
    run = config(llama, words, federation={"rounds": 1})
    summary = federate(run, tmp_path / "run")
    session, sent, weights = opened(run), [], [len(part) for part in all_parts(run, "train")]
    for i, client in enumerate(run.client_names):
        vector = session.train(Site(client, i, tmp_path), session.base_vector(), round_plan(run, 1)).vector
        state, rank = session.layout.unflatten(vector), run.rank_of(client)
        for core in state.values():
            assert core[:rank, :rank].abs().min() > 0
            assert not core[rank:].any() and not core[:, rank:].any(), "what it does not hold it does not train"
        sent.append(state)
    for name, got in final_state(tmp_path / "run").items():
        for i in range(4):
            for j in range(4):
                holders = [c for c, client in enumerate(run.client_names) if max(i, j) < run.rank_of(client)]
                total = sum(weights[c] * float(sent[c][name][i, j]) for c in holders)
                assert float(got[i, j]) == pytest.approx(total / sum(weights[c] for c in holders), rel=1e-6)
    assert summary["aggregation_error"] > 1e-2, "of the mean of all updates it is not"


def test_a_number_that_nobody_holds_does_not_move(llama: str, words: str, tmp_path: Path) -> None:
    public = {"source": "public", "public": {"name": "open", "source": words}, "examples": 8, "r0": "paper", "eta": 1e-3}
    run = config(llama, words, dict.fromkeys(("client-0", "client-1", "client-2"), 3), basis=public)
    federate(run, tmp_path)
    state, basis = final_state(tmp_path), load_basis(tmp_path, events(tmp_path, "basis")[0]["fingerprint"])
    assert basis.R0
    for name, r0 in basis.R0.items():
        core = state[f"{name}.core"]
        assert torch.equal(core[3:], r0[3:]) and torch.equal(core[:, 3:], r0[:, 3:]) and r0[3, 3] > 0
        assert (core[:3, :3] != r0[:3, :3]).all()


@pytest.mark.parametrize("nested", [False, True])
def test_killed_and_resumed_it_ends_with_the_same_bits(nested: bool, llama: str, words: str, tmp_path: Path) -> None:
    run = config(llama, words, adapter={"nested": nested})
    federate(run, tmp_path / "whole")
    killed_and_resumed(run, tmp_path / "cut", rounds=1)
    assert_same_run(tmp_path / "whole", tmp_path / "cut", same_bytes=False)


def test_a_client_of_low_rank_trains_a_lora_sb_of_that_rank(llama: str, words: str, tmp_path: Path) -> None:
    """Its block, against LoRA-SB of its rank on the leading part of the basis."""
    run = config(llama, words, train={"learning_rate": 0.02})
    low = config_of(table(llama, words, adapter={"rank": 2}, train={"learning_rate": 0.02}))
    session, small = opened(run), Session(low)
    small.use(build_basis(run, session.model, session.tokenizer, session.device).cut(2))
    site = Site("client-0", 0, tmp_path)
    trained = session.train(site, session.base_vector(), round_plan(run, 1)).vector
    alone = small.train(site, small.base_vector(), round_plan(low, 1)).vector
    torch.testing.assert_close(session.share(site).take(trained), alone, rtol=1e-3, atol=1e-5)


def test_what_it_publishes_has_its_own_rank_and_scores_alike(llama: str, words: str, tmp_path: Path) -> None:
    run = config(llama, words)
    summary = federate(run, tmp_path)
    for client in run.client_names:
        stored = adapters.load(tmp_path / "adapters", client)
        assert stored.manifest.rank == run.rank_of(client)
        assert {t.shape for t in personal_states(tmp_path)[client].values()} == {torch.Size([stored.manifest.rank] * 2)}
    scores = evaluate_run(tmp_path, sequential=True)
    for which in ("base", "global", "personal"):
        for client, score in summary["evaluation"][which].items():
            assert scores[which][client]["loss"] == pytest.approx(score["loss"], rel=1e-5)


@pytest.mark.parametrize("rank", [None, 1, 3])
def test_an_exported_adapter_may_be_cut(rank: int | None, llama: str, words: str, tmp_path: Path) -> None:
    run = config(llama, words)
    federate(run, tmp_path)
    stored = adapters.load(tmp_path / "adapters", "client-1")
    basis = load_basis(tmp_path, stored.manifest.basis_fingerprint)
    cut = rank or 3
    source = locate(run.model.source)
    for write in (export_lora, export_core):
        folder = write(stored, basis, tmp_path / write.__name__, rank=rank)
        loaded: Any = PeftModel.from_pretrained(load_model(source, run.model, None, device_of("cpu")), folder)
        session = opened(run)
        zeros = session.layout.unflatten(torch.zeros(session.layout.size))
        for name, core in stored.state.items():
            zeros[name][:cut, :cut] = core[:cut, :cut]
        set_state(session.model, zeros)
        dense = {name: layer.get_delta_weight("default").detach() for name, layer in layers_of(session.model).items()}
        for name, layer in layers_of(loaded).items():
            torch.testing.assert_close(layer.get_delta_weight("default").detach(), dense[name], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(loaded(input_ids=TOKENS).logits, session.model(input_ids=TOKENS).logits, rtol=1e-4, atol=1e-5)
        assert loaded.peft_config["default"].r == cut


def test_the_command_cuts_too(llama: str, words: str, tmp_path: Path) -> None:
    federate(config(llama, words, federation={"rounds": 1}), tmp_path / "run")
    register()
    arguments = ["export", str(tmp_path / "run"), "--client", "client-2", "--out", str(tmp_path / "out"), "--rank", "2"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert "| method | nested-sb, rank 2 |" in (tmp_path / "out" / "client-2" / "README.md").read_text()


def test_what_cannot_be_cut_is_said(llama: str, words: str, tmp_path: Path) -> None:
    federate(config(llama, words, federation={"rounds": 1}), tmp_path / "nested")
    federate(config_of(table(llama, words, federation={"rounds": 1})), tmp_path / "plain")
    for run, rank, complaint in (
        ("nested", 3, "client-0: its rank is 2; give --rank from 1 to that, not 3"),
        ("nested", 0, "not 0"),
        ("plain", 2, "an adapter of method lora-sb cannot be cut to a rank; leave --rank out"),
    ):
        stored = adapters.load(tmp_path / run / "adapters", "client-0")
        basis = load_basis(tmp_path / run, stored.manifest.basis_fingerprint)
        with pytest.raises(StoreError, match=complaint):
            export_lora(stored, basis, tmp_path / "out", rank=rank)


def test_ranks_are_drawn_from_seed_client_and_step(llama: str, words: str) -> None:
    run = config(llama, words, adapter={"nested": True, "rank": 8, "ranks": {"client-0": 5}})
    session = opened(run)
    layer = next(iter(layers_of(session.model).values()))
    drawn = {}
    for client in run.client_names:
        around = at_rank_of(run, session.model, client)
        for number in range(200):
            with around(number):
                drawn.setdefault(client, []).append(layer.cut or 8)
        assert layer.cut is None
        with at_rank_of(run, session.model, client)(17):
            assert (layer.cut or 8) == drawn[client][17]
    assert set(drawn["client-0"]) == set(range(1, 6)) and set(drawn["client-1"]) == set(range(1, 9))
    assert drawn["client-1"] != drawn["client-2"]


def test_a_nested_core_loses_less_when_it_is_cut(llama: str, words: str, tmp_path: Path) -> None:
    """Test loss of cores cut to half and to a quarter of their rank, trained alike but for the draws; sums over three seeds."""
    found = {}
    for nested in (False, True):
        losses = dict.fromkeys((8, 4, 2), 0.0)
        for seed in (1, 2, 3):
            adapter = {"method": "nested-sb", "nested": nested, "rank": 8}
            alone = {"federation": {"clients": 1, "rounds": 1}, "train": {"steps": 120, "batch_size": 8}}
            run = config_of(table(llama, words, adapter=adapter, basis={"source": "weights"}, **alone) | {"seed": seed})
            session, site = opened(run), Site("client-0", 0, tmp_path)
            state = session.layout.unflatten(session.train(site, session.base_vector(), round_plan(run, 1)).vector)
            for rank in losses:
                cut = {name: torch.zeros_like(core) for name, core in state.items()}
                for name, core in state.items():
                    cut[name][:rank, :rank] = core[:rank, :rank]
                losses[rank] += session.score(site, session.layout.flatten(cut)).loss
        found[nested] = losses
    for rank in (4, 2):
        assert found[True][rank] < found[False][rank]


def test_ranks_of_a_clients_own_drawing_are_refused_under_privacy(llama: str, words: str) -> None:
    privacy = {"unit": "record", "epsilon": 8.0}
    with pytest.raises(ConfigError, match="adapter.nested lets each client draw ranks for itself, which privacy.unit"):
        config(llama, words, privacy=privacy, federation={"weighting": "uniform"}, adapter={"nested": True})


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_a_step_moves_its_block_alone_whatever_momentum_there_is(rank: int, llama: str, words: str) -> None:
    session = opened(config(llama, words, adapter={"nested": True, "rank": 8}))
    cores = [layer.core("default").weight for layer in layers_of(session.model).values()]
    optimiser = torch.optim.AdamW(cores, lr=0.1)
    for to in (8, rank):
        before = [core.detach().clone() for core in cores]
        optimiser.zero_grad()
        with cut_to(session.model, to if to < 8 else None):
            session.model(input_ids=TOKENS, labels=TOKENS).loss.backward()
            optimiser.step()
    for core, was in zip(cores, before, strict=True):
        moved = core != was
        assert bool(moved[:rank, :rank].any()) and not bool(moved[rank:].any()) and not bool(moved[:, rank:].any())


def test_what_is_kept_is_what_is_published_under_privacy_too(llama: str, words: str, tmp_path: Path) -> None:
    """Noise beyond a client's rank would be in its own scores and not in its adapter."""
    run = config(llama, words, privacy={"unit": "record", "epsilon": 8.0, "scores": "plain"}, federation={"weighting": "uniform"})
    summary, again = federate(run, tmp_path), evaluate_run(tmp_path, sequential=True)
    for client, score in summary["evaluation"]["personal"].items():
        assert again["personal"][client]["loss"] == pytest.approx(score["loss"], rel=1e-5)


def test_private_by_record(llama: str, words: str, tmp_path: Path) -> None:
    privacy = {"unit": "record", "epsilon": 8.0}
    run = config(llama, words, privacy=privacy, federation={"weighting": "uniform", "rounds": 1})
    federate(run, tmp_path)
    assert len(events(tmp_path, "reply")) == 3
    assert all(bool(core.isfinite().all()) and core.abs().max() > 0 for core in final_state(tmp_path).values())


def test_a_reply_of_another_rank_is_refused(llama: str, words: str, tmp_path: Path) -> None:
    run = config(llama, words, federation={"rounds": 1})
    size = Session(run).layout.size

    def more(kind: str, client: int, reply: Message) -> list[Message]:
        if kind == TRAIN and client == 0:
            reply.content[ARRAYS] = pack_state(torch.zeros(size), "fp32")
        return [reply]

    federate(run, tmp_path, grid=twisted(run, tmp_path, more))
    (refused,) = events(tmp_path, "refused")
    assert (
        refused["client"] == "client-0"
        and f"sent an array of shape ({size},) where ({size // 4},) was expected" == refused["reason"]
    )
    session, site = opened(run), Site("client-0", 0, tmp_path)
    with pytest.raises(AdapterError, match=f"a state of {size // 4} numbers was expected"):
        session.share(site).put(torch.zeros(size), torch.zeros(size))


@pytest.mark.parametrize(
    ("sections", "complaint"),
    [
        ({"adapter": {"ranks": {"client-0": 5}}}, r"gives client-0 rank 5 where adapter\.rank = 4 is the largest"),
        ({"adapter": {"ranks": {"client-0": 0}}}, r"adapter\.ranks\.client-0"),
        ({"adapter": {"method": "lora-sb", "ranks": {}, "nested": True}}, r'adapter\.nested is of adapter\.method = "nested-sb"'),
        (
            {"privacy": {"secure_sum": True}, "federation": {"weighting": "uniform"}},
            r"secure_sum adds up updates of one size",
        ),
        (
            {"privacy": {"unit": "client", "epsilon": 1.0}, "federation": {"weighting": "uniform"}},
            r'privacy\.unit = "client" divides by the planned number',
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(sections: dict[str, Any], complaint: str, llama: str, words: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        config(llama, words, **sections)


def test_a_rank_of_nobody_is_refused_before_anything_is_done(llama: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="adapter.ranks names client-7, which is no client of this federation"):
        federate(config(llama, words, {"client-7": 2}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_one_client_alone_is_local_training_of_its_block(llama: str, words: str, tmp_path: Path) -> None:
    """One client alone: local training of its block."""
    run = config(llama, words, {"client-0": 3}, federation={"clients": 1, "rounds": 2})
    federate(run, tmp_path / "run")
    session, site = opened(run), Site("client-0", 0, tmp_path)
    vector = session.base_vector()
    for number in (1, 2):
        vector = session.train(site, vector, round_plan(run, number)).vector
    assert equal(session.layout.unflatten(vector), final_state(tmp_path / "run"))
