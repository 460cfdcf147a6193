"""Local training: a client's steps of one round. Without state between rounds, so a resumed run repeats it exactly."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedsb.adapters.method import Around, wholly
from fedsb.adapters.methods import METHODS
from fedsb.adapters.state import HEAD
from fedsb.config import RunConfig
from fedsb.data.batches import Batch, Encoded, Kind, collate, draw
from fedsb.data.seeds import generator
from fedsb.training.drift import Control, Proximal
from fedsb.training.loss import causal_loss, classification_loss

FINAL_SHARE = 0.1  # of the learning rate at the end of the linear schedule
PERSONAL_SHARE = FINAL_SHARE  # personalisation goes on at the learning rate at which training ended
STEP_SIZE = {
    "random": 0.64,
    "weights": 0.64,
    "public": 0.32,
    "sketch": 0.32,
}  # learning rate times rank, by basis; docs/log.md, 2026-11-22
BETAS = (0.9, 0.999)  # of AdamW
LOWEST_RANK = 16  # below it the learning rate rises no further: 4e-2 is the largest at which training was seen to be stable


@dataclass(frozen=True)
class Plan:
    """Which steps to take, and at what learning rates.

    Attributes:
        first: number of the first step, counted from 0 over the whole run.
        count: steps to take.
        total: steps of the whole run, over which the schedule decays.
        mu: weight of the proximal term (`fedsb/training/drift.py`).
    """

    first: int
    count: int
    total: int
    batch_size: int
    microbatch: int
    learning_rate: float
    head_learning_rate: float
    warmup: int
    decay: bool
    mu: float = 0.0

    def factor(self, step: int) -> float:
        """What the learning rates are multiplied with at a step."""
        warm = min(1.0, (step + 1) / (self.warmup + 1))
        return warm * (1 - (1 - FINAL_SHARE) * step / self.total) if self.decay else warm


def learning_rate(config: RunConfig) -> float:
    """The configured learning rate; `auto`: the measured one, falling with the rank.

    AdamW moves every entry of a core by about the learning rate, so ‖B·ΔR·A‖ = ‖ΔR‖ by learning rate times r a step,
    whatever the layer's size: that is what is kept the same. A basis from gradients points at what the loss is steepest
    in, and takes half. RAVAN's h heads have h·r² numbers, and so the rate of a core of rank r·√h; untuned.
    """
    chosen, adapter = config.train.learning_rate, config.adapter
    if chosen != "auto":
        return chosen
    method = METHODS[adapter.method]
    rank = adapter.rank * math.sqrt(1 if method.in_turn else config.head_count)
    return method.rate or STEP_SIZE[config.basis.source] / max(rank, LOWEST_RANK)


def round_plan(config: RunConfig, server_round: int) -> Plan:
    """The steps of a client in `server_round`, counted from 1."""
    train = config.train
    return Plan(
        first=(server_round - 1) * train.steps,
        count=train.steps,
        total=config.federation.rounds * train.steps,
        batch_size=train.batch_size,
        microbatch=train.microbatch,
        learning_rate=learning_rate(config),
        head_learning_rate=train.head_learning_rate,
        warmup=train.warmup_steps,
        decay=train.schedule == "linear",
        mu=config.strategy.mu if config.strategy.name == "fedprox" else 0.0,
    )


def personal_plan(config: RunConfig) -> Plan:
    """The steps of personalisation: they go on where the last round ended, at a steady rate."""
    personal, train = config.personal, config.train
    rate = learning_rate(config) * PERSONAL_SHARE if personal.learning_rate == "auto" else personal.learning_rate
    return Plan(
        first=config.federation.rounds * train.steps,
        count=personal.steps,
        total=config.federation.rounds * train.steps + personal.steps,
        batch_size=train.batch_size,
        microbatch=train.microbatch,
        learning_rate=rate,
        head_learning_rate=train.head_learning_rate * PERSONAL_SHARE,
        warmup=0,
        decay=False,
    )


def largest_update(plan: Plan) -> tuple[float, float]:
    """How far the plan's steps can move one number of a core, and one of a head, whatever the gradients.

    The t-th step of AdamW moves a number by lr·|m̂|/(√v̂ + eps), where m̂ and v̂ are weighted means of the gradients and of
    their squares; the optimiser starts anew with each plan, and nothing decays the weights. By Cauchy-Schwarz

        |m̂|/√v̂  ≤  (1-β1)/√(1-β2) · √(Σ_{k<t} (β1²/β2)^k) · √(1-β2^t)/(1-β1^t),

    which gradients that grow by β2/β1 a step attain: 1 at the first step, 1.16 at the 20th, 7.27 in the end. The bound of
    Kingma & Ba (arXiv 1412.6980, section 2.1), (1-β1)/√(1-β2) = 3.16, is for a gradient that was zero before.
    """
    first, second = BETAS
    series = moved = 0.0
    for t in range(1, plan.count + 1):
        series = 1 + series * first**2 / second
        ratio = (1 - first) / math.sqrt(1 - second) * math.sqrt(series * (1 - second**t)) / (1 - first**t)
        moved += plan.factor(plan.first + t - 1) * ratio
    return plan.learning_rate * moved, plan.head_learning_rate * moved


def train(
    model: Any,
    parameters: Mapping[str, nn.Parameter],
    rows: Sequence[Encoded],
    plan: Plan,
    *,
    kind: Kind,
    pad_id: int,
    seed: int,
    client: str,
    around: Around = wholly,
    control: Control | None = None,
    kept: Collection[str] = (),
) -> float:
    """Take the plan's AdamW steps on `parameters` in place and return the mean training loss (nats), without the proximal term.

    Args:
        model: the transformers model (not the PEFT wrapper) that holds the parameters.
        rows: the client's training examples; which of them a step takes is drawn from (seed, client, step).
        around: what is open around a step (`Method.around`).
        control: corrects the gradients (SCAFFOLD), and remembers what they were.
        kept: parameters that stay with the client, which the proximal term leaves alone.
    """
    loss_of, device = loss_function(kind), next(iter(parameters.values())).device
    optimiser, proximal = optimiser_of(parameters, plan), Proximal(parameters, plan.mu, kept)
    losses: list[Tensor] = []
    model.train()
    seed_dropout(seed, client, plan.first)
    for step in range(plan.first, plan.first + plan.count):
        drawn = [rows[i] for i in draw(len(rows), step, plan.batch_size, seed, client)]
        drawn.sort(key=len)  # neighbours of like length have little padding
        for group in optimiser.param_groups:
            group["lr"] = group["base"] * plan.factor(step)
        optimiser.zero_grad(set_to_none=True)
        total = torch.zeros((), device=device)
        with around(step):
            for start in range(0, len(drawn), plan.microbatch):
                part = drawn[start : start + plan.microbatch]
                loss = loss_of(model, collate(part, pad_id, kind).to(device)) * (len(part) / len(drawn))
                loss.backward()  # type: ignore[no-untyped-call]
                total += loss.detach()
            proximal.add(parameters)
            if control:
                control.add(parameters)
            optimiser.step()
        losses.append(total)
    model.eval()
    return float(torch.stack(losses).mean()) if losses else float("nan")


def loss_function(kind: Kind) -> Callable[[Any, Batch], Tensor]:
    """(model, batch) → the mean of per-sequence losses, a scalar."""
    return classification_loss if kind == "classification" else causal_loss


def optimiser_of(parameters: Mapping[str, nn.Parameter], plan: Plan) -> torch.optim.AdamW:
    """AdamW with a group for cores and one for heads; `base` of a group is its learning rate before the schedule."""
    heads = [p for name, p in parameters.items() if name.startswith(HEAD)]
    cores = [p for name, p in parameters.items() if not name.startswith(HEAD)]
    groups = [
        {"params": params, "base": base}
        for params, base in ((cores, plan.learning_rate), (heads, plan.head_learning_rate))
        if params
    ]
    return torch.optim.AdamW(groups, lr=plan.learning_rate, betas=BETAS, weight_decay=0.0)


def seed_dropout(seed: int, client: str, step: int) -> None:
    """Let dropout from `step` on follow from seed, client and step."""
    torch.manual_seed(int(generator(seed, "dropout", client, step).integers(2**31)))
