"""LoRA, by PEFT: two trained factors.

    y = W0·x + (α/r)·B·A·x          x (…, in), A (r, in), B (out, r), y (…, out)

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, section 4.1. Federated as FedIT (Zhang et al.,
arXiv 2305.05644): A and B are averaged apart, which is not the mean of the updates, since mean(Bᵢ·Aᵢ) ≠ mean(Bᵢ)·mean(Aᵢ); how
far it is off is measured each round.
"""

from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor

from fedsb.adapters.method import Method, Parts


def lora_config(rank: int, alpha: float, told: dict[str, Any]) -> LoraConfig:
    """PEFT's configuration. A and B of PEFT's own choice are replaced by those of a state before anything is computed."""
    whole: Any = int(alpha) if alpha == int(alpha) else alpha  # PEFT declares an integer and takes any number
    return LoraConfig(r=rank, lora_alpha=whole, **told)


def start_of_a(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A (r, in) at the start, fp32: uniform within ±1/√in, which is kaiming_uniform with a = √5, as LoRA and PEFT have it."""
    bound: float = shape[1] ** -0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def lora_chain(parts: Parts, b: Tensor | None, a: Tensor | None, scale: float) -> tuple[Tensor, ...]:
    """(α/r)·B and A."""
    return scale * parts["B"], parts["A"]


SAYS = "Each layer computes `y = W0 x + (alpha/r) B A x`; the sites train A and B, which are averaged apart (FedIT)."
LORA = Method(lora_config, {"A": ("r", "in"), "B": ("out", "r")}, (), lora_chain, exact=False, says=SAYS, rate=2e-3)
