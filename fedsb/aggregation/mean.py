"""The weighted mean of clients' vectors, one at a time: memory does not grow with the number of clients.

For LoRA-SB this mean is exact: mean(B·R_i·A) = B·mean(R_i)·A, since B and A are the same for all (Fed-SB,
arXiv 2502.15436, equation 4).
"""

from typing import Protocol

import torch
from torch import Tensor

from fedsb.errors import FederationError

BLOCK = 1 << 15  # numbers added at a time: their fp64 copy stays in the cache, and torch starts no threads for so few


class Aggregate(Protocol):
    """What makes one vector of clients' vectors that are counted one by one."""

    @property
    def count(self) -> int:
        """How many were counted."""

    def add(self, vector: Tensor, weight: float = 1.0) -> None:
        """Count one client's vector (size,)."""

    def result(self) -> Tensor:
        """The aggregate (size,), fp32."""


class Mean:
    """Σ w·x / Σ w, accumulated in fp64.

    A product of an fp32 number and a whole weight below 2^29 is exact in fp64, so what is rounded is only the sum, at
    2^-53: far below the fp32 of the result, whatever the order in which clients answer. A new round takes a new `Mean`.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.count = 0
        self._weight = 0.0
        self._sum = torch.zeros(size, dtype=torch.float64)

    def add(self, vector: Tensor, weight: float = 1.0) -> None:
        """Count one client's vector (size,), fp32 or bf16, with a positive weight."""
        if vector.shape != (self.size,) or not weight > 0:
            raise ValueError(
                f"a vector of {self.size} numbers and a positive weight are needed, not {tuple(vector.shape)}, {weight}"
            )
        for total, part in zip(self._sum.split(BLOCK), vector.split(BLOCK), strict=True):
            total.add_(part, alpha=weight)  # torch widens `part` to fp64 before it multiplies
        self._weight += weight
        self.count += 1

    def result(self) -> Tensor:
        """The mean (size,), fp32. Raises FederationError if nothing was counted."""
        if not self.count:
            raise FederationError("no usable reply came in this round; see the refused ones in events.jsonl")
        return (self._sum / self._weight).to(torch.float32)
