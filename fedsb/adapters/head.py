"""A classification head on standardised features.

    logits = W·(h - μ)/s + b          h (…, d): what the base model makes of a text; μ (d,) and s: mean and spread of h over
                                      made-up texts

Features of a language model point mostly one way, whatever the text (Ethayarajh, arXiv 1909.00512): of MiniLM's, 1.27 long, a
vector of length 1.05 is common to all. On h itself each step of W, and each noise on it, moves all texts' logits along; on
h - μ it moves them apart. Divided by s (one number), features of every model are about √d long, so that one learning rate and one
clip suit them all. docs/log.md has what that is worth. It is the same set of functions: (W/s)·h + (b - W·μ/s), which is how
a head is exported.

Made-up texts are random tokens, the same for everybody, so μ and s follow from base model and tokenizer and say nothing about
anybody's data. They never travel.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedsb.adapters.state import HEAD
from fedsb.basis.spectral import seeded
from fedsb.models import HEADS

TEXTS, TOKENS = 64, 16


@dataclass(frozen=True)
class Features:
    """What features look like.

    Attributes:
        mean: μ (d,), fp32.
        spread: s, the root mean square of h - μ over texts and coordinates.
    """

    mean: Tensor
    spread: float


def linear_head(names: Iterable[str]) -> str | None:
    """The head whose features are standardised, from the names of a state: one linear layer with a bias."""
    found = {name.removeprefix(HEAD) for name in names if name.startswith(HEAD)}
    return next((head for head in HEADS if found == {f"{head}.weight", f"{head}.bias"}), None)


def features_of(model: Any, tokenizer: Any) -> Features | None:
    """Of a frozen transformers model in evaluation mode; None if it has no head for that."""
    found = linear_head(HEAD + name for name, _ in model.named_parameters() if name.partition(".")[0] in HEADS)
    if found is None:
        return None
    ids = torch.randint(len(tokenizer), (TEXTS, TOKENS), generator=seeded(0, "features"))
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in ids.tolist()]
    batch = tokenizer(texts, padding=True, truncation=True, max_length=2 * TOKENS, return_tensors="pt").to(model.device)
    seen: list[Tensor] = []
    handle = model.get_submodule(found).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    try:
        with torch.no_grad():
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    finally:
        handle.remove()
    h = seen[0].float().flatten(0, -2)  # (texts, d)
    mean = h.mean(0)
    spread = float((h - mean).square().mean().sqrt())
    return Features(mean, spread or 1.0)


def standardise(head: nn.Module, features: Features) -> None:
    """Let a trained head, which gets h, see (h - μ)/s. For good."""

    def standardised(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        h, *others = inputs
        return (h - features.mean.to(h)) / features.spread, *others

    head.register_forward_pre_hook(standardised)


def plain(head: Mapping[str, Tensor], features: Features) -> dict[str, Tensor]:
    """The parameters of such a head as those of the same head on h."""
    (weight, w), (bias, b) = ((name, head[name]) for end in ("weight", "bias") for name in head if name.endswith(f".{end}"))
    wide = w.double() / features.spread
    return {weight: wide.to(w.dtype), bias: (b.double() - wide @ features.mean.double()).to(b.dtype)}
