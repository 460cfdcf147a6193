"""Federations with RAVAN, whose state is the products of what is trained."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from clients.session import Site
from fedsb.adapters.ravan import HEADS, SCALES
from fedsb.adapters.state import set_state
from fedsb.errors import AdapterError, BasisError
from fedsb.store import adapters
from fedsb.store.basis_files import load_basis
from fedsb.store.export import export_lora
from fedsb.store.tensors import load_tensors
from fedsb.training.loop import largest_update, round_plan
from strategies.sums import fixed_point_of
from tests.federation.test_methods import config, opened
from tests.federation.tiny import events, federate, final_state


def test_it_starts_each_round_from_the_products_and_comes_only_as_far_as_both_can_take_it(
    llama: str, words: str, tmp_path: Path
) -> None:
    """Steps so long that scales and heads both move by more than a state's own numbers could."""
    run = config(llama, words, "ravan", train={"learning_rate": 0.5, "steps": 3, "warmup_steps": 0}, federation={"rounds": 3})
    summary = federate(run, tmp_path)
    assert not events(tmp_path, "refused") and summary["aggregation_error"] < 1e-6
    plan = round_plan(run, 3)
    step = largest_update(plan)[0]
    before = load_tensors(tmp_path / "checkpoints" / "round-0002" / "state.safetensors")[0]
    session = opened(run, before)
    vector = session.train(Site("client-0", 0, tmp_path), session.layout.flatten(before), plan).vector
    after = session.layout.unflatten(vector)
    assert max(float((after[name] - before[name]).abs().max()) for name in before) > step, "more than a number alone could move"
    for name, core in session.parameters.items():
        if name.endswith(SCALES):
            heads = session.parameters[name.removesuffix(SCALES) + HEADS]
            torch.testing.assert_close(after[name.removesuffix(SCALES) + HEADS], (core[:, None, None] * heads).detach())
            assert (core - 1).abs().max() > 0.1
    set_state(session.model, before)
    assert all(bool((p == 1).all()) for name, p in session.parameters.items() if name.endswith(SCALES))
    most = fixed_point_of(run, 3, 3, session.layout.flatten(before)).bound
    assert step < float((vector - session.layout.flatten(before)).abs().max()) <= most


def test_it_under_a_secure_sum_is_what_it_is_without(llama: str, words: str, tmp_path: Path) -> None:
    """Numbers that moved beyond the bound would be cut off."""
    sections: dict[str, Any] = {"federation": {"weighting": "uniform"}, "train": {"learning_rate": 0.5, "steps": 3}}
    for name, privacy in (("plain", {}), ("secure", {"secure_sum": True})):
        federate(config(llama, words, "ravan", **sections, privacy=privacy), tmp_path / name)
    plain, secure = (final_state(tmp_path / name) for name in ("plain", "secure"))
    for name in plain:
        torch.testing.assert_close(secure[name], plain[name], atol=1e-4, rtol=1e-4)


def test_heads_that_do_not_fit_the_rank_or_the_basis_are_refused(llama: str, words: str, tmp_path: Path) -> None:
    federate(config(llama, words, "ravan", federation={"rounds": 1}), tmp_path)
    stored = adapters.load(tmp_path / "adapters", "client-0")
    basis = load_basis(tmp_path, stored.manifest.basis_fingerprint)
    with pytest.raises(AdapterError, match="has shape .* where rank 4 is said"):
        adapters.publish(
            tmp_path / "store",
            "client-0",
            {name: t[0] for name, t in stored.state.items()},
            base_model=stored.manifest.base_model,
            method="ravan",
            rank=4,
            basis_fingerprint=stored.manifest.basis_fingerprint,
            round=1,
            task="words",
        )
    broken = dataclasses.replace(stored, state={name: t[:2] for name, t in stored.state.items()})
    with pytest.raises(BasisError, match=r"rank 8\) lacks the layers or the rank of its basis \(14 layers, rank 16\)"):
        export_lora(broken, basis, tmp_path / "broken")
