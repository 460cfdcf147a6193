"""Stacking FLoRA: the clients' adapters, put side by side, are the exact mean; it goes into the base model, then all start anew.

    W0 ← W0 + (α/r)·Σ wᵢ·Bᵢ·Aᵢ = W0 + [w₁(α/r)B₁, …, w_k(α/r)B_k]·[A₁; …; A_k],    then A from the seed and the round, B = 0

Wang, Shen, He, Sun, Zhang, Lyu, Ma, Li, "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank
Adaptations", arXiv 2409.05976, section 3. Not to be taken for the batched FLoRA, which has the same name.

A client of rank rᵢ trains the leading rᵢ rows of A and columns of B, and adds rᵢ columns to the stack, which is as exact. The
scale is α/r with the largest rank for everybody, where the paper leaves each client its own.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from fedsb.adapters.lora import LORA
from fedsb.adapters.method import Parts


def stacked(clients: Sequence[Parts], weights: Sequence[float], mean: Parts, scale: float) -> tuple[Tensor, Tensor]:
    """U (out, Σrᵢ) and V (Σrᵢ, in), fp64, of one layer. `weights` add up to 1. Columns that a client does not hold, or has not
    moved, are zero in its B and are left out."""
    u = torch.cat([scale * w * parts["B"].double() for parts, w in zip(clients, weights, strict=True)], 1)
    v, moved = torch.cat([parts["A"].double() for parts in clients]), u.any(0)
    return u[:, moved], v[moved]


SAYS = (
    "Each layer computes `y = W0 x + (alpha/r) B A x` on a W0 to which all sites add, after each round, the sum of everybody's "
    "`B A`, before they start anew."
)
FLORA_STACKING = dataclasses.replace(LORA, exact=True, says=SAYS, fold=stacked, restarts=True)
