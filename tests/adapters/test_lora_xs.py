"""LoRA-XS: its frames and start, alone through PEFT."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model

from fedsb import LoraXsConfig
from fedsb.adapters.state import layers_of
from tests.adapters.samples import RANK, llama, tokens

TOKENS = tokens()


def test_its_frames_are_the_leading_singular_vectors_with_the_values_on_the_inputs_side() -> None:
    """Uᵀ·W0 = S·Vᵀ, and S as of the exact SVD (the randomised one comes close where the spectrum is flat)."""
    for layer in layers_of(get_peft_model(llama(), LoraXsConfig(r=RANK))).values():
        weight, frames = layer.get_base_layer().weight.detach(), layer.frames("default")
        torch.testing.assert_close(frames.B.T @ frames.B, torch.eye(RANK), rtol=0, atol=1e-5)
        torch.testing.assert_close(frames.A, frames.B.T @ weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(frames.A.norm(dim=1), torch.linalg.svdvals(weight)[:RANK], rtol=0.02, atol=0)


def test_it_starts_near_the_base_model_and_trains_the_cores_alone() -> None:
    base = llama()
    before = base(input_ids=TOKENS).logits
    model = get_peft_model(base, LoraXsConfig(r=RANK))
    torch.testing.assert_close(model(input_ids=TOKENS).logits, before, rtol=1e-3, atol=1e-3)
    spread = torch.cat([layer.core("default").weight.flatten() for layer in layers_of(model).values()]).detach().std()
    assert 0.8e-5 < float(spread) < 1.2e-5
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == len(layers_of(model)) * RANK**2


@pytest.mark.parametrize("save_basis", [True, False])
def test_saved_and_loaded_it_is_the_same(save_basis: bool, tmp_path: Path) -> None:
    model = get_peft_model(llama(), LoraXsConfig(r=RANK, save_basis=save_basis))
    for layer in layers_of(model).values():
        torch.nn.init.normal_(layer.core("default").weight)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert loaded.peft_config["default"].method == "lora-xs"
    torch.testing.assert_close(loaded(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits)


def test_merged_and_unmerged_it_is_the_same() -> None:
    model = get_peft_model(llama(), LoraXsConfig(r=RANK))
    for layer in layers_of(model).values():
        torch.nn.init.normal_(layer.core("default").weight, std=0.1)
    wanted = model(input_ids=TOKENS).logits
    model.merge_adapter()
    torch.testing.assert_close(model(input_ids=TOKENS).logits, wanted, rtol=1e-3, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(model(input_ids=TOKENS).logits, wanted, rtol=1e-3, atol=1e-4)


def test_a_random_basis_is_not_its_own() -> None:
    with pytest.raises(ValueError, match="LoRA-XS takes the singular vectors of W0"):
        LoraXsConfig(r=RANK, basis="random")
