from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)

from fedsb.adapters.state import parameters_of
from fedsb.data.batches import Encoded, collate
from fedsb.training import loss
from fedsb.training.loss import causal_loss, classification_loss, head_of
from tests.adapters.samples import VOCABULARY, adapted, bert, frozen, gpt2, llama
from tests.reference import batch_loss, gradients, sequence_loss
from tests.training.samples import labelled, rows

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
}
GLU = TINY | {"intermediate_size": 48, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "lm_head_multiplier": 0.5}
RECURRENT = {"num_hidden_layers": 3, "num_attention_heads": 4, "lru_width": 32, "attention_window_size": 16}
MODELS: dict[str, tuple[bool, Any]] = {  # whether the head is plain, and how the model is made
    "llama": (True, llama),
    "tied llama": (True, lambda: llama(tie_word_embeddings=True)),
    "gpt2": (True, gpt2),
    "opt, whose states are projected": (
        True,
        lambda: OPTForCausalLM(OPTConfig(**TINY, ffn_dim=48, word_embed_proj_dim=16, max_position_embeddings=64)),
    ),
    "phi, with a bias": (False, lambda: PhiForCausalLM(PhiConfig(**GLU))),
    "gemma2, capped": (False, lambda: Gemma2ForCausalLM(Gemma2Config(**GLU, head_dim=8, final_logit_softcapping=0.5))),
    "recurrent gemma, capped": (
        False,
        lambda: RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**(GLU | RECURRENT), logits_soft_cap=0.5)),
    ),
    "granite, scaled": (False, lambda: GraniteForCausalLM(GraniteConfig(**GLU, logits_scaling=3.0))),
    "cohere, scaled": (False, lambda: CohereForCausalLM(CohereConfig(**GLU, logit_scale=0.3))),
    "falcon h1, scaled": (False, lambda: FalconH1ForCausalLM(FalconH1Config(**GLU, **MAMBA, head_dim=8))),
}


def _built(name: str) -> Any:
    torch.manual_seed(0)
    model = frozen(MODELS[name][1]())
    if not name.endswith("llama"):
        for parameter in model.parameters():
            parameter *= 4 if parameter.ndim == 2 else 1  # logits that a cap or a scale changes
    return model


def _with_something_to_train(model: Any) -> dict[str, Any]:
    """Norms: every model has them, and they do not touch the head."""
    found = {name: p for name, p in model.named_parameters() if "norm" in name or ".ln_" in name}
    for parameter in found.values():
        parameter.requires_grad_(True)
    assert found
    return found


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradient_are_those_of_one_sequence_at_a_time(name: str) -> None:
    model = _built(name)
    assert (head_of(model) is not None) == MODELS[name][0]
    parameters = _with_something_to_train(model)
    examples = [Encoded([5, 6, 7], [8, 9]), Encoded([10, 11, 12, 13], [2]), Encoded([14, 3], [16, 17, 18])]
    fast = causal_loss(model, collate(examples, 0, "causal"))
    naive = batch_loss(model, examples)
    torch.testing.assert_close(fast, naive, atol=1e-5, rtol=1e-5)
    expected = gradients(naive, parameters)
    for key, gradient in gradients(fast, parameters).items():
        torch.testing.assert_close(gradient, expected[key], atol=2e-5, rtol=1e-3, msg=key)


@pytest.mark.parametrize("numbers", [1, VOCABULARY, 3 * VOCABULARY + 1, 7 * VOCABULARY, 1 << 23])
def test_chunks_of_any_size_give_the_same(monkeypatch: pytest.MonkeyPatch, numbers: int) -> None:
    model = adapted(llama())
    transformer, parameters = model.get_base_model(), parameters_of(model)
    examples = rows(6)
    expected = gradients(batch_loss(transformer, examples), parameters)
    monkeypatch.setattr(loss, "CHUNK_NUMBERS", numbers)
    fast = causal_loss(transformer, collate(examples, 0, "causal"))
    torch.testing.assert_close(fast, batch_loss(transformer, examples), atol=1e-5, rtol=1e-5)
    for key, gradient in gradients(fast, parameters).items():
        torch.testing.assert_close(gradient, expected[key], atol=1e-5, rtol=1e-4, msg=key)


