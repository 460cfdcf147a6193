"""Opacus sees the cores: its per-sample gradients are those of one example at a time."""

from typing import Any

import pytest
import torch
from opacus import GradSampleModule
from peft import PeftModel
from torch import Tensor
from torch.nn import functional

from fedsb.adapters.state import parameters_of
from fedsb.data.batches import Encoded, collate
from fedsb.training.loss import causal_loss
from tests.adapters.samples import adapted, bert, llama, tokens
from tests.reference import gradients, sequence_loss

# the first adapted layers' inputs come from frozen layers, so their hooks see the outputs only
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
ROWS = [Encoded([5, 6, 7], [8, 9]), Encoded([10], [11, 12, 13, 1]), Encoded([14, 15], [16])]


def _per_sample(model: PeftModel, loss: Any) -> dict[str, Tensor]:
    """Name → (examples, …): what Opacus's hooks find in one backward pass."""
    parameters = parameters_of(model)
    wrapped = GradSampleModule(model, loss_reduction="mean")
    wrapped.train()  # Opacus looks at nothing in evaluation mode
    try:
        loss(wrapped).backward()
        return {name: parameter.grad_sample.detach() for name, parameter in parameters.items()}  # type: ignore[attr-defined]
    finally:
        wrapped.to_standard_module()


def test_cores_of_a_language_model() -> None:
    model = adapted(llama())
    transformer = model.get_base_model()
    found = _per_sample(model, lambda _: causal_loss(transformer, collate(ROWS, 0, "causal")))
    for place, row in enumerate(ROWS):
        alone = gradients(sequence_loss(transformer, row), parameters_of(model))
        for name, gradient in alone.items():
            assert found[name].shape == (3, 4, 4)
            torch.testing.assert_close(found[name][place], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_cores_and_head_of_a_classifier() -> None:
    model = adapted(bert(hidden_dropout_prob=0, attention_probs_dropout_prob=0), task_type="SEQ_CLS")
    ids, labels = tokens(4), torch.tensor([0, 2, 1, 2])
    found = _per_sample(model, lambda wrapped: functional.cross_entropy(wrapped(input_ids=ids).logits, labels))
    assert "head.classifier.bias" in found
    assert "bert.pooler.dense.core" in found
    for row in range(4):
        loss = functional.cross_entropy(model(input_ids=ids[row : row + 1]).logits, labels[row : row + 1])
        for name, gradient in gradients(loss, parameters_of(model)).items():
            torch.testing.assert_close(found[name][row], gradient, atol=1e-6, rtol=1e-4, msg=name)
