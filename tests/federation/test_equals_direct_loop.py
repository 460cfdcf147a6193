"""The federation through Flower's messages against one loop over plain functions, written out below."""

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsb.adapters.attach import attach, initial_state, layout_of
from fedsb.adapters.state import get_state, parameters_of, set_state
from fedsb.adapters.tuner import set_basis
from fedsb.config import RunConfig
from fedsb.data.batches import encode
from fedsb.data.sites import all_parts
from fedsb.data.tasks import label_names
from fedsb.models import load_model, load_tokenizer, locate
from fedsb.store.files import read_json
from fedsb.store.tensors import load_tensors
from fedsb.training.loop import Plan, personal_plan, round_plan, train
from fedsb.training.start import build_basis
from tests.federation.tiny import (
    State,
    classification,
    config_of,
    equal,
    federate,
    final_state,
    personal_states,
    table,
)

CPU = torch.device("cpu")


def direct(config: RunConfig) -> tuple[list[State], dict[str, State]]:
    """The global state after every round, and the personal states, without Flower, sessions, grids or checkpoints."""
    kind, source = config.model.kind, locate(config.model.source)
    labels = len(label_names(config.data.tasks[0])) if kind == "classification" else None
    tokenizer = load_tokenizer(source)
    model = attach(load_model(source, config.model, labels, CPU), config, tokenizer)
    basis = build_basis(config, model, tokenizer, CPU)
    set_basis(model, basis)
    data = [
        encode(part, tokenizer, config.data.max_length, config.data.system_prompt, kind) for part in all_parts(config, "train")
    ]

    def local(state: State, client: int, plan: Plan) -> State:
        set_state(model, state)
        train(
            model.get_base_model(),
            parameters_of(model),
            data[client],
            plan,
            kind=kind,
            pad_id=tokenizer.pad_token_id,
            seed=config.seed,
            client=config.client_names[client],
        )
        return get_state(model)

    def travelled(state: State) -> State:
        if config.federation.wire_dtype == "fp32":
            return state
        return {name: tensor.to(torch.bfloat16).float() for name, tensor in state.items()}

    state = initial_state(layout_of(model), config.seed) | {f"{name}.core": r0 for name, r0 in basis.R0.items()}
    rounds: list[State] = []
    everybody = list(range(config.federation.clients))
    for number in range(1, config.federation.rounds + 1):
        wanted = math.ceil(config.federation.fraction * len(everybody))
        chosen = random.Random(f"{config.seed}:sample:{number}").sample(everybody, wanted)
        states = [travelled(local(state, client, round_plan(config, number))) for client in sorted(chosen)]
        by_examples = config.federation.weighting == "examples"
        weights = [float(len(data[client])) if by_examples else 1.0 for client in sorted(chosen)]
        mean = {}
        for name in state:
            total = torch.zeros_like(state[name], dtype=torch.float64)
            for one, weight in zip(states, weights, strict=True):
                total += weight * one[name].double()
            mean[name] = (total / sum(weights)).float()
        state = travelled(mean)
        rounds.append(state)
    personal = {config.client_names[i]: local(state, i, personal_plan(config)) for i in everybody}
    return rounds, personal


def same_as_direct(config: RunConfig, out: Path) -> dict[str, Any]:
    summary = federate(config, out)
    rounds, personal = direct(config)
    for number, state in enumerate(rounds, 1):
        assert equal(load_tensors(out / f"checkpoints/round-{number:04d}/state.safetensors")[0], state), number
    assert any(tensor.abs().max() > 1e-3 for tensor in rounds[-1].values())
    published = personal_states(out)
    assert published.keys() == personal.keys()
    assert all(equal(published[name], personal[name]) for name in personal)
    return summary


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_clients_on_a_grid_equal_one_direct_loop_bit_for_bit(
    llama: str, words: str, out: Path, weighting: str, fraction: float
) -> None:
    federation = {"weighting": weighting, "fraction": fraction}
    summary = same_as_direct(config_of(table(llama, words, federation=federation)), out)
    assert [entry["clients"] for entry in summary["history"]] == [math.ceil(3 * fraction)] * 3


