"""Noise and sampling for differential privacy, drawn from a cryptographic generator.

A key stream of AES-256 in counter mode, keyed by the operating system, takes the place of torch's Mersenne twister, whose
state an adversary who sees its outputs can recover. Nothing of it comes from a run's seed, which the server knows: noise that
can be recomputed can be taken off again, and a sample that is known amplifies nothing.
"""

import math
import os

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray
from torch import Tensor

CHUNK = 1 << 16  # numbers made at one time: they stay in the cache
GRID_BITS = 16  # a noisy number is a multiple of a power of two between std/2^17 and std/2^16


class KeyStream:
    """Uniform and Gaussian numbers from AES-256-CTR.

    Guarantees:
        - a fresh stream's key is 32 bytes of `os.urandom`; without it, its output cannot be told from chance at the cost of
          less than breaking AES-256.
        - `normal`: Box-Muller on 52-bit uniforms in (0, 1), in float64. What it leaves out lies beyond 8.57 standard deviations,
          a probability of about 1e-17 a number: for a million numbers in a thousand steps 1e-8, far below any δ of 1/n here.
        - `poisson_sample` takes each by itself; that a sample is empty has its probability.
        - floating point: see `add_noise`.

    | case | result |
    |---|---|
    | no numbers asked for, or an odd number | that many |
    | rate 1 | everybody |
    | nobody to draw from | nobody |

    Args:
        key: 32 bytes, for tests alone: whoever knows the key can take the noise off.
    """

    def __init__(self, key: bytes | None = None) -> None:
        chosen = os.urandom(32) if key is None else key
        self._cipher = Cipher(algorithms.AES256(chosen), modes.CTR(bytes(16))).encryptor()

    def uniform(self, count: int) -> NDArray[np.float64]:
        """(count,) float64 in (0, 1), odd multiples of 2^-53; never 0 or 1."""
        raw = np.frombuffer(self._cipher.update(bytes(8 * count)), dtype="<u8")
        return ((raw >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52

    def normal(self, count: int) -> NDArray[np.float64]:
        """(count,) float64, independent, mean 0 and standard deviation 1. Box & Muller (1958)."""
        found = np.empty(count + count % 2)
        for start in range(0, len(found), CHUNK):
            part = found[start : start + CHUNK]
            half = len(part) // 2
            radius = np.sqrt(-2.0 * np.log(self.uniform(half)))
            angle = (2.0 * math.pi) * self.uniform(half)
            np.multiply(radius, np.cos(angle), out=part[:half])
            np.multiply(radius, np.sin(angle), out=part[half:])
        return found[:count]

    def poisson_sample(self, count: int, rate: float) -> list[int]:
        """Each of 0..count-1 with probability `rate`, independently of the others: Poisson sampling. May be empty."""
        return np.flatnonzero(self.uniform(count) < rate).tolist()  # type: ignore[no-any-return]


def add_noise(vector: Tensor, std: float, stream: KeyStream) -> Tensor:
    """vector (size,) plus N(0, std²) on every number, fp32 on the vector's device.

    Guarantees:
        - the sum is taken in float64 and rounded to a grid 2^g with std/2^17 < 2^g ≤ std/2^16. In a cell of the grid there
          are some 2^30 values of the float64 noise, so which of them are attainable, which is how Mironov ("On significance
          of the least significant bits", CCS 2012) tells neighbours apart, is not seen any more. This is rounding of an
          already private number, which costs no privacy; it is a defence and not a proof that the finite-precision
          mechanism is (ε, δ)-private to the last digit. A discrete Gaussian would have that proof, and is not used.
        - `std = 0` adds nothing and rounds nothing.

    | case | result |
    |---|---|
    | std = 0 | the vector itself, fp32 |
    | std < 0, NaN or infinite | ValueError |
    | an empty vector | an empty vector |
    | a vector with NaN or infinity | ValueError: it has no bounded sensitivity |
    """
    if not (math.isfinite(std) and std >= 0):
        raise ValueError(f"std = {std} is no standard deviation")
    if not torch.isfinite(vector).all():
        raise ValueError("a vector with NaN or infinity has no bounded sensitivity")
    if std == 0:
        return vector.to(torch.float32)
    grid = 2.0 ** (math.floor(math.log2(std)) - GRID_BITS)
    values = vector.detach().to("cpu", torch.float64).numpy()
    noisy = np.rint((values + std * stream.normal(values.size)) / grid) * grid
    return torch.from_numpy(noisy).to(torch.float32).to(vector.device)
