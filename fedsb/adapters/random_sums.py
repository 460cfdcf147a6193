"""Sums of random matrices that follow from a seed and are never kept: NOLA's A and B (`nola.py`).

They come from a CPU generator in fp32, whatever device and dtype a model has, so they are the same bits everywhere; those of
a smaller k are, but for the scale, the first of a larger; and no generator of anybody else is touched. Layers with a side of the
same length share them (as in the vision code of NOLA's authors): they are drawn once for all of these layers in a forward pass,
and once more in a backward pass, `CHUNK` numbers at a time.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedsb.adapters.lora import start_of_a
from fedsb.basis.spectral import seeded

CHUNK = 1 << 22  # numbers that are there at a time: 16 MB


@dataclass(frozen=True)
class Side:
    """The random matrices of one side: `A`, of all layers with `length` inputs, or `B`, of all with `length` outputs."""

    side: str
    length: int
    rank: int
    seed: int

    @property
    def shape(self) -> tuple[int, int]:
        """(r, in) or (out, r)."""
        return (self.rank, self.length) if self.side == "A" else (self.length, self.rank)

    def generator(self, *role: str) -> torch.Generator:
        """A CPU generator, at its beginning."""
        return seeded(self.seed, "nola", self.side, f"{self.rank} x {self.length}", *role)

    def start(self) -> Tensor:
        """A_0, or 0 for B; fp32 on the CPU."""
        return start_of_a(self.shape, self.generator("start")) if self.side == "A" else torch.zeros(self.shape)

    def chunks(self, count: int) -> Iterator[tuple[int, Tensor]]:
        """`count` matrices, flat, some at a time: number of the first, matrices (n, r·length) fp32 on the CPU; in order."""
        generator, numbers = self.generator(), math.prod(self.shape)
        at_once = max(1, CHUNK // numbers)
        for first in range(0, count, at_once):
            drawn = torch.empty(min(at_once, count - first), numbers)
            yield first, drawn.uniform_(-1, 1, generator=generator).mul_(count**-0.5)


class Combination(torch.autograd.Function):
    """Coefficients (L, k) of L layers → Σ_i of coefficient times matrix (L, r·length), without keeping the matrices.

    d/dc_i = ⟨gradient, matrix i⟩: they are drawn again in the backward pass. Nothing is saved but what they are drawn from, so
    the backward pass may be taken several times.
    """

    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, side: Side) -> Tensor:
        """Σ_i."""
        ctx.side, ctx.count = side, coefficients.shape[1]
        total = coefficients.new_zeros(len(coefficients), math.prod(side.shape))
        for first, matrices in side.chunks(ctx.count):
            total.addmm_(coefficients[:, first : first + len(matrices)], matrices.to(total))
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """⟨gradient, matrix i⟩ of each layer and i."""
        found = [gradient @ matrices.to(gradient).T for _, matrices in ctx.side.chunks(ctx.count)]
        return torch.cat(found, 1), None


def combined(coefficients: Tensor, side: Side) -> Tensor:
    """Coefficients (L, k) of L layers → their A (L, r, in) or B (L, out, r), in the coefficients' dtype, on their device."""
    total: Tensor = Combination.apply(coefficients, side)  # type: ignore[no-untyped-call]
    return total.view(-1, *side.shape) + side.start().to(total)
