"""Nested cores: LoRA-SB whose clients have different ranks, and whose cores may be cut.

    y = W0·x + B[:, :b]·R[:b, :b]·A[:b]·x          b: the client's rank, drawn anew in each step if `adapter.nested`

The basis is ordered by singular value (any order will do for a random one), so the leading block of a core is a core on the
leading part of the basis. A client of rank b trains, sends and receives b x b numbers a layer; each number is averaged over
those who hold it, which for that number is as exact as LoRA-SB's mean. Drawing ranks in training is the idea of DyLoRA
(Valipour et al., arXiv 2210.07558), with a core in the place of two factors: every leading block then works by itself.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from fedsb.adapters.lora_sb import LORA_SB, LoraSbLinear
from fedsb.adapters.state import layers_of
from fedsb.config import RunConfig
from fedsb.data.seeds import generator

SAYS = (
    "The sites share a frozen basis (B, A); each layer computes `y = W0 x + B R A x`, and only the core R is trained, of which a "
    "site holds the leading block."
)
NESTED_SB = replace(LORA_SB, says=SAYS, nested=True)


@contextmanager
def at_rank_of(model: Any, config: RunConfig, client: str) -> Iterator[Callable[[int], None]]:
    """While open, only the leading block of each core, of the client's rank, is used and has a gradient.

    Yields what is to be called with the number of each step: with `adapter.nested` it draws the block anew, from
    1 x 1 to the client's own, from seed, client and step. For a client of full rank it changes nothing.
    """
    layers, rank = [layer for layer in layers_of(model).values() if isinstance(layer, LoraSbLinear)], config.rank_of(client)

    def cut(to: int | None) -> None:
        for layer in layers:
            layer.cut = to

    def step(number: int) -> None:
        if config.adapter.nested:
            cut(int(generator(config.seed, "nested", client, number).integers(1, rank + 1)))

    cut(rank if rank < config.adapter.rank else None)
    try:
        yield step
    finally:
        cut(None)
