"""Nested cores: LoRA-SB whose clients have different ranks, and whose cores may be cut.

    y = W0·x + B[:, :b]·R[:b, :b]·A[:b]·x          b: the client's rank, drawn anew in each step if `adapter.nested`

The basis is ordered by singular value (any order will do for a random one), so the leading block of a core is a core on the
leading part of the basis. A client of rank b trains, sends and receives b x b numbers a layer; each number is averaged over
those who hold it, which for that number is as exact as LoRA-SB's mean. Drawing ranks in training is the idea of DyLoRA
(Valipour et al., arXiv 2210.07558), with a core in the place of two factors: every leading block then works by itself.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fedsb.adapters.lora_sb import LORA_SB, LoraSbConfig, LoraSbLinear, block_of
from fedsb.adapters.method import Around, Masks
from fedsb.adapters.state import layers_of
from fedsb.config import RunConfig
from fedsb.data.seeds import generator


@dataclass
class NestedSbConfig(LoraSbConfig):
    """`LoraSbConfig` of an adapter that was trained as nested cores; by itself it is a LoRA-SB."""

    method: str = "nested-sb"


@contextmanager
def cut_to(model: nn.Module, rank: int | None) -> Iterator[Masks]:
    """While open, only the leading block of each core is used; on leaving, only that has changed. None: all of it."""
    if rank is None:
        yield []
        return
    layers = [layer for layer in layers_of(model).values() if isinstance(layer, LoraSbLinear)]
    masks: Masks = []
    for layer in layers:
        core: nn.Parameter = layer.core("default").weight  # type: ignore[assignment]
        learns = torch.zeros_like(core, dtype=torch.bool)
        learns[:rank, :rank] = True
        masks.append((core, learns))
    with block_of(layers, rank, masks):
        yield masks


def at_rank_of(config: RunConfig, model: nn.Module, client: str) -> Around:
    """Steps at the client's rank; with `adapter.nested` at one from 1 to it, drawn from seed, client and step."""
    most = config.rank_of(client)

    def around(step: int) -> AbstractContextManager[Masks]:
        nested = config.adapter.nested
        rank = int(generator(config.seed, "nested", client, step).integers(1, most + 1)) if nested else most
        return cut_to(model, rank if rank < config.adapter.rank else None)

    return around


def _config(rank: int, alpha: float, told: dict[str, Any]) -> NestedSbConfig:
    return NestedSbConfig(r=rank, basis="later", **told)


SAYS = (
    "The sites share a frozen basis (B, A); each layer computes `y = W0 x + B R A x`, and only the core R is trained, of which a "
    "site holds the leading block."
)
NESTED_SB = replace(LORA_SB, config=_config, says=SAYS, nested=True, around=at_rank_of)
