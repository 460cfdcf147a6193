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

    @property
    def held(self) -> Tensor | None:
        """Which numbers (size,) somebody held of those counted; None: each held all."""

    def add(self, vector: Tensor, weight: float = 1.0, index: Tensor | None = None) -> None:
        """Count one client's vector (size,); of one that does not hold them all, the numbers at `index`."""

    def result(self, otherwise: Tensor | None = None) -> Tensor:
        """The aggregate (size,), fp32; a number that nobody holds is that of `otherwise` (size,)."""


class Mean:
    """Σ w·x / Σ w, accumulated in fp64; of each number, over those who hold it.

    A product of an fp32 number and a whole weight below 2^29 is exact in fp64, so what is rounded is only the sum, at
    2^-53: far below the fp32 of the result, whatever the order in which clients answer. A new round takes a new `Mean`.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.count = 0
        self._weight: float | Tensor = 0.0  # a number of its own for each entry, once somebody did not hold them all
        self._sum = torch.zeros(size, dtype=torch.float64)

    @property
    def held(self) -> Tensor | None:
        """Which numbers (size,) somebody held of those counted; None: each held all."""
        return self._weight > 0 if isinstance(self._weight, Tensor) else None

    def add(self, vector: Tensor, weight: float = 1.0, index: Tensor | None = None) -> None:
        """Count one client's vector (size,), fp32 or bf16, with a positive weight; only the numbers at `index`, if given."""
        if vector.shape != (self.size,) or not weight > 0:
            raise ValueError(
                f"a vector of {self.size} numbers and a positive weight are needed, not {tuple(vector.shape)}, {weight}"
            )
        self.count += 1
        if index is not None:
            if not isinstance(self._weight, Tensor):
                self._weight = torch.full((self.size,), self._weight, dtype=torch.float64)
            self._sum.index_add_(0, index, vector[index].double(), alpha=weight)
            self._weight.index_add_(0, index, torch.full((len(index),), weight, dtype=torch.float64))
            return
        for total, part in zip(self._sum.split(BLOCK), vector.split(BLOCK), strict=True):
            total.add_(part, alpha=weight)  # torch widens `part` to fp64 before it multiplies
        self._weight += weight

    def result(self, otherwise: Tensor | None = None) -> Tensor:
        """The mean (size,), fp32; a number that nobody holds is that of `otherwise` (size,).

        Raises FederationError if nothing was counted.
        """
        if not self.count:
            raise FederationError("no usable reply came in this round; see the refused ones in events.jsonl")
        mean = (self._sum / self._weight).to(torch.float32)
        if isinstance(self._weight, float):
            return mean
        if otherwise is None:
            raise ValueError("what numbers are that nobody holds must be said")
        return torch.where(self._weight > 0, mean, otherwise)
