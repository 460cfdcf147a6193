"""Buffered asynchronous aggregation: updates of clients that began at different times, the older the less.

    x ← x + Σ_i w_i · s(τ_i) · Δ_i / Σ_i w_i,     s(τ) = 1 / √(1 + τ)

Δ_i is what client i moved the state by that it was sent, τ_i how many aggregations there have been since, w_i its weight.
Nguyen et al., "Federated learning with buffered asynchronous aggregation", arXiv 2106.06581, algorithm 1
with ηg = 1; s is that of their experiments.
"""

import torch
from torch import Tensor

from fedsb.errors import FederationError


def discount(staleness: int) -> float:
    """s(τ)."""
    return float((1 + staleness) ** -0.5)


class Buffer:
    """A weighted mean of discounted updates, accumulated in fp64; memory does not grow with their number.

    Args:
        size: of an update.
    """

    def __init__(self, size: int) -> None:
        self.count = 0
        self._sum = torch.zeros(size, dtype=torch.float64)
        self._weight = 0.0

    def add(self, sent: Tensor, came: Tensor, weight: float, staleness: int) -> None:
        """Count the update of a client that was sent one state (size,) and came back with another."""
        self._sum.add_(came.double() - sent.double(), alpha=weight * discount(staleness))
        self._weight += weight
        self.count += 1

    def result(self, state: Tensor) -> Tensor:
        """`state` (size,) moved by the mean, fp32. Raises FederationError if nothing was counted."""
        if not self.count:
            raise FederationError("no usable update came in this round; see the refused ones in events.jsonl")
        return (state.double() + self._sum / self._weight).to(torch.float32)
