"""What is refused before it counts: a reply that is not what was asked for is named and left out, never averaged."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsb.errors import ReplyError

SLACK = 0.01  # AdamW rounds in fp32, by less than 2^-21 a step: below this up to 20,000 steps a round


@dataclass(frozen=True)
class Reach:
    """Where local training can come to from the state that was sent.

    Attributes:
        sent: the state that was sent (size,), fp32.
        most: by how much each number may differ from it (size,).
        norm: largest L2 norm of the whole difference; None: as large as `most` lets it be.
    """

    sent: Tensor
    most: Tensor
    norm: float | None

    @classmethod
    def of(cls, sent: Tensor, largest: Tensor, steps: int, *, bf16: bool, norm: float | None) -> "Reach":
        """From what exact steps can move each number by (`largest`).

        On top of that comes rounding: of the numbers themselves to fp32 after each step, and to bf16 on the way back.
        """
        rounding = steps * 2.0**-24 + (2.0**-8 if bf16 else 0.0)
        smallest = torch.finfo(torch.float32).tiny  # below it rounding is no longer relative
        return cls(sent, largest * (1 + SLACK) + rounding * (sent.abs() + largest) + smallest, norm)

    def check(self, vector: Tensor) -> float:
        """The L2 norm of a state's difference from the one sent. Raises ReplyError if training cannot have made it."""
        difference = vector - self.sent
        beyond = difference.abs().sub_(self.most)
        worst = int(beyond.argmax())
        if beyond[worst] > 0:
            raise ReplyError(
                f"moved a number by {float(difference[worst].abs()):.3g} where its steps can move it by "
                f"{float(self.most[worst]):.3g}"
            )
        norm = float(torch.linalg.vector_norm(difference))
        if self.norm is not None and norm > self.norm:
            raise ReplyError(f"sent an update of norm {norm:.3g} where federation.max_update_norm = {self.norm:.3g}")
        return norm


class Strikes:
    """How many replies of each client were refused, and who is left out for it.

    Args:
        limit: refused replies after which a client is left out; 0: never.
        counts: client → refused replies so far.
    """

    def __init__(self, limit: int, counts: Mapping[str, int]) -> None:
        self.limit, self.counts = limit, dict(counts)

    def add(self, client: str) -> None:
        """Count one."""
        self.counts[client] = self.counts.get(client, 0) + 1

    def out(self, client: str) -> bool:
        """Whether a client is left out."""
        return 0 < self.limit <= self.counts.get(client, 0)


def check_size(sent: int, most: int) -> None:
    """Raise ReplyError if a reply has more bytes than the answer to its question can have."""
    if sent > most:
        raise ReplyError(f"sent {sent:,} bytes where an answer has {most:,} at the most")


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
