"""LoRA-GA: LoRA that starts where the first step of full fine-tuning would go.

    G ≈ U·S·Vᵀ (a gradient of W0),   A = c·V[:r]ᵀ,   B = c·U[r:2r],   c = d_out^¼ / √γ,   W0 ← W0 - η·B·A,   η = α/√r

Wang, Yu, Li, "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", arXiv 2407.05000, algorithm 1, with γ = 16 ("stable").
The compensation -η·B·A is a fold of the basis, so that training starts at the base model, and an export on the original one has
rank 2r. PEFT's own `init_lora_weights="lora_ga"` scales B by the singular values and leaves A alone, which is not this.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from fedsb.adapters.lora import LORA
from fedsb.basis.frames import Basis
from fedsb.basis.gradient import gradient_basis

GAMMA = 16.0
T = TypeVar("T")


def lora_ga_basis(gradients: Basis, rank: int, scale: float) -> Basis:
    """The compensation, as the fold of a basis without frames.

    Args:
        gradients: the leading 2·rank singular vectors of each layer's gradient, B (out, 2·rank) and A (2·rank, in).
        scale: η.
    """
    fold = {}
    for name, b in gradients.B.items():
        c = b.shape[0] ** 0.25 / math.sqrt(GAMMA)
        fold[name] = (-scale * c * b[:, rank:].float(), c * gradients.A[name][:rank].float())
    return Basis({}, {}, {}).fold({name: (u.contiguous(), v.contiguous()) for name, (u, v) in fold.items()})


def start(basis: Basis, scale: float) -> dict[str, dict[str, Tensor]]:
    """Layer → A and B before the first round: what the compensation takes away."""
    return {name: {"A": v, "B": -u / scale} for name, (u, v) in basis.folds[0].items()}


def begin_at_gradient(
    model: nn.Module, batches: Iterable[T], loss: Callable[[T], Tensor], *, adapter: str = "default", seed: int = 0
) -> None:
    """LoRA-GA without a federation: set A and B of a new LoRA, and take η·B·A off the base weights, which the model keeps.

        model = get_peft_model(base, LoraConfig(r=8, lora_alpha=8, use_rslora=True))      # η = α/√r, as in the paper
        begin_at_gradient(model, batches, lambda batch: model(**batch).loss)
        model.save_pretrained("start")
        ...                                                                               # train as usual
        model.save_pretrained("adapter", path_initial_model_for_weight_conversion="start")

    The last line is PEFT's: a plain LoRA of rank 2r for the base model as it was. Of r and η that PEFT knows, all layers have the
    same. `batches` are seen once; their gradients are summed, a layer at a time.

    Raises ValueError, and changes nothing, for a model without such a LoRA, one that was trained or merged, layers of different
    ranks or scales, and base weights that are not fp32, which would round the compensation. Raises BasisError if 2r directions do
    not fit into a layer, without batches, and if a gradient is not finite.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LoraLinear) and adapter in m.lora_A}
    if not layers:
        raise ValueError(f"the model has no LoRA with the name {adapter}; make it by get_peft_model(model, LoraConfig())")
    if len(found := {(layer.r[adapter], layer.scaling[adapter]) for layer in layers.values()}) > 1:
        raise ValueError(f"layers differ in rank or scale ({sorted(found)}); leave out rank_pattern and alpha_pattern")
    factors: dict[str, tuple[Any, Any]] = {name: (m.lora_A[adapter], m.lora_B[adapter]) for name, m in layers.items()}
    if any(layer.merged for layer in layers.values()) or any(bool(b.weight.any()) for _, b in factors.values()):
        raise ValueError(f"the LoRA {adapter} is merged or was trained; LoRA-GA is a start, so give it a new one")
    base: dict[str, Any] = {name: layer.get_base_layer() for name, layer in layers.items()}
    if other := {str(layer.weight.dtype) for layer in base.values()} - {"torch.float32"}:
        raise ValueError(f"base weights are {sorted(other)[0]}, which would round the compensation; load the model in float32")
    ((rank, scale),) = found
    basis = lora_ga_basis(gradient_basis(base, batches, loss, 2 * rank, seed=seed), rank, scale)
    with torch.no_grad():
        for name, parts in start(basis, scale).items():
            for part, module in zip(("A", "B"), factors[name], strict=True):
                module.weight.copy_(parts[part])
            u, v = (side.to(base[name].weight) for side in basis.folds[0][name])
            base[name].weight.addmm_(u, v)
    model.zero_grad()  # the passes left some in A, B and a head


SAYS = (
    "Each layer computes `y = (W0 - eta B0 A0) x + eta B A x` with eta = alpha/sqrt(r), where B and A start at the B0 and A0 "
    "that the first gradient gave; A and B are averaged apart."
)
LORA_GA = dataclasses.replace(LORA, says=SAYS, start=start, rslora=True, rate=1e-4)
