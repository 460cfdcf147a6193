"""Bone's updates as plain LoRA: what is said to be lost is what an unmodified PEFT's weights lack."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from fedsb.adapters.methods import METHODS
from fedsb.basis.frames import Basis
from fedsb.errors import AdapterError, BasisError, StoreError
from fedsb.store.adapters import StoredAdapter, load
from fedsb.store.export import export_core, export_lora
from tests.reference import bone_update
from tests.store.samples import RANK, linear_shapes, publish

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
EMPTY = Basis({}, {}, {})
FORMS = pytest.mark.parametrize("form", ["column", "row"])


def _llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2)).eval()


def _weights(model: Any) -> dict[str, Tensor]:
    return {name: model.get_submodule(name).weight.detach() for name in linear_shapes(model) if name != "lm_head"}


def _stored(tmp_path: Path, form: str, size: float = 0.1, **published: Any) -> StoredAdapter:
    draw, part, side = torch.Generator().manual_seed(1), "bone" if form == "column" else "bone_row", 0 if form == "column" else 1
    state = {
        f"{name}.{part}": size * torch.randn(weight.shape[side] // RANK, RANK, RANK, generator=draw)
        for name, weight in _weights(_llama()).items()
    }
    method = "bone" if form == "column" else "bone-row"
    publish(tmp_path / "store", "hospital-a", state, EMPTY.fingerprint, method=method, **published)
    return load(tmp_path / "store", "hospital-a")


def _updates(stored: StoredAdapter, form: str) -> dict[str, Tensor]:
    weights = _weights(_llama())
    return {name: bone_update(weights[name], next(iter(parts.values())), form) for name, parts in stored.layers.items()}


def _lost(out: Path, updates: dict[str, Tensor]) -> float:
    """‖ΔW - B·A‖ / ‖ΔW‖ of what an unmodified PEFT makes of a folder."""
    loaded = PeftModel.from_pretrained(_llama(), str(out))
    lost = whole = 0.0
    for name, update in updates.items():
        layer = loaded.get_submodule(f"base_model.model.{name}")
        lost += float((update - layer.get_delta_weight("default").detach().double()).square().sum())
        whole += float(update.square().sum())
    return float((lost / whole) ** 0.5)


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rank", "expected"), [(None, 2 * RANK), (1, 1), (20, 20), (32, 32)])
def test_the_loss_that_is_stated_is_the_true_one(
    tmp_path: Path, form: str, dtype: torch.dtype, rank: int | None, expected: int
) -> None:
    stored = _stored(tmp_path, form)
    updates = _updates(stored, form)
    out = export_lora(stored, EMPTY, tmp_path / "out", dtype, weights=_weights(_llama()), rank=rank)
    said = json.loads((out / "manifest.json").read_text())["truncated"]
    config = json.loads((out / "adapter_config.json").read_text())
    assert said["rank"] == config["r"] == config["lora_alpha"] == expected
    least = sum(float(torch.linalg.svdvals(update)[expected:].square().sum()) for update in updates.values())
    least = (least / sum(float(update.square().sum()) for update in updates.values())) ** 0.5
    assert said["relative_loss"] == pytest.approx(_lost(out, updates), rel=1e-3, abs=1e-6)
    assert least - 1e-6 <= said["relative_loss"] <= 1.02 * least + (1e-6 if dtype == torch.float32 else 5e-3)
    assert expected == 32 or least > 0.02
    card = (out / "README.md").read_text()
    assert f"to rank {expected}: {said['relative_loss']:.2%} of the update's norm is lost" in card
    assert METHODS[stored.manifest.method].says in card and "arXiv" not in card


@FORMS
def test_a_large_default_rank_is_that_of_the_largest_layer(tmp_path: Path, form: str) -> None:
    stored = _stored(tmp_path, form)
    narrow = {name: weight for name, weight in _weights(_llama()).items() if name.endswith("k_proj")}
    part = StoredAdapter({n: t for n, t in stored.state.items() if ".k_proj." in n}, stored.manifest)
    wide = StoredAdapter(part.state, part.manifest.model_copy(update={"rank": 16}))
    out = export_lora(wide, EMPTY, tmp_path / "out", weights=narrow)
    said = json.loads((out / "manifest.json").read_text())["truncated"]
    assert said["rank"] == 16 and said["relative_loss"] < 1e-6


def test_an_untrained_adapter_loses_nothing(tmp_path: Path) -> None:
    stored = _stored(tmp_path, "row", size=0.0)
    out = export_lora(stored, EMPTY, tmp_path / "out", weights=_weights(_llama()))
    assert json.loads((out / "manifest.json").read_text())["truncated"]["relative_loss"] == 0


def test_it_is_the_same_each_time(tmp_path: Path) -> None:
    stored = _stored(tmp_path, "column")
    files = [
        (export_lora(stored, EMPTY, tmp_path / name, weights=_weights(_llama())) / "adapter_model.safetensors").read_bytes()
        for name in ("one", "two")
    ]
    assert files[0] == files[1]


@FORMS
def test_what_does_not_fit_is_refused_and_nothing_is_written(tmp_path: Path, form: str) -> None:
    stored, weights, out = _stored(tmp_path, form), _weights(_llama()), tmp_path / "out"
    for rank in (33, 0):
        with pytest.raises(StoreError, match=f"--rank {rank}: .* at most rank 32; take 1 to 32"):
            export_lora(stored, EMPTY, out, weights=weights, rank=rank)
    last = list(weights)[-1]
    with pytest.raises(BasisError, match=f"layer {last} is not in the base model"):
        export_lora(stored, EMPTY, out, weights={name: weight for name, weight in weights.items() if name != last})
    with pytest.raises(BasisError, match="is not in the base model"):
        export_lora(stored, EMPTY, out)
    with pytest.raises(AdapterError, match="are not of a layer of"):
        export_lora(stored, EMPTY, out, weights=weights | {last: torch.ones(64, 64)})
    with pytest.raises(StoreError, match="has no cores"):
        export_core(stored, EMPTY, out)
    assert not out.exists()
