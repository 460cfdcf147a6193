"""LoRA-GA alone, as PEFT's LoRA that starts elsewhere; in federations: tests/federation/test_folds.py."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from fedsb.adapters.lora_ga import begin_at_gradient
from fedsb.errors import BasisError
from tests.adapters.samples import llama, tokens

TARGETS = ["q_proj", "v_proj", "down_proj"]


def lora(**told: Any) -> Any:
    return get_peft_model(llama(), LoraConfig(r=2, lora_alpha=6, use_rslora=True, target_modules=TARGETS, **told))


def loss_of(model: Any) -> Any:
    return lambda batch: model(input_ids=batch, labels=batch).loss


def test_it_starts_at_the_base_model_and_in_the_directions_of_its_gradient() -> None:
    plain, model = llama(), lora()
    begin_at_gradient(model, [tokens()[:1], tokens()[1:]], loss_of(model))
    torch.testing.assert_close(model(input_ids=tokens()).logits, plain(input_ids=tokens()).logits, rtol=1e-4, atol=1e-5)
    weight = plain.model.layers[0].self_attn.q_proj.weight.requires_grad_()
    for part in (tokens()[:1], tokens()[1:]):
        loss_of(plain)(part).backward()
    u, _, v = torch.linalg.svd(weight.grad)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    length = weight.shape[0] ** 0.25 / 4
    for found, wanted in ((a / length, v[:2]), (b.T / length, u.T[2:4])):
        torch.testing.assert_close((found @ wanted.T).abs(), torch.eye(2), rtol=0, atol=1e-3)
    assert all(p.grad is None for p in model.parameters())


def test_it_is_saved_as_a_plain_lora_of_twice_the_rank(tmp_path: Path) -> None:
    model = lora()
    begin_at_gradient(model, [tokens()], loss_of(model))
    model.save_pretrained(tmp_path / "start")
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    first = loss_of(model)(tokens())
    for _ in range(3):
        optimiser.zero_grad()
        last = loss_of(model)(tokens())
        last.backward()
        optimiser.step()
    assert last < first
    trained = model(input_ids=tokens()).logits
    model.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    loaded: Any = PeftModel.from_pretrained(llama(), tmp_path / "adapter")
    assert loaded.peft_config["default"].r == 4
    torch.testing.assert_close(loaded(input_ids=tokens()).logits, trained, rtol=1e-4, atol=1e-5)


def test_what_cannot_start_is_refused_and_left_as_it_was() -> None:
    trained = lora(init_lora_weights=False)
    cases = [
        (llama(), "has no LoRA with the name default"),
        (trained, "is merged or was trained"),
        (lora(rank_pattern={"q_proj": 1}), "layers differ in rank or scale"),
        (lora().to(torch.bfloat16), "torch.bfloat16, which would round the compensation"),
    ]
    for model, complaint in cases:
        before = {name: t.clone() for name, t in model.state_dict().items()}
        with pytest.raises(ValueError, match=complaint):
            begin_at_gradient(model, [tokens()], loss_of(model))
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    with pytest.raises(BasisError, match="no examples"):
        begin_at_gradient(model := lora(), [], loss_of(model))
