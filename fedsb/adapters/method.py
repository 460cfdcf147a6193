"""What a method is: one entry of `METHODS`, made in the method's own file."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor, nn

from fedsb.basis.frames import Basis
from fedsb.config import RunConfig

Parts = Mapping[str, Tensor]  # what is trained in one layer: part → tensor
Dense = Callable[[Parts, Tensor], Tensor]
Chain = Callable[[Parts, Tensor | None, Tensor | None, float], tuple[Tensor, ...]]
FoldOf = Callable[[Sequence[Parts], Sequence[float], Parts, float], tuple[Tensor, Tensor]]
Shapes = Mapping[str, tuple[int, int]]  # layer → (out, in)
Expand = Callable[[Mapping[str, Parts], Shapes, int, int], Mapping[str, Parts]]
Start = Callable[[Basis, float], dict[str, dict[str, Tensor]]]

Masks = list[tuple[nn.Parameter, Tensor]]  # of a step that trains only a part: parameter, where it learns
Around = Callable[[int], AbstractContextManager[Masks]]  # number of a step → what is open while it is taken


@contextmanager
def learning_only(masks: Masks) -> Iterator[Masks]:
    """On leaving, only what the masks name has changed. A gradient of zero does not see to that: AdamW's momentum, and under
    privacy the noise, would move the rest."""
    kept = [parameter.detach().clone() for parameter, _ in masks]
    try:
        yield masks
    finally:
        with torch.no_grad():
            for (parameter, mask), before in zip(masks, kept, strict=True):
                parameter.copy_(torch.where(mask, parameter, before))


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
        parts: what travels, by default all that is trained: part → its shape in the letters `out`, `in`, `r`, `h` (heads), and
            `out/r`, `in/r` (numbers of blocks).
        frames: which of B and A are frozen and shared by all; they are the basis.
        chain: (parts, B, A, α / r) → matrices whose product, from left to right, is the update of the weight (out, in). None
            where the update is linear in the parts and takes W0; then `dense` says it.
        multiplies: whether it is W0 times that product, entry by entry.
        exact: whether the mean of the parts is the mean of the updates, whatever the clients send.
        says: one sentence for the card of an exported adapter.
        fold: (clients' parts, their shares of the mean, the mean of the parts, scale) → U (out, k), V (k, in) of a layer: what is
            added to W0 after a round, since a state cannot hold it. It takes each client's own parts, so there is no secure sum.
        restarts: whether the parts start anew after each round.
        start: (basis, scale) → the parts of each layer before the first round, where they follow from the basis.
        rslora: whether updates are scaled by α/√r instead of α/r.
        rate: AdamW's learning rate for `train.learning_rate = "auto"`; None: by rank and basis (`fedsb.training.loop`).
        frame: (r, in) → A, where A alone is frozen and follows from its shape; None: from the run's seed.
        dense: (parts, W0) → the update of the weight (out, in), where there is no chain.
        heads: whether an update is a sum of `adapter.heads` heads of rank r.
        in_turn: whether heads are trained one after another (`RunConfig.turn`): only the one whose turn it is comes back from a
            client, and only it and those before it go out.
        native: parts → the tensors of a core in our own format; None: there is no core.
        around: (run, model, client) → what is open around each of the client's steps; None: nothing.
        kept: parts (and `head`) that stay with each client and never travel in training (`fedsb.adapters.share`).
        down: parts that a client is sent, and neither trains nor sends.
        nested: whether its adapters may be cut to a lower rank: leading columns of B, block of the core, rows of A.
        expand: (layer → parts, layer → (out, in), rank, seed) → layer → the parts that `chain` takes, where those that are
            trained mean something only with what follows from the seed.
        draws: parts that do not start as zero → (shape, generator) → the part (`A`, which several have, is drawn as LoRA's).
        begins: parts with which a run starts, where these are not the base model's: (shape, generator) → the part.
        settings: run → what else PEFT is told.
        output: (parts, inputs (n, in)) → what a layer makes of them, where it changes no weight: its prompts.
        reach: (how far AdamW's steps can move a trained number, the state that was sent) → how far they can move the state.
    """

    config: Callable[[int, float, dict[str, Any]], PeftConfig]
    parts: Mapping[str, tuple[str, ...]]
    frames: tuple[str, ...]
    chain: Chain | None
    exact: bool
    says: str
    fold: FoldOf | None = None
    restarts: bool = False
    start: Start | None = None
    rslora: bool = False
    rate: float | None = None
    frame: Callable[[tuple[int, int]], Tensor] | None = None
    dense: Dense | None = None
    heads: bool = False
    in_turn: bool = False
    native: Callable[[Parts], dict[str, Tensor]] | None = None
    around: Callable[[RunConfig, nn.Module, str], Around] | None = None
    kept: tuple[str, ...] = ()
    down: tuple[str, ...] = ()
    nested: bool = False
    multiplies: bool = False
    expand: Expand | None = None
    draws: Mapping[str, Callable[[tuple[int, ...], torch.Generator], Tensor]] = field(default_factory=dict)
    begins: Mapping[str, Callable[[tuple[int, ...], torch.Generator], Tensor]] = field(default_factory=dict)
    settings: Callable[[RunConfig], dict[str, Any]] | None = None
    output: Callable[[Parts, Tensor], Tensor] | None = None
    reach: Callable[[float, Tensor], Tensor] = by_steps

    @property
    def folds(self) -> bool:
        """Whether something is added to W0: once at the start, or after each round."""
        return self.fold is not None or self.start is not None

    @property
    def takes_weights(self) -> bool:
        """Whether an update cannot be told without W0, and so is no short product."""
        return self.dense is not None or self.multiplies

    def update(self, parts: Parts, b: Tensor | None, a: Tensor | None, scale: float, weight: Tensor) -> Tensor:
        """The update of a weight W0 (out, in), in the dtype of the parts, expanded where the method does that; folds apart."""
        if self.dense is not None:
            return self.dense(parts, weight)
        assert self.chain is not None
        product = reduce(torch.matmul, self.chain(parts, b, a, scale))
        return weight.to(product.dtype) * product if self.multiplies else product

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

    def width(self, parts: Parts, rank: int) -> int:
        """How many columns B has: the rank, of a method with heads that of all heads together."""
        of = [tensor.shape[self.parts[part].index("h")] for part, tensor in parts.items() if "h" in self.parts[part]]
        return rank * int(of[0]) if of else rank
