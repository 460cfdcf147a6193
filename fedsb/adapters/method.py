"""What a method is: one entry of `METHODS`, made in the method's own file."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from peft import PeftConfig
from torch import Tensor

Parts = Mapping[str, Tensor]  # what is trained in one layer: part → tensor
Dense = Callable[[Parts, Tensor], Tensor]
Chain = Callable[[Parts, Tensor | None, Tensor | None, float], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Method:
    """A way of adapting linear layers W0 (out, in) at rank r.

    Attributes:
        config: (rank, α, everything else that PEFT is told) → PEFT's configuration.
        parts: what is trained, and so travels: part → its shape in the letters `out`, `in`, `r` (`out/r`: a number of blocks).
        frames: which of B and A are frozen and shared by all; they are the basis.
        chain: (parts, B, A, α / r) → matrices whose product, from left to right, is the update of the weight (out, in). None
            where the update takes W0; then it is linear in the parts, and `dense` says it.
        exact: whether the mean of the parts is the mean of the updates, whatever the clients send.
        says: one sentence for the card of an exported adapter.
        rate: AdamW's learning rate for `train.learning_rate = "auto"`; None: by rank and basis (`fedsb.training.loop`).
        frame: (r, in) → A, where A alone is frozen and follows from its shape; None: from the run's seed.
        dense: (parts, W0) → the update of the weight (out, in), where there is no chain.
    """

    config: Callable[[int, float, dict[str, Any]], PeftConfig]
    parts: Mapping[str, tuple[str, ...]]
    frames: tuple[str, ...]
    chain: Chain | None
    exact: bool
    says: str
    rate: float | None = None
    frame: Callable[[tuple[int, int]], Tensor] | None = None
    dense: Dense | None = None

    def fits(self, part: str, shape: tuple[int, ...], rank: int) -> bool:
        """Whether a part of some layer can have this shape at this rank."""
        letters = self.parts.get(part, ())
        return len(shape) == len(letters) and all(
            size == rank for size, letter in zip(shape, letters, strict=True) if letter == "r"
        )
