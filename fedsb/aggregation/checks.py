"""What is refused before it counts: a reply that is not what was asked for is named and left out, never averaged."""

import torch
from torch import Tensor

from fedsb.errors import ReplyError


def check_vector(vector: Tensor, size: int) -> None:
    """Raise ReplyError unless `vector` holds `size` finite numbers."""
    if vector.ndim != 1 or vector.numel() != size:
        raise ReplyError(f"sent an array of shape {tuple(vector.shape)} where ({size},) was expected")
    if not bool(torch.isfinite(vector).all()):
        raise ReplyError("sent NaN or infinite numbers")


def check_equal(what: str, sent: object, expected: object) -> None:
    """Raise ReplyError unless a reply speaks of the same round, layout or basis as the question."""
    if sent != expected:
        raise ReplyError(f"answered for {what} {str(sent)[:16]} where {str(expected)[:16]} was asked")


def check_weight(examples: object) -> None:
    """Raise ReplyError unless the number of examples is a positive whole number below 2^29."""
    if not isinstance(examples, int) or not 0 < examples < 2**29:
        raise ReplyError(f"gave {examples!r} as its number of examples")