def test_logits_are_never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_NUMBERS", 2 * VOCABULARY)
    sizes = []
    logsumexp = Tensor.logsumexp

    def counting(self: Tensor, *args: Any) -> Tensor:
        sizes.append(self.shape[0])
        return logsumexp(self, *args)

    monkeypatch.setattr(Tensor, "logsumexp", counting)
    batch = collate([Encoded([5], [6, 7, 8, 9, 10])], 0, "causal")
    causal_loss(llama(), batch)
    assert sizes == [2, 2, 1]


def test_the_gradient_scales_with_what_comes_from_above() -> None:
    model = adapted(llama())
    transformer, parameters = model.get_base_model(), parameters_of(model)
    batch = collate(rows(3), 0, "causal")
    once = gradients(causal_loss(transformer, batch), parameters)
    quarter = gradients(causal_loss(transformer, batch) * 0.25, parameters)
    for key, gradient in once.items():
        torch.testing.assert_close(quarter[key], 0.25 * gradient, atol=1e-8, rtol=1e-5)


def test_the_loss_of_a_bf16_model_is_close_and_in_fp32() -> None:
    examples = rows(6)
    found = causal_loss(llama(torch.bfloat16), collate(examples, 0, "causal"))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, batch_loss(llama(), examples), atol=0.05, rtol=0.02)


def test_a_head_that_is_trained_gets_its_gradient() -> None:
    model = llama()
    model.lm_head.weight.requires_grad_(True)
    examples = rows(3)
    assert head_of(model) is None
    weight = {"head": model.lm_head.weight}
    fast = gradients(causal_loss(model, collate(examples, 0, "causal")), weight)["head"]
    torch.testing.assert_close(fast, gradients(batch_loss(model, examples), weight)["head"], atol=1e-6, rtol=1e-4)


def _gradient_of(batch_rows: list[Encoded]) -> Tensor:
    model = adapted(llama())
    found = gradients(causal_loss(model.get_base_model(), collate(batch_rows, 0, "causal")), parameters_of(model))
    return torch.cat([g.flatten() for g in found.values()])


def test_one_sequences_mask_does_not_change_anothers_gradient() -> None:
    """The trap: with a mean over all tokens of the batch it would, and no bound on one example's part would hold."""
    kept = Encoded([5, 6, 7], [8, 9])
    short, long = Encoded([10, 11, 12, 13, 14], [15]), Encoded([10], [11, 12, 13, 14, 15])  # the same ids, other masks
    part = _gradient_of([kept]) / 2
    for other in (short, long):
        torch.testing.assert_close(_gradient_of([kept, other]) - _gradient_of([other]) / 2, part, atol=1e-6, rtol=1e-3)
    assert (_gradient_of([short]) - _gradient_of([long])).abs().max() > 1e-3


def test_every_sequence_counts_alike_whatever_its_length() -> None:
    model = llama()
    examples = [Encoded([5], [6]), Encoded([7], [8, 9, 10, 11, 12, 13])]
    parts = [float(sequence_loss(model, row)) for row in examples]
    found = float(causal_loss(model, collate(examples, 0, "causal")))
    assert found == pytest.approx(sum(parts) / 2, rel=1e-5)
    assert found != pytest.approx((parts[0] + 6 * parts[1]) / 7, rel=1e-3)


def test_a_sequence_without_labels_counts_as_zero() -> None:
    model = llama()
    kept = Encoded([5, 6], [7, 8])
    found = causal_loss(model, collate([kept, Encoded([9, 10, 11], [])], 0, "causal"))
    torch.testing.assert_close(found, sequence_loss(model, kept) / 2, atol=1e-5, rtol=1e-5)


def test_padding_counts_for_nothing() -> None:
    model = llama()
    examples = [Encoded([5], [6]), Encoded([7, 8, 9, 10], [11, 12])]
    assert float(causal_loss(model, collate(examples, 0, "causal"))) == pytest.approx(
        float(causal_loss(model, collate(examples, 33, "causal"))), rel=1e-6
    )


def test_the_classification_loss_is_the_mean_over_examples() -> None:
    model, examples = bert(), labelled(5)
    naive = []
    for row in examples:
        logits = model(input_ids=torch.tensor([row.prompt])).logits
        naive.append(functional.cross_entropy(logits, torch.tensor([row.label])))
    found = classification_loss(model, collate(examples, 0, "classification"))
    torch.testing.assert_close(found, torch.stack(naive).mean(), atol=1e-5, rtol=1e-5)
