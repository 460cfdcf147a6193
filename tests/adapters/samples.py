"""Tiny random models, their adapters, and the configurations that go with them."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import fedsb.adapters.tuner  # noqa: F401  teaches PEFT our format
from fedsb.abilities import FUSING
from fedsb.adapters.lora_sb import LoraSbConfig
from fedsb.adapters.state import parameters_of
from fedsb.config import RunConfig

RANK = 4
VOCABULARY = 64
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def frozen(model: nn.Module, dtype: torch.dtype = torch.float32) -> Any:
    """As `fedsb.models` hands a model out."""
    return model.to(dtype).requires_grad_(False).eval()


def llama(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Two layers, hidden size 32; always the same weights."""
    settings = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,  # wide, so that logits differ by more than rounding
    }
    torch.manual_seed(0)
    return frozen(LlamaForCausalLM(LlamaConfig(**(settings | changes))), dtype)


def gpt2(**changes: Any) -> Any:
    """Two layers with Conv1D instead of linear layers; the head is the embedding."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=64, **changes)
    return frozen(GPT2LMHeadModel(config))


def bert(labels: int = 3, **changes: Any) -> Any:
    """A classifier, whose pooler takes (B, d) inputs."""
    torch.manual_seed(0)
    settings = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 32,
        "num_labels": labels,
        "initializer_range": 0.2,
    }
    return frozen(BertForSequenceClassification(BertConfig(**(settings | changes))))


def adapted(model: Any, *, random: bool = True, **settings: Any) -> PeftModel:
    """The model with an adapter of rank 4 named default; `random` gives it random cores instead of zero."""
    peft_model = get_peft_model(model, LoraSbConfig(**({"r": RANK} | settings))).eval()
    if random:
        randomise(peft_model, "default", 1)
    return peft_model


def also(model: PeftModel, name: str, draw: int, **settings: Any) -> None:
    """Add an adapter with random cores (and a random head, if it has one)."""
    model.add_adapter(name, LoraSbConfig(**({"r": RANK} | settings)))
    randomise(model, name, draw)
    model.eval()


def randomise(model: nn.Module, adapter: str, seed: int) -> None:
    """Random numbers into every trained tensor of an adapter."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters_of(model, adapter).values():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))


def check_differences(loss: Callable[[], Tensor], places: Iterable[tuple[Tensor, Iterable[tuple[int, ...]]]]) -> None:
    """Hold the gradients of an fp64 loss against central differences, at some places of some tensors."""
    loss().backward()  # type: ignore[no-untyped-call]
    for tensor, some in places:
        for place in some:
            with torch.no_grad():
                tensor[place] += 1e-5
                above = loss()
                tensor[place] -= 2e-5
                below = loss()
                tensor[place] += 1e-5
            assert tensor.grad is not None
            assert float((above - below) / 2e-5) == pytest.approx(float(tensor.grad[place]), rel=1e-6, abs=1e-6)


def tokens(rows: int = 2, width: int = 5, seed: int = 0) -> Tensor:
    """Random ids (rows, width), without 0 to 2."""
    return torch.randint(3, VOCABULARY, (rows, width), generator=torch.Generator().manual_seed(seed))


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two states are equal bit for bit."""
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer that must not change, copied; cores and heads are `get_state`'s."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


def run_config(**sections: Any) -> RunConfig:
    """A configuration with `basis.dtype = "fp32"` and rank 4 unless told otherwise; a value may be a section's dict."""
    table: dict[str, Any] = {
        "name": "test",
        "data": {"tasks": [{"name": "t", "source": "jsonl:nowhere"}]},
        "adapter": {"rank": RANK},
        "basis": {"dtype": "fp32"},
    }
    for key, value in sections.items():
        table[key] = table.get(key, {}) | value if isinstance(value, dict) else value
    if table["adapter"].get("method") in FUSING:
        table["adapter"] = {"heads": 2} | table["adapter"]
        table["basis"] |= {"source": "pool", "pool": "nowhere"}
    return RunConfig.model_validate(table)
