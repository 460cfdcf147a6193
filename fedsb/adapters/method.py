"""What a method is: one entry of `METHODS`, made in the method's own file."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor, nn

from fedsb.config import RunConfig

Parts = Mapping[str, Tensor]  # what is trained in one layer: part → tensor
Chain = Callable[[Parts, Tensor | None, Tensor | None, float], tuple[Tensor, ...]]

Masks = list[tuple[nn.Parameter, Tensor]]  # of a step that trains only a part: parameter, where it learns
Around = Callable[[int], AbstractContextManager[Masks]]  # number of a step → what is open while it is taken


def wholly(step: int) -> AbstractContextManager[Masks]:
    """A step that trains everything."""
    return nullcontext([])


def by_steps(step: float, sent: Tensor) -> Tensor:
    """What is trained is the state itself: each number comes as far as the steps can move it."""
    return torch.full_like(sent, step)


@dataclass(frozen=True)
class Method:
    """A way of adapting linear layers W0 (out, in) at rank r.

    Attributes:
        config: (rank, α, everything else that PEFT is told) → PEFT's configuration.
        parts: what travels, by default all that is trained: part → its shape in the letters `out`, `in`, `r`, and `h` (heads).
        frames: which of B and A are frozen and shared by all; they are the basis.
        chain: (parts, B, A, α / r) → matrices whose product, from left to right, is the update of the weight (out, in).
        exact: whether the mean of the parts is the mean of the updates, whatever the clients send.
        says: one sentence for the card of an exported adapter.
        rate: AdamW's learning rate for `train.learning_rate = "auto"`; None: by rank and basis (`fedsb.training.loop`).
        heads: whether an update is a sum of `adapter.heads` heads of rank r.
        native: parts → the tensors of a core in our own format; None: there is no core.
        around: (run, model, client) → what is open around each of the client's steps; None: nothing.
        nested: `chain` with one argument more, a smaller rank, and the update at that; None: there are no smaller ranks.
        reach: (how far AdamW's steps can move a trained number, the state that was sent) → how far they can move the state.
    """

    config: Callable[[int, float, dict[str, Any]], PeftConfig]
    parts: Mapping[str, tuple[str, ...]]
    frames: tuple[str, ...]
    chain: Chain
    exact: bool
    says: str
    rate: float | None = None
    heads: bool = False
    native: Callable[[Parts], dict[str, Tensor]] | None = None
    around: Callable[[RunConfig, nn.Module, str], Around] | None = None
    nested: Callable[[Parts, Tensor | None, Tensor | None, float, int], tuple[Tensor, ...]] | None = None
    reach: Callable[[float, Tensor], Tensor] = by_steps

    def fits(self, part: str, shape: tuple[int, ...], rank: int) -> bool:
        """Whether a part of some layer can have this shape at this rank."""
        letters = self.parts.get(part, ())
        return len(shape) == len(letters) and all(
            size == rank for size, letter in zip(shape, letters, strict=True) if letter == "r"
        )

    def width(self, parts: Parts, rank: int) -> int:
        """How many columns B has: the rank, of a method with heads that of all heads together."""
        of = [tensor.shape[self.parts[part].index("h")] for part, tensor in parts.items() if "h" in self.parts[part]]
        return rank * int(of[0]) if of else rank
