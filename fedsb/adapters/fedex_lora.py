"""FedEx-LoRA: LoRA whose average is exact, since what the means of A and B miss is added to the base model.

    ΔW = (α/r)·B̄·Ā + residual,   residual = (α/r)·(Σ wᵢ·Bᵢ·Aᵢ - B̄·Ā)

Singhal, Ponkshe, Vepakomma, "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation Models", arXiv
2410.09432, equations 5 to 7. The residual travels as factors: since Σ wᵢ·(Bᵢ - B̄) = 0,

    Σ wᵢ·Bᵢ·Aᵢ - B̄·Ā = Σ_{i<k} wᵢ·(Bᵢ - B̄)·(Aᵢ - A_k)          rank at most (k - 1)·r of k clients
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from fedsb.adapters.lora import LORA
from fedsb.adapters.method import Parts


def residual(clients: Sequence[Parts], weights: Sequence[float], mean: Parts, scale: float) -> tuple[Tensor, Tensor]:
    """U (out, (k-1)·r) and V ((k-1)·r, in), fp64, of one layer. `weights` add up to 1; `mean`: of the clients' A and B."""
    last = clients[-1]["A"].double()
    u = [scale * w * (parts["B"].double() - mean["B"].double()) for parts, w in zip(clients[:-1], weights, strict=False)]
    v = [parts["A"].double() - last for parts in clients[:-1]]
    out, in_ = mean["B"].shape[0], mean["A"].shape[1]
    return torch.cat([last.new_zeros(out, 0), *u], 1), torch.cat([last.new_zeros(0, in_), *v])


SAYS = (
    "Each layer computes `y = W0 x + (alpha/r) B A x` on a W0 to which all sites add, after each round, what averaging A and B "
    "apart has missed."
)
FEDEX_LORA = dataclasses.replace(LORA, exact=True, says=SAYS, fold=residual)