def test_weighting_decides_the_result(llama: str, words: str, tmp_path: Path) -> None:
    for weighting in ("examples", "uniform"):
        federate(config_of(table(llama, words, federation={"weighting": weighting})), tmp_path / weighting)
    assert not equal(final_state(tmp_path / "examples"), final_state(tmp_path / "uniform"))


def test_a_trained_head_travels_along(bert: str, labels: str, out: Path) -> None:
    config = config_of(classification(bert, labels, federation={"fraction": 0.5}))
    summary = same_as_direct(config, out)
    state = final_state(out)
    head = {name for name in state if name.startswith("head.")}
    assert head == {"head.classifier.weight", "head.classifier.bias"}
    assert state["head.classifier.weight"].shape == (3, 32) and state["head.classifier.bias"].abs().max() > 0
    assert summary["trainable_parameters"] == sum(tensor.numel() for tensor in state.values())


def test_cores_may_travel_in_bf16(llama: str, words: str, out: Path) -> None:
    summary = same_as_direct(config_of(table(llama, words, federation={"wire_dtype": "bf16"})), out)
    full = federate(config_of(table(llama, words)), out.with_name("fp32"))
    saved = full["bytes"]["up_per_client_round"] - summary["bytes"]["up_per_client_round"]
    assert saved == 2 * summary["trainable_parameters"] + 128  # bf16 is sent raw, fp32 with NumPy's header


def test_base_global_and_personal_are_scored_on_every_clients_own_tests(llama: str, words: str, out: Path) -> None:
    summary = federate(config_of(table(llama, words)), out)
    evaluation = summary["evaluation"]
    assert set(evaluation) == {"base", "global", "personal"}
    for scores in evaluation.values():
        assert set(scores) == {"client-0", "client-1", "client-2"}
        assert sum(score["n"] for score in scores.values()) == 9
        assert {score["task"] for score in scores.values()} == {"words"}
    losses = {which: [scores[c]["loss"] for c in sorted(scores)] for which, scores in evaluation.items()}
    assert losses["base"] != losses["global"] != losses["personal"]
    assert sum(losses["personal"]) < sum(losses["base"])


def test_the_summary_has_its_promised_keys(llama: str, words: str, out: Path) -> None:
    federate(config_of(table(llama, words, federation={"rounds": 1})), out)
    summary = read_json(out / "summary.json")
    assert set(summary) >= {
        "model", "method", "rank", "seed", "clients", "rounds", "trainable_parameters", "bytes", "aggregation_error",
        "evaluation", "privacy", "seconds", "versions",
    }  # fmt: skip
    assert set(summary["model"]) == {"name", "sha256"}
    assert set(summary["bytes"]) == {"basis", "up", "down", "up_per_client_round"}
    assert 0 < summary["aggregation_error"] < 1e-6


def test_personal_steps_zero_publishes_the_global_core(llama: str, words: str, out: Path) -> None:
    federate(config_of(table(llama, words, personal={"steps": 0})), out)
    state = final_state(out)
    assert all(equal(personal, state) for personal in personal_states(out).values())
    for line in (out / "events.jsonl").read_text().splitlines():
        assert "NaN" not in line


@pytest.mark.parametrize("source", ["weights", "public"])
def test_every_basis_source_equals_the_direct_loop(llama: str, words: str, out: Path, source: str) -> None:
    basis: dict[str, Any] = {"source": source}
    if source == "public":
        basis |= {"public": {"name": "open", "source": words}, "examples": 8, "r0": "paper", "eta": 1e-3}
    same_as_direct(config_of(table(llama, words, basis=basis, federation={"rounds": 2})), out)
