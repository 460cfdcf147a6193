"""Seeds of everything that is drawn here: the same in every process, and independent for every purpose."""

import hashlib
import json

import numpy as np


def derived_seed(*parts: str | int) -> int:
    """A seed of 128 bits from all parts, in their order: the same in every process, unlike Python's `hash`."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:16], "big")


def generator(*parts: str | int) -> np.random.Generator:
    """A fresh NumPy generator (PCG64) seeded by `derived_seed(*parts)`, for example `generator(seed, "partition")`."""
    return np.random.Generator(np.random.PCG64(derived_seed(*parts)))
