from pathlib import Path
from typing import Any

import pytest
import torch

from fedsb.adapters.attach import attach, initial_state, layout_of, shapes_of
from fedsb.adapters.state import set_state
from fedsb.adapters.tuner import adapted_layers
from fedsb.basis.frames import Basis
from fedsb.basis.spectral import random_basis, weights_basis
from fedsb.config import RunConfig
from fedsb.data.batches import Encoded, encode
from fedsb.data.tasks import load_task
from fedsb.errors import DataError
from fedsb.training.start import MICROBATCH, build_basis, can_rebuild, needs_weights
from tests.adapters.samples import RANK, bert, llama, run_config
from tests.basis.samples import assert_nearly_equal, far_from_orthonormal
from tests.data.test_batches import byte_tokenizer
from tests.reference import batch_loss, farthest_angle, summed_gradient, truncated
from tests.training.samples import task

CPU = torch.device("cpu")
LINES = [{"prompt": f"{a}+{b}?", "completion": f"{a + b}"} for a in range(4) for b in range(3)]


def _model(config: RunConfig, device: str = "cpu", **changes: Any) -> Any:
    with torch.device(device):
        base = bert(**changes) if config.model.kind == "classification" else llama(vocab_size=260, **changes)
    return attach(base, config)


def _build(config: RunConfig, **changes: Any) -> Basis:
    return build_basis(config, _model(config, **changes), byte_tokenizer(), CPU)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_random_basis_needs_no_weights(dtype: str) -> None:
    config = run_config(basis={"source": "random", "dtype": dtype}, seed=4)
    outline = _model(config, device="meta")
    basis = build_basis(config, outline, None, torch.device("meta"))
    expected = random_basis(shapes_of(outline), RANK, 4)
    assert basis.fingerprint == expected.to({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]).fingerprint
    assert _build(config).fingerprint == basis.fingerprint


def test_the_basis_of_the_weights() -> None:
    config = run_config(basis={"source": "weights"}, seed=4)
    layers = {name: layer.get_base_layer() for name, layer in adapted_layers(_model(config)).items()}
    assert_nearly_equal(_build(config), weights_basis(layers, RANK, 4))


def _public(folder: Path, examples: int, seed: int = 0, **basis: Any) -> RunConfig:
    section = {"source": "public", "public": task(folder, *LINES), "examples": examples} | basis
    return run_config(basis=section, seed=seed)


def _rows(config: RunConfig) -> list[Encoded]:
    assert config.basis.public is not None
    sample = config.basis.public.model_copy(update={"train": config.basis.examples})
    examples = load_task(sample, "train", config.seed)
    return encode(examples, byte_tokenizer(), config.data.max_length, None, "causal")


@pytest.mark.parametrize("examples", [1, 2, 6])
def test_the_public_basis_is_that_of_the_gradient_on_the_public_examples(tmp_path: Path, examples: int) -> None:
    config = _public(tmp_path, examples)
    model = _model(config)
    basis = build_basis(config, model, byte_tokenizer(), CPU)
    rows = _rows(config)
    assert len(rows) == examples
    batches = [rows[start : start + MICROBATCH] for start in range(0, examples, MICROBATCH)]
    transformer = model.get_base_model()
    layers = {name: layer.get_base_layer() for name, layer in adapted_layers(model).items()}
    exact = summed_gradient(layers, batches, lambda part: batch_loss(transformer, part))
    for name, matrix in exact.items():
        held = torch.linalg.matrix_norm(basis.B[name].double().T @ matrix @ basis.A[name].double().T)
        assert held > 0.95 * truncated(matrix, RANK)[1].square().sum().sqrt()
    assert far_from_orthonormal(basis) < 1e-5
    assert not any(p.requires_grad for name, p in model.named_parameters() if "fedsb_core" not in name)


def test_public_examples_are_drawn_from_the_whole_file(tmp_path: Path) -> None:
    """Files are often sorted by label; the first examples would all be of one."""
    rows = {seed: [row.prompt for row in _rows(_public(tmp_path, 2, seed=seed))] for seed in range(6)}
    assert len({str(row) for row in rows.values()}) > 1


def test_the_papers_start_is_a_scaled_update(tmp_path: Path) -> None:
    plain, paper = _build(_public(tmp_path, 2)), _build(_public(tmp_path, 2, r0="paper", eta=0.5))
    half = _build(_public(tmp_path, 2, r0="paper", eta=0.25))
    assert not any(r0.any() for r0 in plain.R0.values())
    for name, r0 in paper.R0.items():
        assert (r0.diagonal() > 0).all()
        assert torch.equal(r0, torch.diag(r0.diagonal()))
        torch.testing.assert_close(half.R0[name], r0 / 2, atol=0, rtol=1e-3)


def test_the_sign_step_is_another_basis(tmp_path: Path) -> None:
    plain, sign = _build(_public(tmp_path, 2)), _build(_public(tmp_path, 2, sign=True, r0="paper", eta=1.0))
    name = next(iter(plain.B))
    assert farthest_angle(plain.B[name], sign.B[name]) > 0.1
    rank_one = float(sign.R0[name][0, 0])  # a matrix of signs has a Frobenius norm of √(out·in)
    assert rank_one <= (32 * 32) ** 0.5 * 1.001


def test_the_public_basis_of_a_classifier_is_that_of_the_head_it_starts_from(tmp_path: Path) -> None:
    """A new head comes from transformers with chance numbers; the estimate must not depend on them."""
    public = task(tmp_path, *({"text": f"text {i}", "label": i % 3} for i in range(4)))
    basis = {"source": "public", "public": public}
    config = run_config(model={"kind": "classification"}, data={"tasks": [public]}, basis=basis)
    bases = []
    for seed in (1, 2):
        model = _model(config, vocab_size=260)
        torch.manual_seed(seed)
        head = initial_state(layout_of(model), seed)
        set_state(model, head)
        bases.append(build_basis(config, model, byte_tokenizer(), CPU))
    for name in bases[0].B:
        assert farthest_angle(bases[0].B[name][:, :1], bases[1].B[name][:, :1]) < 1e-3


def test_public_examples_that_are_missing(tmp_path: Path) -> None:
    config = _public(tmp_path, 2)
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(DataError, match="holds no rows"):
        _build(config)


def test_what_each_source_needs(tmp_path: Path) -> None:
    configs = [run_config(basis={"source": source}) for source in ("random", "weights")] + [_public(tmp_path, 1)]
    assert [can_rebuild(config) for config in configs] == [True, True, False]
    assert [needs_weights(config) for config in configs] == [False, True, True]
