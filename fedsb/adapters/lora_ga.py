"""LoRA-GA: LoRA that starts where the first step of full fine-tuning would go.

    G ≈ U·S·Vᵀ (a gradient of W0),   A = c·V[:r]ᵀ,   B = c·U[r:2r],   c = d_out^¼ / √γ,   W0 ← W0 - η·B·A,   η = α/√r

Wang, Yu, Li, "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", arXiv 2407.05000, algorithm 1, with γ = 16 ("stable").
The compensation -η·B·A is a fold of the basis, so that training starts at the base model, and an export on the original one has
rank 2r. PEFT's own `init_lora_weights="lora_ga"` scales B by the singular values and leaves A alone, which is not this.
"""

import dataclasses
import math

from torch import Tensor

from fedsb.adapters.lora import LORA
from fedsb.basis.frames import Basis

GAMMA = 16.0


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


SAYS = (
    "Each layer computes `y = (W0 - eta B0 A0) x + eta B A x` with eta = alpha/sqrt(r), where B and A start at the B0 and A0 "
    "that the first gradient gave; A and B are averaged apart."
)
LORA_GA = dataclasses.replace(LORA, says=SAYS, start=start, rslora=True, rate=1e-4)
