"""A classification head on centred features.

    logits = W·(h - μ) + b          h (…, d): what the base model makes of a text; μ (d,): the mean of h over made-up texts

Features of a language model point mostly one way, whatever the text (Ethayarajh, arXiv 1909.00512): of MiniLM's, 1.27 long, a
vector of length 1.05 is common to all. On h itself each step of W, and each noise on it, moves all texts' logits along; on
h - μ it moves them apart. docs/log.md has what that is worth. It is the same set of functions: W·h + (b - W·μ), which is how
a head is exported.

Made-up texts are random tokens, the same for everybody, so μ follows from base model and tokenizer and says nothing about
anybody's data. It never travels.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedsb.basis.spectral import seeded
from fedsb.models import HEADS

TEXTS, TOKENS = 64, 16


def linear_head(names: Collection[str]) -> str | None:
    """The head that can be centred, from the names of all head parameters: one linear layer with a bias."""
    return next((head for head in HEADS if set(names) == {f"{head}.weight", f"{head}.bias"}), None)


def centre(model: Any, tokenizer: Any) -> Tensor | None:
    """μ (d,), fp32, of a frozen transformers model in evaluation mode; None if it has no head that can be centred."""
    found = linear_head([name for name, _ in model.named_parameters() if name.partition(".")[0] in HEADS])
    if found is None:
        return None
    ids = torch.randint(len(tokenizer), (TEXTS, TOKENS), generator=seeded(0, "centre"))
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in ids.tolist()]
    batch = tokenizer(texts, padding=True, truncation=True, max_length=2 * TOKENS, return_tensors="pt").to(model.device)
    seen: list[Tensor] = []
    handle = model.get_submodule(found).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    try:
        with torch.no_grad():
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    finally:
        handle.remove()
    return seen[0].float().flatten(0, -2).mean(0)


def subtract(head: nn.Module, mean: Tensor) -> None:
    """Let a trained head, which gets h, see h - μ. For good."""
    head.register_forward_pre_hook(lambda module, inputs: (inputs[0] - mean.to(inputs[0]), *inputs[1:]))


def plain(head: Mapping[str, Tensor], mean: Tensor) -> dict[str, Tensor]:
    """A centred head's parameters as those of the same head on h: the bias is b - W·μ."""
    (weight, w), (bias, b) = ((name, head[name]) for end in ("weight", "bias") for name in head if name.endswith(f".{end}"))
    return {weight: w, bias: (b.double() - w.double() @ mean.double()).to(b.dtype)}
