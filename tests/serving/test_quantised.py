"""Tenants over a base model of fewer bits: what each adds is what it would add to the same quantised weights, alone."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedsb.errors import ConfigError
from fedsb.models import Source, load_model
from fedsb.quantisation import KINDS, Quantised, quantisation
from fedsb.sections import ModelSection
from fedsb.serving.bank import Bank
from fedsb.serving.engine import Engine, Limits, Sampling
from fedsb.serving.mixed import mix
from fedsb.store.adapters import StoredAdapter
from tests.adapters.samples import llama
from tests.serving.test_engine import Answer
from tests.serving.test_mixed import TOKENS, adapter, basis_of, dense, logits

SIZES = {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 512}
LAYERS = {"model.layers.0.self_attn.q_proj": (64, 64), "model.layers.1.mlp.down_proj": (64, 128)}
DTYPES: dict[Quantised, str] = {"int8": "fp32", "int4": "bf16", "nf4": "fp32"}  # int4 multiplies in bf16 alone
ALLOWED: dict[Quantised, float] = {
    "int8": 1e-5,
    "int4": 0.03,
    "nf4": 0.03,
}  # of the logits' norm; nf4's kernel rounds to bf16 too
METHODS = ("lora-sb", "lora", "flora")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("quantised") / "model"
    llama(**SIZES).save_pretrained(folder)
    return Source("tiny", folder, "0" * 64)


def loaded(source: Source, kind: Quantised) -> Any:
    return load_model(source, ModelSection(dtype=DTYPES[kind]), None, torch.device("cpu"), kind)  # type: ignore[arg-type]


def plain(model: Any) -> Any:
    """The same model with plain weights that have the values of the quantised ones."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name != "lm_head":
            dtype = model.dtype
            usual = nn.Linear(layer.in_features, layer.out_features, bias=False, dtype=dtype)
            usual.weight = nn.Parameter(layer(torch.eye(layer.in_features, dtype=dtype)).mT.contiguous(), requires_grad=False)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, usual)
    return model


@pytest.fixture(scope="module")
def tenants() -> list[tuple[StoredAdapter, Any]]:
    bases = [basis_of(method, layers=LAYERS) for method in METHODS]
    return [
        (adapter(method, basis, seed, layers=LAYERS), basis)
        for seed, (method, basis) in enumerate(zip(METHODS, bases, strict=True))
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_each_row_is_as_its_tenant_alone_on_the_same_weights(kind: Quantised, source: Source, tenants: Any) -> None:
    bank = Bank(5)
    model = mix(loaded(source, kind), bank)
    places = [None, *(bank.add(*each) for each in tenants)]
    with bank.using(places):
        together = logits(model, TOKENS).float()
    for row, each in enumerate([None, *tenants]):
        alone = plain(loaded(source, kind))
        expected = logits(dense(alone, *each) if each else alone, TOKENS[row : row + 1]).float()[0]
        allowed = ALLOWED[kind] * expected.norm()
        assert (together[row] - expected).norm() < allowed
        if each:
            base = logits(plain(loaded(source, kind)), TOKENS[row : row + 1]).float()[0]
            assert (expected - base).norm() > 3 * allowed
    full = logits(llama(**SIZES), TOKENS[:1]).float()[0]
    assert (together[0] - full).abs().max() > 0.01  # so it was quantised
    assert (together[0] - full).norm() < 0.4 * full.norm()


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_the_engine_answers_as_each_tenant_alone(kind: Quantised, source: Source, tenants: Any) -> None:
    bank = Bank(5)
    model = mix(loaded(source, kind), bank)
    places = [None, *(bank.add(*each) for each in tenants)]
    engine = Engine(model, bank, Limits(8, 32, 1024, 8))
    try:
        answers = [Answer() for _ in places]
        for place, answer in zip(places, answers, strict=True):
            engine.submit([5, 6, 7], Sampling(8), place, answer)
        for each, answer in zip([None, *tenants], answers, strict=True):
            answer.wait()
            alone = plain(loaded(source, kind))
            model = dense(alone, *each) if each else alone
            mask = torch.ones(1, 3, dtype=torch.int64)
            found = model.generate(
                torch.tensor([[5, 6, 7]]),
                attention_mask=mask,
                max_new_tokens=8,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=None,
            )
            assert answer.tokens == found[0, 3:].tolist()
    finally:
        engine.close()


def test_weights_take_the_memory_of_their_bits(source: Source) -> None:
    def bytes_of(tensor: torch.Tensor) -> int:
        names = getattr(tensor, "tensor_data_names", None)
        if names is None and hasattr(tensor, "__tensor_flatten__"):
            names = tensor.__tensor_flatten__()[0]
        return sum(bytes_of(getattr(tensor, name)) for name in names) if names else tensor.numel() * tensor.element_size()

    found = {kind: bytes_of(loaded(source, kind).model.layers[0].self_attn.q_proj.weight.data) for kind in KINDS}
    assert found["int8"] <= 64 * 64 + 4 * 64  # a byte a weight, a scale a row
    assert found["int4"] <= 64 * 64 // 2 + 4 * 64 * 2  # and scale and zero of 32 weights
    assert found["nf4"] == 64 * 64 // 2


def test_what_cannot_be_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="int4 multiplies in bf16 alone; choose --dtype bf16"):
        quantisation("int4", torch.float32, torch.device("cpu"))
    with pytest.raises(
        ConfigError, match="layers.0.self_attn.q_proj of LlamaForCausalLM has 32 inputs, and nf4 takes multiples of 64"
    ):
        odd = tmp_path / "odd"
        llama().save_pretrained(odd)
        loaded(Source("odd", odd, "0" * 64), "nf4")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"nf4 needs bitsandbytes, which is not installed; pip install 'fedsb\[quantised\]'"):
        quantisation("nf4", torch.float32, torch.device("cpu"))
