"""LoPA: prompts of instances against their equation, in batches, padded on either side, generating with beams; the encoder."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel

from fedsb.adapters.instances import Encoder, size_of, width_of
from fedsb.adapters.lopa import LopaConfig, Prompt, count
from fedsb.errors import AdapterError, ModelError
from fedsb.models import locate
from tests.adapters.samples import bert, llama, tokens
from tests.federation.tiny import save_model

SETTINGS: dict[str, Any] = {"tokens": 3, "r": 2, "encoder_width": 5, "hidden": 4}
GENERATE: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


def _adapted(**settings: Any) -> PeftModel:
    torch.manual_seed(1)
    model = get_peft_model(llama(), LopaConfig(**(SETTINGS | settings))).eval()
    with torch.no_grad():  # networks that say something, and prompts of the size of embeddings
        for name, parameter in model.named_parameters():
            if "fedsb_lopa" in name and "shared" not in name:
                parameter.copy_(torch.randn_like(parameter))
    return model


def _instances(rows: int, seed: int = 0) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(rows, 5, generator=torch.Generator().manual_seed(seed)), dim=1)


def _parameters(model: torch.nn.Module) -> dict[str, Tensor]:
    return {n.partition("fedsb_lopa.default.")[2]: p for n, p in model.named_parameters() if "fedsb_lopa.default" in n}


def test_prompts_are_those_of_the_equation() -> None:
    model = _adapted()
    p, e = {name: t.detach().double() for name, t in _parameters(model).items()}, _instances(4)
    found, z_s = model.base_model.prompts(e), llama().model.embed_tokens.weight.std() * p["shared.weight"]
    assert found.shape == (4, 3, 32)
    for row in range(4):
        u = (p["u.3.weight"] @ torch.tanh(p["u.0.weight"] @ e[row].double() + p["u.0.bias"]) + p["u.3.bias"]).view(3, 2)
        v = (p["v.3.weight"] @ torch.tanh(p["v.0.weight"] @ e[row].double() + p["v.0.bias"]) + p["v.3.bias"]).view(32, 2)
        for i in range(3):
            for j in range(32):
                gate = 1 / (1 + torch.exp(-(u[i] * v[j]).sum()))
                assert float(found[row, i, j].detach()) == pytest.approx(float(z_s[i, j] * gate), rel=1e-4, abs=1e-5)


def test_logits_are_those_of_the_text_after_its_prompt() -> None:
    model, plain, ids, e = _adapted(), llama(), tokens(rows=3), _instances(3)
    found = model(input_ids=ids, instance=e).logits
    embeds = torch.cat([model.base_model.prompts(e), plain.model.embed_tokens(ids)], 1)
    torch.testing.assert_close(found, plain(inputs_embeds=embeds).logits[:, 3:], atol=1e-5, rtol=1e-4)
    assert torch.equal(model(input_ids=ids).logits, plain(ids).logits), "without an instance it is the base model"
    assert (found - plain(ids).logits).abs().max() > 0.1
    with model.disable_adapter():
        assert torch.equal(model(input_ids=ids, instance=e).logits, plain(ids).logits)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_of_a_padded_batch_is_as_it_is_alone(side: str) -> None:
    model, e = _adapted(), _instances(2)
    long, short = tokens(rows=1, width=7), tokens(rows=1, width=4, seed=1)
    gap = torch.zeros(1, 3, dtype=torch.int64)
    padded = torch.cat([gap, short] if side == "left" else [short, gap], 1)
    mask = torch.cat([torch.ones_like(long), (padded != 0).long()])
    found = model(input_ids=torch.cat([long, padded]), attention_mask=mask, instance=e).logits
    torch.testing.assert_close(found[0], model(input_ids=long, instance=e[:1]).logits[0], atol=1e-4, rtol=1e-4)
    where = slice(3, None) if side == "left" else slice(0, 4)
    torch.testing.assert_close(found[1, where], model(input_ids=short, instance=e[1:]).logits[0], atol=1e-4, rtol=1e-4)


def test_another_instance_is_another_prompt_for_the_same_text() -> None:
    model, ids = _adapted(), tokens(rows=1).repeat(2, 1)
    first, second = model(input_ids=ids, instance=_instances(2)).logits
    assert (first - second).abs().max() > 0.05


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_in_batches_with_instances_and_beams(beams: int) -> None:
    model, e = _adapted(), _instances(3)
    ids = tokens(rows=3)
    ids[1, :2] = 0
    mask = (ids != 0).long()
    found = model.generate(input_ids=ids, attention_mask=mask, instance=e, num_beams=beams, **GENERATE)
    assert torch.equal(found[:, :5], ids) and found.shape == (3, 11)
    for row in range(3):
        text = ids[row : row + 1][:, mask[row].bool()]
        told = {"attention_mask": torch.ones_like(text), "instance": e[row : row + 1], "num_beams": beams}
        alone = model.generate(input_ids=text, **told, **GENERATE)
        assert torch.equal(found[row, 5:], alone[0, text.shape[1] :])
    if beams == 1:
        grown = ids[:1]
        for _ in range(6):
            following = model(input_ids=grown, instance=e[:1]).logits[:, -1].argmax(-1, keepdim=True)
            grown = torch.cat([grown, following], 1)
        assert torch.equal(found[:1], grown)
    other = model.generate(input_ids=ids, attention_mask=mask, instance=_instances(3, seed=9), num_beams=beams, **GENERATE)
    assert not torch.equal(other, found)


def test_several_sequences_of_a_row() -> None:
    model = _adapted()
    told = {"num_beams": 4, "num_return_sequences": 2, **GENERATE}
    found = model.generate(input_ids=tokens(), attention_mask=torch.ones_like(tokens()), instance=_instances(2), **told)
    assert found.shape == (4, 11) and torch.equal(found[:, :5], tokens().repeat_interleave(2, 0))


def test_only_the_prompt_is_trained() -> None:
    model = _adapted()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == {name for name, _ in model.named_parameters() if "fedsb_lopa" in name} and len(trained) == 9
    model(input_ids=tokens(), labels=tokens(), instance=_instances(2)).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in trained.values())


def test_gradients_are_those_of_finite_differences() -> None:
    """Of the prompt; the model upcasts to fp32 within."""
    torch.manual_seed(2)
    prompt, e, w = Prompt(LopaConfig(**SETTINGS), 7).double(), _instances(2).double(), torch.randn(2, 3, 7).double()

    def of(*tensors: Tensor) -> Tensor:
        named = dict(zip(dict(prompt.named_parameters()), tensors, strict=True))
        found: Tensor = (torch.func.functional_call(prompt, named, (e,)) * w).sum()
        return found

    assert torch.autograd.gradcheck(of, [torch.randn_like(p).requires_grad_() for p in prompt.parameters()])


def test_the_gate_starts_at_one_half() -> None:
    torch.manual_seed(0)
    model = get_peft_model(llama(), LopaConfig(**SETTINGS)).eval()
    found, shared = model.base_model.prompts(_instances(2)), _parameters(model)["shared.weight"]
    spread = llama().model.embed_tokens.weight.std()
    torch.testing.assert_close(found, (spread * shared / 2).expand(2, -1, -1), atol=2e-3, rtol=2e-3)
    assert float(2 * found.detach().std()) == pytest.approx(float(spread), rel=0.3)


@pytest.mark.parametrize(("rank", "millions"), [(1, 0.80), (2, 1.07), (4, 1.60)])
def test_counts_are_the_papers(rank: int, millions: float) -> None:
    """GLUE with roberta-large, and DeepSeekCoder 1.3B with an encoder of 1,024."""
    assert round(count(10, rank, 1024, 256, 1024) / 1e6, 2) == millions
    assert round(count(10, 1, 1024, 1024, 2048) / 1e6, 2) == 4.23
    model = _adapted()
    assert sum(p.numel() for p in _parameters(model).values()) == count(3, 2, 5, 4, 32)


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prompt_comes_back(low_memory: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    saved, e = _adapted(encoder="some-encoder"), _instances(2)
    saved.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(t.numel() for t in tensors.values()) == count(3, 2, 5, 4, 32)
    loaded = PeftModel.from_pretrained(llama(dtype), tmp_path, low_cpu_mem_usage=low_memory)
    assert loaded.peft_config["default"].encoder == "some-encoder"
    loaded.load_adapter(tmp_path, "again")
    again = loaded.get_input_embeddings().fedsb_lopa["again"].state_dict()
    assert all(torch.equal(tensor, _parameters(saved)[name]) for name, tensor in again.items()) and len(again) == 9
    for name, tensor in _parameters(loaded).items():
        assert torch.equal(tensor, _parameters(saved)[name]) and tensor.dtype == torch.float32
    found = loaded(input_ids=tokens(), instance=e).logits
    assert found.dtype == dtype
    if dtype == torch.float32:
        assert torch.equal(found, saved(input_ids=tokens(), instance=e).logits)
        copied = copy.deepcopy(loaded)
        assert torch.equal(copied(input_ids=tokens(), instance=e).logits, found)


def test_two_prompts_on_one_model() -> None:
    model, e = _adapted(), _instances(2)
    first = model(input_ids=tokens(), instance=e).logits
    model.add_adapter("second", LopaConfig(tokens=2, r=1, encoder_width=5, hidden=3))
    assert torch.equal(model(input_ids=tokens(), instance=e).logits, first)
    model.set_adapter("second")
    assert model.base_model.prompts(e).shape == (2, 2, 32)


def test_what_does_not_go_together_is_refused() -> None:
    model, ids = _adapted(), tokens()
    with pytest.raises(ValueError, match="instance has 3 rows for a batch of 2; give one for each"):
        model(input_ids=ids, instance=_instances(3))
    with pytest.raises(ValueError, match=r"instance is \(2, 7\); give the encoder's embeddings, \(rows, 5\)"):
        model(input_ids=ids, instance=torch.ones(2, 7))
    with pytest.raises(ValueError, match="goes with input_ids and attention_mask alone"):
        model(input_ids=ids, position_ids=torch.arange(5)[None], instance=_instances(2))
    with pytest.raises(ValueError, match="cannot be merged into weights"):
        model.merge_adapter()
    with pytest.raises(AdapterError, match="make no prompt; set all of them from 1 on"):
        LopaConfig(tokens=0)
    with pytest.raises(AdapterError, match="before the text of a causal model, and this is none"):
        get_peft_model(bert(), LopaConfig(**SETTINGS))


def test_the_encoder_is_frozen_and_a_texts_neighbours_do_not_matter(tmp_path: Path) -> None:
    source = locate(save_model(tmp_path / "bert", "classification"))
    encoder = Encoder(source)
    texts = ["red green blue", "cat", "one two three up down left right"]
    found = encoder.encode(texts)
    assert found.shape == (3, encoder.width) and encoder.width == width_of(source.name)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))
    for text, row in zip(texts, found, strict=True):
        torch.testing.assert_close(encoder.encode([text])[0], row, atol=1e-5, rtol=1e-4)
    assert (found[0] - found[1]).norm() > 1e-3 and not found.requires_grad
    assert encoder.encode([]).shape == (0, encoder.width)
    with pytest.raises(ModelError):
        width_of("package:no-such-package")
    assert size_of(source) == sum(p.numel() for p in AutoModel.from_pretrained(source.folder).parameters())
