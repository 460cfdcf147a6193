"""MiSS, by PEFT: one trained matrix that is added to every slice of W0. It is LoRA whose A is fixed to the tiled identity.

    y = W0·x + Dᵀ·Σ_s x_s = W0·x + Dᵀ·A·x          D (r, out), x_s (r,) the slices of x, A (r, in) = [I I I …]

Kang, "Bone / MiSS", arXiv 2409.15371 as it is from November 2024 on. A slice that is short of r, where r does not divide `in`,
is filled up with zeros, as in PEFT: A is cut off there. No factor scales it. Averaged in a federation the mean of the Dᵢᵀ·A is
mean(Dᵢ)ᵀ·A, since A is the same for everybody; it follows from the layer's shape alone.
"""

from typing import Any

import torch
from peft import MissConfig
from torch import Tensor

from fedsb.adapters.method import Method, Parts


def tiled_identity(shape: tuple[int, int]) -> Tensor:
    """A (r, in), fp32: A[j, i] = 1 where i mod r = j, otherwise 0."""
    rank, width = shape
    return torch.eye(rank).repeat(1, -(-width // rank))[:, :width].contiguous()


def _config(rank: int, alpha: float, told: dict[str, Any]) -> MissConfig:
    return MissConfig(r=rank, **told)


def _chain(parts: Parts, b: Tensor | None, a: Tensor | None, scale: float) -> tuple[Tensor, ...]:
    assert a is not None
    return parts["D"].T, a


SAYS = "Each layer computes `y = W0 x + D^T A x`, where A sums the slices of width r of x; the sites train D (MiSS)."
# A number of D is added to in/r weights, so AdamW moves each weight by the rate itself, as in full fine-tuning, which takes about
# a tenth of the rate of LoRA's factors.
RATE = 4e-4  # untuned
MISS = Method(_config, {"D": ("r", "out")}, ("A",), _chain, exact=True, says=SAYS, rate=RATE, frame=tiled_identity)
