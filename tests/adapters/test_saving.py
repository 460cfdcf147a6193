"""`save_pretrained` and `from_pretrained`: what comes back, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from fedsb.adapters.state import get_state
from fedsb.adapters.tuner import adapted_layers, basis_of, set_basis
from fedsb.basis.spectral import random_basis
from fedsb.errors import BasisError
from tests.adapters.samples import RANK, adapted, also, bert, llama, randomise, same, tokens

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def _saved(folder: Path, model: PeftModel) -> Path:
    model.save_pretrained(folder)
    return folder


def _rewritten(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def _is_the_same(loaded: PeftModel, saved: PeftModel) -> bool:
    logits = [model(tokens()).logits for model in (loaded, saved)]
    return same(get_state(loaded), get_state(saved)) and torch.equal(*logits)


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("save_basis", [False, True])
@pytest.mark.parametrize("basis", ["random", "weights"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_adapter_comes_back(tmp_path: Path, basis: str, dtype: str, save_basis: bool, low_memory: bool) -> None:
    saved = adapted(llama(), basis=basis, basis_dtype=dtype, seed=7, save_basis=save_basis)
    _saved(tmp_path, saved)
    loaded = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=low_memory)
    assert basis_of(loaded).fingerprint == basis_of(saved).fingerprint == saved.peft_config["default"].basis_fingerprint
    assert _is_the_same(loaded, saved)
    assert {p.device.type for p in loaded.parameters()} == {"cpu"}
    assert not any(p.requires_grad for p in loaded.parameters())


def test_a_file_holds_cores_in_fp32_and_the_basis_in_its_own_dtype(tmp_path: Path) -> None:
    model = adapted(llama(torch.bfloat16), basis_dtype="bf16")
    weights = load_file(_saved(tmp_path, model) / WEIGHTS)
    for name, layer in adapted_layers(model).items():
        path = f"base_model.model.{name}.fedsb"
        assert torch.equal(weights.pop(f"{path}_core.weight"), layer.core("default").weight)
        assert torch.equal(weights.pop(f"{path}_B"), layer.frames("default").B)
        assert torch.equal(weights.pop(f"{path}_A"), layer.frames("default").A)
    assert not weights


def test_a_file_without_basis_is_as_small_as_its_cores(tmp_path: Path) -> None:
    model = adapted(llama(), save_basis=False)
    weights = load_file(_saved(tmp_path, model) / WEIGHTS)
    assert {tuple(tensor.shape) for tensor in weights.values()} == {(RANK, RANK)}
    assert len(weights) == 14


def test_a_bf16_basis_on_an_fp32_model_is_saved_without_loss(tmp_path: Path) -> None:
    model = adapted(llama(), basis_dtype="bf16")
    weights = load_file(_saved(tmp_path, model) / WEIGHTS)
    assert {t.dtype for name, t in weights.items() if not name.endswith("core.weight")} == {torch.bfloat16}
    assert basis_of(model).fingerprint == model.peft_config["default"].basis_fingerprint


def test_an_fp32_basis_on_a_bf16_model_loses_nothing(tmp_path: Path) -> None:
    model = adapted(llama(torch.bfloat16), basis_dtype="fp32")
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in adapted_layers(model).items()}
    expected = random_basis(shapes, RANK, 0).fingerprint
    assert basis_of(model).fingerprint == model.peft_config["default"].basis_fingerprint == expected
    loaded = PeftModel.from_pretrained(llama(torch.bfloat16), _saved(tmp_path, model))
    assert basis_of(loaded).fingerprint == expected
    assert _is_the_same(loaded, model)


def test_a_given_basis_comes_back(tmp_path: Path) -> None:
    model = adapted(llama(), basis="later")
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in adapted_layers(model).items()}
    set_basis(model, random_basis(shapes, RANK, 123))
    randomise(model, "default", 5)
    loaded = PeftModel.from_pretrained(llama(), _saved(tmp_path, model))
    assert _is_the_same(loaded, model)


def test_a_given_basis_that_was_not_saved_is_missed(tmp_path: Path) -> None:
    model = adapted(llama(), basis="later", save_basis=False)
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in adapted_layers(model).items()}
    set_basis(model, random_basis(shapes, RANK, 123))
    with pytest.raises(BasisError, match="this file holds no basis, and none can be rebuilt"):
        PeftModel.from_pretrained(llama(), _saved(tmp_path, model))


def test_a_trained_head_comes_back(tmp_path: Path) -> None:
    saved = adapted(bert(), task_type="SEQ_CLS")
    loaded = PeftModel.from_pretrained(bert(), _saved(tmp_path, saved))
    assert "head.classifier.weight" in get_state(loaded)
    assert _is_the_same(loaded, saved)


def test_a_loaded_adapter_can_be_trained_on(tmp_path: Path) -> None:
    loaded = PeftModel.from_pretrained(llama(), _saved(tmp_path, adapted(llama())), is_trainable=True)
    trained = [name for name, p in loaded.named_parameters() if p.requires_grad]
    assert len(trained) == 14
    assert all("fedsb_core" in name for name in trained)


@pytest.mark.parametrize("low_memory", [False, True])
def test_a_second_file_on_the_same_basis_shares_it(tmp_path: Path, low_memory: bool) -> None:
    model = adapted(llama())
    also(model, "second", 2)
    _saved(tmp_path, model)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    loaded.load_adapter(tmp_path / "second", "second", low_cpu_mem_usage=low_memory)
    assert same(get_state(loaded, "second"), get_state(model, "second"))
    assert not any(p.requires_grad for p in loaded.parameters())
    for layer in adapted_layers(loaded).values():
        assert layer.frames("second") is layer.frames("default")


@pytest.mark.parametrize("basis", ["random", "weights"])
def test_a_basis_rebuilt_from_another_seed_or_model_is_refused(tmp_path: Path, basis: str) -> None:
    _saved(tmp_path, adapted(llama(), basis=basis, save_basis=False, seed=7))
    other = llama()
    if basis == "random":
        _rewritten(tmp_path, seed=8)
    else:
        other.model.layers[0].mlp.up_proj.weight += 1e-3 * torch.randn(48, 32)
    with pytest.raises(BasisError, match=f'basis = "{basis}" and seed = . is not the one this core was trained on'):
        PeftModel.from_pretrained(other, tmp_path)


@pytest.mark.parametrize("change", ["number", "dtype", "lost layer", "lost side", "stranger"])
def test_a_tampered_basis_is_refused(tmp_path: Path, change: str) -> None:
    path = _saved(tmp_path, adapted(llama())) / WEIGHTS
    weights = load_file(path)
    b, a = (f"base_model.model.model.layers.1.mlp.up_proj.fedsb_{side}" for side in "BA")
    if change == "number":
        weights[a][1, 2] += 1e-6
    elif change == "dtype":
        weights = {name: t.bfloat16() if name in (a, b) else t for name, t in weights.items()}
    elif change == "stranger":
        weights[b.replace("layers.1", "layers.2")] = weights[b].clone()
    else:
        for name in (b,) if change == "lost side" else (b, a):
            del weights[name]
    save_file(weights, path)
    with pytest.raises(BasisError, match="the basis in this file is not the one its core was trained on"):
        PeftModel.from_pretrained(llama(), tmp_path)


def test_a_wrong_fingerprint_is_refused(tmp_path: Path) -> None:
    _rewritten(_saved(tmp_path, adapted(llama())), basis_fingerprint="00" * 32)
    with pytest.raises(BasisError, match="the basis in this file is not the one"):
        PeftModel.from_pretrained(llama(), tmp_path)


LOAD_WITHOUT_US = """
import sys
from transformers import LlamaConfig, LlamaForCausalLM
from peft import PeftModel
model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                                     num_key_value_heads=2, vocab_size=64))
assert not any(name.startswith("fedsb") for name in sys.modules)
PeftModel.from_pretrained(model, sys.argv[1])
"""


def test_an_unmodified_peft_refuses_the_file(tmp_path: Path) -> None:
    _saved(tmp_path, adapted(llama()))
    run = subprocess.run([sys.executable, "-c", LOAD_WITHOUT_US, tmp_path], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "FEDSB" in run.stderr.splitlines()[-1]
