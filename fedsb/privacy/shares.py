"""Shamir's t-of-n sharing of 32-byte secrets (Bonawitz et al., CCS 2017, eprint 2017/281, section 3.1).

A secret is two blocks of 16 bytes, each shared over GF(2^128) by pycryptodome. Members are numbered from 1 as there, since
the share at 0 is the secret itself.

Shamir's scheme does not see that a share is wrong: any shares give some secret. So whoever rebuilds one brings a test of it:
the public key that it must give, or its `commitment`.
"""

import hashlib
import hmac
from collections.abc import Callable, Mapping

from Crypto.Protocol.SecretSharing import Shamir

from fedsb.errors import SecureSumError

SECRET, BLOCK = 32, 16  # bytes
COMMITMENT = 32
LABEL = b"fedsb secure sum 1: commitment\0"


def split(secret: bytes, threshold: int, count: int) -> list[bytes]:
    """A secret of 32 bytes → `count` shares of 32 bytes; the share at place i of the list is member i + 1's.

    Guarantees:
        Any `threshold` shares give the secret; fewer say nothing about it, whatever can be computed: for each secret there
        are as many polynomials through them. Coefficients come from the operating system.

    Edge cases:
        | asked for                 | what happens                                       |
        |---------------------------|----------------------------------------------------|
        | a secret of another size  | ValueError                                         |
        | threshold 1               | ValueError: every share would be the secret        |
        | threshold above count     | ValueError: the secret would be lost               |
        | threshold equal to count  | all shares are needed                              |
    """
    if len(secret) != SECRET or not 2 <= threshold <= count:
        raise ValueError(f"a secret of {SECRET} bytes and 2 <= threshold <= count are needed: {threshold}, {count}")
    blocks = [Shamir.split(threshold, count, secret[at : at + BLOCK], ssss=False) for at in range(0, SECRET, BLOCK)]
    return [b"".join(block[place][1] for block in blocks) for place in range(count)]


def combine(shares: Mapping[int, bytes], threshold: int, valid: Callable[[bytes], bool]) -> bytes:
    """The secret of shares that `split` made.

    Args:
        shares: member, from 1 → its share of 32 bytes; `threshold` of them are used.
        threshold: the one that the secret was split with.
        valid: whether a secret is the one that was shared.

    Guarantees:
        What is returned is what was shared, as far as `valid` can tell.

    Edge cases:
        | shares                       | what happens                                        |
        |------------------------------|-----------------------------------------------------|
        | fewer than the threshold     | SecureSumError                                      |
        | more than the threshold      | those of the lowest members are used                |
        | one changed, or another's    | SecureSumError, since `valid` says no               |
        | a share of another size      | SecureSumError                                      |
        | a member below 1             | ValueError                                          |
    """
    if len(shares) < threshold:
        raise SecureSumError(f"{len(shares)} shares of a secret came where {threshold} are needed; start the round anew")
    used = {member: shares[member] for member in sorted(shares)[:threshold]}
    if min(used) < 1:
        raise ValueError("members are numbered from 1")
    if any(len(share) != SECRET for share in used.values()):
        raise SecureSumError(f"a share is not of {SECRET} bytes; start the round anew without the client that sent it")
    secret = b"".join(
        Shamir.combine([(member, share[at : at + BLOCK]) for member, share in used.items()], ssss=False)
        for at in range(0, SECRET, BLOCK)
    )
    if not valid(secret):
        raise SecureSumError("the shares of a secret do not give it, one of them is wrong; start the round anew")
    return secret


def commitment(secret: bytes) -> bytes:
    """32 bytes of a secret (SHA-256). Guarantees: they fit no other secret, and do not help to find a random one."""
    return hashlib.sha256(LABEL + secret).digest()


def opens(secret: bytes, committed: bytes) -> bool:
    """Whether `committed` is the commitment of a secret."""
    return hmac.compare_digest(commitment(secret), committed)
