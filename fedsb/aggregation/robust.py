"""Aggregates that a few hostile clients do not decide, whatever they send. All look at single vectors, so they keep them all:
memory grows with the number of clients of a round. What is computed does not depend on the order in which clients answer.

They are the functions of Flower's FedMedian, FedTrimmedAvg and MultiKrum, in fp64 and torch (tests hold them against those).
Flower's distances are ‖x‖² + ‖y‖² - 2x·y in fp32, in which what states of one round differ by drowns in what they have in common.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fedsb.aggregation.mean import BLOCK, Mean


class Gathered:
    """Keeps a round's vectors, and makes one of them in the end.

    Args:
        size: of a vector.
        rule: the vectors (n, size), fp32 → (size,).
    """

    def __init__(self, size: int, rule: Callable[[Tensor], Tensor]) -> None:
        self.size, self.rule = size, rule
        self._vectors: list[Tensor] = []

    @property
    def count(self) -> int:
        """How many vectors were counted."""
        return len(self._vectors)

    @property
    def held(self) -> None:
        """Each vector has all numbers."""

    def add(self, vector: Tensor, weight: float = 1.0, index: Tensor | None = None) -> None:
        """Keep one client's vector (size,), fp32; each counts once, so a weight is 1, and whole, so there is no `index`."""
        if vector.shape != (self.size,) or weight != 1 or index is not None:
            raise ValueError(
                f"a whole vector of {self.size} numbers and weight 1 are needed, not {tuple(vector.shape)}, {weight}, {index}"
            )
        self._vectors.append(vector)

    def result(self, otherwise: Tensor | None = None) -> Tensor:
        """What the rule makes of them (size,), fp32; it needs no `otherwise`, since each holds all numbers.

        The vectors come in an order of their own, so that ties do not depend on who answers first.
        """
        ordered = sorted(self._vectors, key=lambda vector: vector.numpy().tobytes())
        return self.rule(torch.stack(ordered)).to(torch.float32)


def median(vectors: Tensor) -> Tensor:
    """The median of each number; of an even count the mean of the two in the middle.

    Yin, Chen, Ramchandran, Bartlett, "Byzantine-robust distributed learning", arXiv 1803.01498, definition 1.
    """
    return _middle(vectors, (len(vectors) - 1) // 2)


def trimmed_mean(vectors: Tensor, trim: float) -> Tensor:
    """The mean of each number without its ⌊trim·n⌋ largest and as many smallest values (arXiv 1803.01498, definition 2)."""
    return _middle(vectors, cut_off(len(vectors), trim))


def cut_off(count: int, trim: float) -> int:
    """How many of `count` values are cut off on each side: a fifth of five is one, whatever floats say."""
    return int(round(trim * count, 9))


def krum(vectors: Tensor, hostile: int, keep: int = 1) -> Tensor:
    """The mean of the `keep` vectors that have the lowest scores; with one kept, that vector as it is.

        score(i) = Σ ‖x_i - x_j‖² over the n - f - 2 vectors nearest to x_i,     f = hostile, 2f + 2 < n

    Blanchard, El Mhamdi, Guerraoui, Stainer, "Machine learning with adversaries: Byzantine tolerant gradient descent", NIPS 2017,
    section 3; several kept: multi-Krum, section 5.
    """
    count = len(vectors)
    if count < 2 * hostile + 3:
        raise ValueError(f"{count} vectors, {hostile} of them hostile, are too few for Krum")
    squared = torch.zeros(count, count, dtype=torch.float64)
    for part in vectors.split(BLOCK, dim=1):
        squared += torch.cdist(part.double(), part.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    scores = squared.sort(dim=1).values[:, 1 : count - hostile - 1].sum(1)  # the first is the distance to itself
    mean = Mean(vectors.shape[1])
    for index in scores.argsort(stable=True)[:keep]:
        mean.add(vectors[index])
    return mean.result()


def _middle(vectors: Tensor, cut: int) -> Tensor:
    """The mean of each number's values without the `cut` largest and smallest (size,), fp64."""
    kept = len(vectors) - 2 * cut
    if kept < 1:
        raise ValueError(f"cutting {cut} off each side of {len(vectors)} values leaves none")
    blocks = vectors.split(BLOCK, dim=1)
    return torch.cat([part.sort(dim=0).values[cut : cut + kept].double().mean(0) for part in blocks])
