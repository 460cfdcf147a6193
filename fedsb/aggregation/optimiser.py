"""Server optimisers: the mean of the clients' updates as a gradient, and the server takes the step.

    Δ = mean - x;   m ← β1·m + (1-β1)·Δ;   v ← …;   x ← x + η·m / (√v + τ)

Reddi et al., "Adaptive federated optimization", arXiv 2003.00295, algorithm 2. m and v begin at 0. The steps are those of
Flower's FedAdam, FedYogi and FedAdagrad (tests hold them against those), FedAdam's correction of the bias included, which the
paper does not have: in round t, counted from 1, η·√(1-β2^(t+1)) / (1-β1^(t+1)). They are written out here in fp64, since
Flower's make the mean themselves, of replies that pass no checks, and a private or secure mean is none of theirs.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

MOMENTS = ("m", "v")


@dataclass(frozen=True)
class Settings:
    """η, β1, β2 and τ of the equations above."""

    rate: float
    beta1: float
    beta2: float
    tau: float


@dataclass(frozen=True)
class Optimiser:
    """What tells one optimiser from another.

    Attributes:
        second: (v, Δ², settings) → v.
        factor: (settings, round from 1) → what η is multiplied with.
    """

    second: Callable[[Tensor, Tensor, Settings], Tensor]
    factor: Callable[[Settings, int], float] = lambda settings, number: 1.0


def adam(v: Tensor, squared: Tensor, settings: Settings) -> Tensor:
    """v ← β2·v + (1-β2)·Δ²."""
    return settings.beta2 * v + (1 - settings.beta2) * squared


def yogi(v: Tensor, squared: Tensor, settings: Settings) -> Tensor:
    """v ← v - (1-β2)·Δ²·sign(v - Δ²)."""
    return v - (1 - settings.beta2) * squared * torch.sign(v - squared)


def adagrad(v: Tensor, squared: Tensor, settings: Settings) -> Tensor:
    """v ← v + Δ²."""
    return v + squared


def adam_factor(settings: Settings, number: int) -> float:
    """What FedAdam multiplies η with in round `number`."""
    return math.sqrt(1 - settings.beta2 ** (number + 1)) / (1 - settings.beta1 ** (number + 1))


OPTIMISERS = {"fedadam": Optimiser(adam, adam_factor), "fedyogi": Optimiser(yogi), "fedadagrad": Optimiser(adagrad)}


def step(
    sent: Tensor,
    average: Tensor,
    memory: Mapping[str, Tensor],
    optimiser: Optimiser,
    settings: Settings,
    number: int,
    held: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The new state (size,), fp32, and the new moments.

    Args:
        sent: the state (size,) that the round began with.
        average: the mean (size,) of what came back.
        memory: the moments m and v (size,), fp64, of the round before; empty before the first.
        number: of the round, from 1.
        held: which numbers (size,) came back from somebody; the others and their moments stay as they are. None: all did.
    """
    delta = average.double() - sent.double()
    m, v = (memory[name] for name in MOMENTS) if memory else (torch.zeros_like(delta), torch.zeros_like(delta))
    new_m = settings.beta1 * m + (1 - settings.beta1) * delta
    new_v = optimiser.second(v, delta.square(), settings)
    moved = sent.double() + settings.rate * optimiser.factor(settings, number) * new_m / (new_v.sqrt() + settings.tau)
    if held is not None:
        moved, new_m, new_v = (torch.where(held, new, old) for new, old in ((moved, sent.double()), (new_m, m), (new_v, v)))
    return moved.to(torch.float32), {"m": new_m, "v": new_v}
