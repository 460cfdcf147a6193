"""Prepacked layers say what plain ones say, bit for bit, and a model that is mixed has them where they can be."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from fedsb.serving.bank import Bank
from fedsb.serving.engine import Engine, Limits
from fedsb.serving.mixed import MixedLinear, mix
from fedsb.serving.prepacked import PrepackedLinear, can_prepack
from tests.adapters.samples import bert, llama
from tests.serving.test_mixed import TOKENS, adapter, basis_of, dense, logits

needs_bf16 = pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU does not multiply bf16")


@needs_bf16
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 32), (3, 32), (2, 5, 32), (70, 32), (1, 0, 32)])
def test_the_same_bits(bias: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(32, 48, bias, dtype=torch.bfloat16).requires_grad_(False)
    packed, x = PrepackedLinear(layer), torch.randn(shape).bfloat16()
    flat = layer(x.flatten(0, -2)).unflatten(0, x.shape[:-1])  # of three dimensions a plain layer rounds its bias otherwise
    assert torch.equal(packed(x), flat) and torch.equal(packed.weight, layer.weight)
    turned = torch.randn(32, 6).bfloat16().mT  # an order that is not the usual
    assert torch.equal(packed(turned), functional.linear(turned, layer.weight, layer.bias))


def test_what_can_be_prepacked() -> None:
    able = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    assert can_prepack(nn.Linear(4, 4, dtype=torch.bfloat16)) == able
    assert not can_prepack(nn.Linear(4, 4))
    assert not can_prepack(nn.Linear(4, 4, dtype=torch.bfloat16, device="meta"))

    class Other(nn.Linear):
        pass

    assert not can_prepack(Other(4, 4, dtype=torch.bfloat16))


@needs_bf16
def test_a_mixed_model_holds_its_weights_once_and_says_the_same() -> None:
    plain, bank = llama(torch.bfloat16), Bank(4, torch.bfloat16)
    sizes = {name: layer.weight.numel() for name, layer in plain.named_modules() if isinstance(layer, nn.Linear)}
    kept = dict(plain.named_modules())
    expected = logits(plain, TOKENS)
    mixed = mix(plain, bank)
    assert torch.equal(logits(mixed, TOKENS), expected)
    assert mixed.lm_head is kept["lm_head"]  # which scoring multiplies with labelled positions alone
    engine = Engine(mixed, bank, Limits(2, 16, 64, 2))
    assert isinstance(mixed.lm_head, PrepackedLinear) and mixed.get_output_embeddings() is mixed.lm_head
    engine.close()
    assert mixed.lm_head is kept["lm_head"] and torch.equal(logits(mixed, TOKENS), expected)
    mine = [name for name in sizes if name != "lm_head"]
    assert all(isinstance(mixed.get_submodule(name), MixedLinear) and kept[name].weight.numel() == 0 for name in mine)
    held = {id(m.together): m.together._whole for m in mixed.modules() if isinstance(m, MixedLinear)}
    assert sum(whole.weight.numel() for whole in held.values()) == sum(sizes[name] for name in mine)  # type: ignore[operator]
    assert all(isinstance(whole, PrepackedLinear) for whole in held.values())


@needs_bf16
@pytest.mark.parametrize("method", ["lora-sb", "lora", "flora"])
def test_adapters_of_every_form_over_prepacked_layers(method: str) -> None:
    """FLoRA goes through the weights of single layers, which are brought back for it."""
    basis = basis_of(method)
    stored, bank = adapter(method, basis, 1, scale=4.0), Bank(4)
    model = mix(llama(torch.bfloat16), bank)
    place = bank.add(stored, basis)
    with bank.using([None, place, place, None]):
        together = logits(model, TOKENS).float()
    alone = logits(dense(llama(torch.bfloat16), stored, basis), TOKENS).float()
    base = logits(llama(torch.bfloat16), TOKENS).float()
    for row in (1, 2):
        assert (together[row] - alone[row]).norm() < 0.3 * (alone[row] - base[row]).norm()
    assert (together[[0, 3]] - base[[0, 3]]).norm() < 0.02 * base.norm()


@needs_bf16
def test_a_classifier_is_prepacked_but_for_its_head() -> None:
    plain = bert().to(torch.bfloat16)
    expected = logits(plain, TOKENS)
    assert torch.equal(logits(mix(plain, Bank(2)), TOKENS), expected)
