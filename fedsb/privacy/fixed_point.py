"""Real vectors as integers modulo 2^32, such that the sum of all clients' integers cannot wrap.

A secure sum adds masks that are uniform modulo 2^32 (Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving
Machine Learning", CCS 2017, eprint 2017/281, section 4), so what it sums are integers modulo 2^32: here x → round(x · 2^e),
negative numbers as two's complement.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsb.errors import SecureSumError

Words = NDArray[np.uint32]
Reals = NDArray[np.float32] | NDArray[np.float64]
LARGEST = 2**31 - 1  # of the signed numbers modulo 2^32
MOST_CLIENTS = 2**16 - 1
SMALLEST_BOUND, LARGEST_BOUND = 2.0**-100, 2.0**100  # far within fp32


@dataclass(frozen=True)
class FixedPoint:
    """How reals become integers, the same for all clients of a round.

    Attributes:
        clients: how many vectors are summed at the most.
        bound: how large each number may be, either sign.

    Guarantees:
        With `limit` the smallest fp32 number not below `bound`, and `scale` = 2^e the largest power of two with
        clients · round(limit · scale) < 2^31:
        - No sum wraps: `clients` integers of size round(limit · scale) at the most add up to less than 2^31.
        - |encoded / scale - x| <= 1 / (2 · scale): x · scale is exact in fp64, since scale is a power of two, and is
          rounded once, to the nearest whole number.
        - `decode` is exact: a 32-bit integer over a power of two is an fp64 number. So a decoded sum of `count` vectors is
          within `sum_error(count)` = count / (2 · scale) of the sum of the reals, and a mean within `mean_error`.
        - 1 / scale <= clients · limit · 2^-29.9, by the choice of scale: for 50 clients a mean is within 2.5e-8 · limit.

    Edge cases:
        | number             | what happens                                                            |
        |--------------------|-------------------------------------------------------------------------|
        | ±bound             | is encoded; also after rounding `bound` to fp32, up or down             |
        | beyond `limit`     | SecureSumError; it is neither clipped nor wrapped                       |
        | NaN, ±infinity     | SecureSumError                                                          |
        | ±0, |x| < half a step | 0                                                                    |
        | a sum that `count` clients cannot reach | SecureSumError: one of them did not encode as agreed |
    """

    clients: int
    bound: float

    def __post_init__(self) -> None:
        if not 1 <= self.clients <= MOST_CLIENTS:
            raise SecureSumError(f"a secure sum takes 1 to {MOST_CLIENTS:,} clients, not {self.clients}; ask fewer")
        if not SMALLEST_BOUND <= self.bound <= LARGEST_BOUND:
            raise SecureSumError(f"a secure sum takes numbers within a bound from 2^-100 to 2^100, not {self.bound}; scale them")

    @functools.cached_property
    def limit(self) -> float:
        """The largest number that is encoded: `bound`, rounded up to fp32, since clients clip in fp32."""
        nearest = np.float32(self.bound)
        return float(nearest if float(nearest) >= self.bound else np.nextafter(nearest, np.float32(np.inf)))

    @functools.cached_property
    def scale(self) -> float:
        """2^e: how many steps there are in 1."""
        exponent = math.frexp(LARGEST / self.clients / self.limit)[1]  # one or two too large
        while self.clients * round(math.ldexp(self.limit, exponent)) > LARGEST:
            exponent -= 1
        return math.ldexp(1.0, exponent)

    @property
    def mean_error(self) -> float:
        """How far `mean` can be from the exact mean, however many vectors: half a step, and a little for the division."""
        return (0.5 + 2.0**-20) / self.scale

    def sum_error(self, count: int) -> float:
        """How far `decode` can be from the exact sum of `count` vectors."""
        return count / (2 * self.scale)

    def encode(self, values: Reals) -> Words:
        """Reals (size,), fp32 or fp64 → integers modulo 2^32 (size,). Raises SecureSumError for what is not within `limit`."""
        if values.ndim != 1 or values.dtype not in (np.float32, np.float64):
            raise ValueError(f"a flat vector of fp32 or fp64 is needed, not {values.dtype} of shape {values.shape}")
        within = np.abs(values) <= self.limit  # false for NaN
        if not within.all():
            place = int(np.argmin(within))
            raise SecureSumError(
                f"number {place} of {values.size} is NaN, infinite or beyond ±{self.bound:.6g}, the bound of the secure sum; "
                "clip the update, or raise the bound for all clients"
            )
        return np.rint(values.astype(np.float64) * self.scale).astype(np.int32).view(np.uint32)

    def decode(self, total: Words, count: int) -> NDArray[np.float64]:
        """The sum (size,) of `count` encoded vectors → reals (size,). Raises SecureSumError for a sum that cannot be one."""
        if not 1 <= count <= self.clients:
            raise ValueError(f"a sum of 1 to {self.clients} vectors is needed, not of {count}")
        signed = total.view(np.int32).astype(np.float64)
        if np.abs(signed).max(initial=0) > count * round(self.limit * self.scale):
            raise SecureSumError(
                f"the secure sum holds a number that {count} clients within ±{self.bound:.6g} cannot add up to; one of them "
                "did not encode as agreed, so drop this round"
            )
        return signed / self.scale

    def mean(self, total: Words, count: int) -> NDArray[np.float64]:
        """The mean (size,) of `count` encoded vectors from their sum (size,). Raises SecureSumError as `decode` does."""
        return self.decode(total, count) / count


def to_bytes(words: Words) -> bytes:
    """Integers modulo 2^32 (size,) as they travel: 4 · size bytes, little-endian."""
    return words.astype("<u4", copy=False).tobytes()


def from_bytes(data: bytes, size: int) -> Words:
    """The inverse of `to_bytes`, read-only. Raises SecureSumError if there are more or fewer than `size` numbers."""
    if len(data) != 4 * size:
        raise SecureSumError(f"a vector of {len(data):,} bytes came where {4 * size:,} were expected; drop this client")
    return np.frombuffer(data, "<u4").astype(np.uint32, copy=False)
