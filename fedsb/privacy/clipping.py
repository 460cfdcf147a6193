"""Clipping: what bounds by how much one record, or one client, can move a sum.

    clip(v) = v · min(1, C / ‖v‖₂)          Abadi et al., "Deep learning with differential privacy", arXiv 1607.00133, alg. 1

What is clipped carries its own bound, so that noise is calibrated to the clip that was applied and not to a number that was
typed elsewhere.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsb.errors import PrivacyError

BLOCK = 1 << 15  # numbers widened to fp64 at a time: they stay in the cache
SHRINK = 1 - 2.0**-23  # room for the result's rounding to fp32, which is by 2^-24 at the most
LOWEST = 1e-30  # of a bound: below it fp32 has no full precision left, and rounding could reach beyond the bound


@dataclass(frozen=True, eq=False)
class Clipped:
    """A sum of clipped vectors, with what any one of them can contribute to it.

    Attributes:
        vector: (size,), fp32 on the CPU.
        bound: the L2 norm of one contribution at the most: how far the sum moves when one is added or taken away. One that
            is replaced moves it by up to twice as much.
    """

    vector: Tensor
    bound: float


def clip(vector: Tensor, bound: float) -> Clipped:
    """Scale a vector (size,) down to an L2 norm of at most `bound`.

    Guarantees:
        - the norm of the result, as the fp32 numbers that it consists of, is at most `bound`: norm and product are taken in
          fp64 with 2^-23 to spare, and rounding to fp32 takes 2^-24 of that.
        - that holds for every vector, so there is none for which this raises an error: an error would tell of the data.
        - a vector that is shorter than `bound` by 2^-23 or more is unchanged, bit for bit (as fp32).

    | case | result |
    |---|---|
    | bound 0, negative or NaN | PrivacyError |
    | bound infinite | PrivacyError: no noise covers it; add up without clipping where no privacy is asked for |
    | bound below 1e-30 | PrivacyError: fp32 could round beyond it |
    | norm 0 | zeros, never NaN |
    | an empty vector | an empty vector |
    | NaN or infinity in the vector | zeros: they have no norm, and one bad record must not spoil the sum |
    | numbers too large for fp32 | zeros, as infinity |
    | numbers whose squares overflow fp32 | clipped like any other |
    """
    check_bound(bound)
    numbers = vector.detach().to("cpu", torch.float32)
    norm = norm_of(numbers)
    if not math.isfinite(norm):
        return Clipped(torch.zeros_like(numbers), bound)
    factor = min(1.0, bound * SHRINK / norm) if norm else 1.0
    result = torch.empty_like(numbers)
    for scaled, part in zip(result.split(BLOCK), numbers.split(BLOCK), strict=True):
        scaled.copy_(part.double().mul_(factor))
    return Clipped(result, bound)


def clipped_sum(vectors: Iterable[Tensor], bound: float, size: int) -> Clipped:
    """Σ clip(v), one vector (size,) at a time.

    Guarantees:
        - each vector contributes at most `bound`, as `clip` says. The sum is accumulated in fp64 and rounded to fp32 once,
          so the rounded sum's sensitivity exceeds `bound` by no more than two roundings of it, 2^-23 · ‖sum‖.

    | case | result |
    |---|---|
    | no vectors | zeros |
    | a vector of another size | ValueError: a defect of the caller, not of the data |
    | any other | as `clip`, vector by vector |
    """
    check_bound(bound)
    total = torch.zeros(size, dtype=torch.float64)
    for vector in vectors:
        if vector.shape != (size,):
            raise ValueError(f"a vector of {size} numbers was expected, not {tuple(vector.shape)}")
        _add(total, clip(vector, bound).vector)
        del vector  # it may be a view of several, which are in the way while the next are made
    return Clipped(total.to(torch.float32), bound)


def _add(total: Tensor, vector: Tensor) -> None:
    for part, more in zip(total.split(BLOCK), vector.split(BLOCK), strict=True):
        part.add_(more)  # torch widens `more` to fp64


def check_bound(bound: float) -> None:
    """Raise PrivacyError unless a clip bound is a finite number of at least 1e-30."""
    if not LOWEST <= bound < math.inf:
        raise PrivacyError(
            f"a clip of {bound} bounds nothing that noise could cover; choose a finite number of at least {LOWEST}"
        )


def norm_of(vector: Tensor) -> float:
    """The L2 norm of fp32 numbers (size,), in fp64; NaN or infinite if one of them is."""
    return math.sqrt(sum(float(part.double().square_().sum()) for part in vector.split(BLOCK)))
