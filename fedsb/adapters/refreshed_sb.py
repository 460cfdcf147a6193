"""LoRA-SB on a basis that is refreshed: cores trained one after another, each on frames of its own.

    y = W0·x + Σ_{i ≤ t} B_i·R_i·A_i·x          t: whose turn it is; B_i (out, r), R_i (r, r), A_i (r, in), x (…, in)

A core moves W0 in r² directions that were fixed before the first step. Here the rounds are cut into h equal parts; in each
the next core is trained, from zero, on frames orthogonal to all before it, and those before it stay as they are. So what was
learnt stays exactly: a change of basis R' = B'ᵀ·B·R·A·A'ᵀ would keep what the new frames hold of it, next to nothing.
Like RAVAN (arXiv 2506.05568) with heads in turn and no scales, in whose form it is kept; as ReLoRA (arXiv 2307.05695) restarts
LoRA, but with cores and without a change of W0. The update has rank h·r. The idea is ours; that a basis fixed at the start goes
stale is RAVAN's criticism of Fed-SB.

A client sends the core whose turn it is, r² numbers a layer, and receives that and those before it.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fedsb.adapters.lora_sb import LoraSbLinear, block_of
from fedsb.adapters.method import Around, Masks, by_steps
from fedsb.adapters.ravan import RAVAN, Heads, RavanConfig
from fedsb.adapters.state import layers_of
from fedsb.config import RunConfig


@dataclass
class RefreshedSbConfig(RavanConfig):
    """Configuration for `get_peft_model(model, RefreshedSbConfig(r=32, heads=5))`; `heads`: how many cores there are."""

    method: str = "refreshed-sb"


@contextmanager
def turn_of(model: nn.Module, turn: int, adapter: str = "default") -> Iterator[Masks]:
    """While open, only cores 0 … `turn` are used, and on leaving only the last of them has changed.

        from fedsb.adapters.tuner import RefreshedSbConfig      # which teaches PEFT our adapters
        model = get_peft_model(base, RefreshedSbConfig(r=32, heads=5))
        for step, batch in enumerate(batches):
            optimiser.zero_grad()
            with turn_of(model, 5 * step // len(batches)):
                model(**batch).loss.backward()
                optimiser.step()

    Yields (parameter, mask of what learns). Raises ValueError for a turn that a layer does not have, and a model without cores.
    """
    layers = [m for m in layers_of(model).values() if isinstance(m, LoraSbLinear) and adapter in m.fedsb_core]
    cores = [layer.core(adapter) for layer in layers]
    if not cores or not all(isinstance(core, Heads) for core in cores):
        raise ValueError(f"the model has no cores in turn with the name {adapter}; make it with RefreshedSbConfig()")
    masks: Masks = []
    count, rank, _ = cores[0].heads.shape
    if not 0 <= turn < count:
        raise ValueError(f"turn {turn} is not one of 0 to {count - 1}; choose one of these")
    for core in cores:
        mine = torch.arange(count, device=core.heads.device) == turn
        masks += [(core.heads, mine[:, None, None]), (core.scales, torch.zeros_like(mine))]  # scales stay 1
    with block_of(layers, (turn + 1) * rank, masks):
        yield masks


def _around(config: RunConfig, model: nn.Module, client: str) -> Around:
    def around(step: int) -> AbstractContextManager[Masks]:
        return turn_of(model, config.turn(step // config.train.steps + 1))

    return around


def _config(rank: int, alpha: float, told: dict[str, Any]) -> RefreshedSbConfig:
    return RefreshedSbConfig(r=rank, basis="later", **told)


SAYS = (
    "The sites share frozen random bases (B_i, A_i); each layer computes `y = W0 x + sum_i B_i R_i A_i x`, and the cores R_i are "
    "trained one after another."
)
REFRESHED_SB = dataclasses.replace(RAVAN, config=_config, says=SAYS, around=_around, in_turn=True, reach=by_steps)
