"""Masks of a secure sum: secrets that two clients agree on, and the uniform vectors that secrets expand to.

Bonawitz et al., CCS 2017, eprint 2017/281, sections 3.2 (key agreement) and 3.4 (pseudorandom generator). The generator is
AES-256 in counter mode.
"""

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedsb.errors import SecureSumError
from fedsb.privacy.fixed_point import Words

KEY = 32  # bytes of every key and secret
STRETCH = 1 << 16  # numbers masked at a time: they stay in the cache
ZEROS = bytes(4 * STRETCH)
START = bytes(16)  # counter; every key makes one mask


def agree(private: X25519PrivateKey, public: bytes, info: bytes) -> bytes:
    """The 32-byte key that the owners of two X25519 key pairs have in common for one use, named by `info`.

    Guarantees: both owners get the same; to anybody else it is indistinguishable from chance (computationally), and keys of two
    uses say nothing of each other.

    | case | result |
    |---|---|
    | a public key that would make the key known to all (a point of low order), or is none | SecureSumError |
    """
    try:
        return derive(private.exchange(X25519PublicKey.from_public_bytes(public)), info)
    except ValueError:
        raise SecureSumError(f"{public.hex()[:16]}… is no X25519 public key; leave its client out") from None


def derive(secret: bytes, info: bytes) -> bytes:
    """HKDF-SHA256 of a secret: a 32-byte key for one use, named by `info`."""
    return HKDF(SHA256(), KEY, salt=None, info=info).derive(secret)


def public_bytes(private: X25519PrivateKey) -> bytes:
    """The 32 bytes of a private key's public key."""
    return private.public_key().public_bytes_raw()


def add_mask(vector: Words, key: bytes, sign: int) -> None:
    """Add the mask of a 32-byte key to `vector` (size,) in place, modulo 2^32; subtract it for sign -1.

    Guarantees:
        To whoever does not know the key, the mask is computationally indistinguishable from `size` uniform numbers. A key
        must make one mask only: two vectors under one mask give away their difference.
    """
    encryptor = Cipher(AES256(key), CTR(START)).encryptor()
    stream = bytearray(4 * STRETCH + AES256.block_size // 8)
    numbers = np.frombuffer(stream, "<u4", STRETCH)
    apply = np.add if sign > 0 else np.subtract
    for start in range(0, vector.size, STRETCH):
        part = vector[start : start + STRETCH]
        encryptor.update_into(memoryview(ZEROS)[: 4 * part.size], stream)
        apply(part, numbers[: part.size], out=part)
