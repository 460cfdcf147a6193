"""What a method is: one entry of `METHODS`, made in the method's own file."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from peft import PeftConfig
from torch import Tensor

Parts = Mapping[str, Tensor]  # what is trained in one layer: part → tensor
Chain = Callable[[Parts, Tensor | None, Tensor | None, float], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Method:
    """A way of adapting linear layers W0 (out, in) at rank r.

    Attributes:
        config: (rank, α, everything else that PEFT is told) → PEFT's configuration.
        parts: what is trained, and so travels: part → its shape in the letters `out`, `in`, `r`.
        frames: which of B and A are frozen and shared by all; they are the basis.
        chain: (parts, B, A, α / r) → matrices whose product, from left to right, is the update of the weight (out, in).
        exact: whether the mean of the parts is the mean of the updates, whatever the clients send.
        says: one sentence for the card of an exported adapter.
        rate: AdamW's learning rate for `train.learning_rate = "auto"`; None: by rank and basis (`fedsb.training.loop`).
        kept: parts (and `head`) that stay with each client and never travel in training (`fedsb.adapters.share`).
        nested: whether its adapters may be cut to a lower rank: leading columns of B, block of the core, rows of A.
    """

    config: Callable[[int, float, dict[str, Any]], PeftConfig]
    parts: Mapping[str, tuple[str, ...]]
    frames: tuple[str, ...]
    chain: Chain
    exact: bool
    says: str
    rate: float | None = None
    kept: tuple[str, ...] = ()
    nested: bool = False

    def cut(self, part: str, shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
        """The shape of a part's leading block at a rank; a head's parameter stays as it is."""
        letters = self.parts.get(part)
        return shape if letters is None else tuple(min(n, rank) if x == "r" else n for n, x in zip(shape, letters, strict=True))

    def fits(self, part: str, shape: tuple[int, ...], rank: int) -> bool:
        """Whether a part of some layer can have this shape at this rank."""
        letters = self.parts.get(part, ())
        return len(shape) == len(letters) and all(
            size == rank for size, letter in zip(shape, letters, strict=True) if letter == "r"
        )
