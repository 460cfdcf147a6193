"""`adapter_names=`: a batch whose rows belong to different adapters computes what each row's adapter computes alone."""

import copy
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import GenerationConfig

from fedsb.adapters.state import parameters_of
from fedsb.adapters.tuner import adapted_layers
from tests.adapters.samples import adapted, also, bert, llama, tokens

NAMES = ["second", "__base__", "default", "other", "default", "second", "__base__"]


def _three(base: Any, **settings: Any) -> PeftModel:
    """default and second on one basis, other on its own."""
    model = adapted(base, **settings)
    also(model, "second", 2, **settings)
    also(model, "other", 3, **settings | {"seed": 9, "r": 3})
    return model


@torch.no_grad()
def _alone(model: PeftModel, name: str, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """One row through one adapter, no names involved."""
    if name == "__base__":
        with model.disable_adapter():
            return model(ids, **inputs).logits
    model.set_adapter(name)
    logits: torch.Tensor = model(ids, **inputs).logits
    model.set_adapter("default")
    return logits


def _compare(model: PeftModel, ids: torch.Tensor, names: list[str], tolerance: float = 1e-4, **inputs: Any) -> None:
    with torch.no_grad():
        mixed = model(ids, adapter_names=names, **inputs).logits
    for row, name in enumerate(names):
        own = {key: value[row : row + 1] for key, value in inputs.items()}
        alone = _alone(model, name, ids[row : row + 1], **own)
        torch.testing.assert_close(mixed[row : row + 1], alone, atol=tolerance * 5, rtol=tolerance)


def test_the_adapters_of_these_tests_differ() -> None:
    for model in (_three(llama()), _three(bert(), task_type="SEQ_CLS")):
        logits = [_alone(model, name, tokens()) for name in ("default", "second", "other", "__base__")]
        assert min(float((one - two).abs().max()) for i, one in enumerate(logits) for two in logits[:i]) > 0.05


def test_a_mixed_batch_equals_one_adapter_at_a_time() -> None:
    _compare(_three(llama()), tokens(7), NAMES)


def test_a_mixed_batch_with_padding() -> None:
    mask = torch.ones(7, 5, dtype=torch.int64)
    mask[2, 3:] = 0
    _compare(_three(llama()), tokens(7), NAMES, attention_mask=mask)


def test_a_mixed_batch_in_bf16() -> None:
    model = _three(llama(torch.bfloat16), basis_dtype="bf16")
    layer = adapted_layers(model)["model.layers.0.mlp.up_proj"]
    x = torch.randn(7, 5, 32, dtype=torch.bfloat16)
    mixed = layer(x, adapter_names=NAMES)
    assert mixed.dtype == torch.bfloat16
    for row, name in enumerate(NAMES):
        alone = layer.base_layer(x[row]).float()
        if name != "__base__":
            alone = alone + x[row].float() @ layer.get_delta_weight(name).T
        torch.testing.assert_close(mixed[row].float(), alone, atol=0.1, rtol=0.03)


@pytest.mark.parametrize("names", [["default"] * 3, ["__base__"] * 3, ["other", "other", "second"]])
def test_batches_of_few_adapters(names: list[str]) -> None:
    _compare(_three(llama()), tokens(3), names)


def test_a_classifier_with_a_head_for_each_adapter_and_inputs_of_two_dimensions() -> None:
    model = _three(bert(), task_type="SEQ_CLS")
    assert "bert.pooler.dense" in adapted_layers(model)
    heads = [parameters_of(model, name)["head.classifier.weight"] for name in ("default", "second", "other")]
    assert not torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[1], heads[2])
    _compare(model, tokens(7), NAMES)


def test_names_last_for_one_call_only() -> None:
    model = _three(llama())
    before = model(tokens()).logits
    model(tokens(), adapter_names=["second", "other"])
    assert torch.equal(model(tokens()).logits, before)
    with pytest.raises(ValueError, match="nobody"):
        model(tokens(), adapter_names=["nobody", "other"])
    assert torch.equal(model(tokens()).logits, before)


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_equals_one_adapter_at_a_time(beams: int) -> None:
    model = _three(llama())
    ids, names = tokens(4), ["other", "second", "__base__", "default"]
    settings = {"num_beams": beams, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": 1}
    mixed = model.generate(input_ids=ids, adapter_names=names, **settings)
    texts = []
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                alone = model.generate(input_ids=ids[row : row + 1], **settings)
        else:
            model.set_adapter(name)
            alone = model.generate(input_ids=ids[row : row + 1], **settings)
        width = alone.shape[1]
        assert mixed[row, :width].tolist() == alone[0].tolist()
        assert (mixed[row, width:] == 0).all()
        texts.append(tuple(alone[0, 5:].tolist()))
    assert len(set(texts)) == 4


def test_names_that_do_not_go_with_the_rows_are_refused() -> None:
    model = _three(llama())
    for names in (["second"], ["second"] * 3):
        with pytest.raises(ValueError, match=rf"adapter_names has {len(names)} names for a batch of 2 rows"):
            model(tokens(2), adapter_names=names)
    hidden = GenerationConfig(num_beams=2, max_new_tokens=2, pad_token_id=0)
    with pytest.raises(ValueError, match="2 names for a batch of 4 rows"):
        model.generate(input_ids=tokens(2), adapter_names=["second", "other"], generation_config=hidden)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"non-existing adapter.*nobody"):
        _three(llama())(tokens(), adapter_names=["second", "nobody"])


def test_training_mode_is_refused() -> None:
    model = _three(llama())
    model.train()
    with pytest.raises(ValueError, match="evaluation mode only"):
        model(tokens(), adapter_names=["second", "default"])


def test_a_merged_model_is_refused() -> None:
    model = _three(llama())
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged adapters; call unmerge_adapter"):
        model(tokens(), adapter_names=["second", "__base__"])


def test_disabled_adapters_leave_every_row_to_the_base_model() -> None:
    plain = llama()
    expected = copy.deepcopy(plain)(tokens()).logits
    model = _three(plain)
    with model.disable_adapter():
        assert torch.equal(model(tokens(), adapter_names=["second", "default"]).logits, expected)
