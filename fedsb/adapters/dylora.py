"""DyLoRA: PEFT's LoRA, trained so that each of its ranks works by itself.

    y = W0·x + (α/b)·B[:, :b]·A[:b]·x          b drawn anew each step from r_min … r, the same in all layers

Valipour, Rezagholizadeh, Kobyzev, Ghodsi, "DyLoRA: Parameter-Efficient Tuning of Pretrained Models using Dynamic Search-Free
Low Rank Adaptation", arXiv 2210.07558: a step trains the first b rows of A and columns of B, or with `frozen` only the b-th of
each, those before it taking part as they are. Scored and exported whole, as LoRA of rank r with α/r; or cut to any b.

Drawn uniformly, from (seed, client, step). A rank that each client draws for itself breaks privacy in a federation (DP-DyLoRA,
arXiv 2405.06368), so there all have the one of (seed, round).

What a step does not train stays as it is. A zero gradient alone would not keep it: AdamW's momentum goes on for some steps after
the last gradient. So values are put back; the moments see the zero. Each number thus moves by at most what AdamW's steps can
move it by, whichever it takes part in.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from fedsb.adapters.lora import LORA, lora_config
from fedsb.adapters.method import Masks, Method, learning_only
from fedsb.config import RunConfig
from fedsb.data.seeds import generator


@contextmanager
def at_rank(model: nn.Module, rank: int, frozen: bool = False, adapter: str = "default") -> Iterator[Masks]:
    """While open, a model with PEFT's LoRA computes at that rank, and on leaving only what that rank trains has changed.

        model = get_peft_model(base, LoraConfig(r=8))      # the adapter is a plain LoRA
        for batch in batches:
            optimiser.zero_grad()
            with at_rank(model, random.randint(1, 8)):
                model(**batch).loss.backward()
                optimiser.step()

    Also for scoring a rank without exporting it. Yields (parameter, mask of what learns), for who works on gradients himself.
    PEFT's scale, whichever it is, is multiplied with r / b. Raises ValueError for a rank that a layer does not have, a model
    without LoRA, and adapters that are merged or of a variant such as DoRA, which compute elsewhere.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLinear) and adapter in module.lora_A]
    if not layers:
        raise ValueError(f"the model has no LoRA with the name {adapter}; make it by get_peft_model(model, LoraConfig())")
    most = min(layer.r[adapter] for layer in layers)
    if not 1 <= rank <= most:
        raise ValueError(f"rank {rank} is not one of 1 to {most}; choose one of these")
    if any(layer.merged or adapter in layer.lora_variant for layer in layers):
        raise ValueError(
            "adapters that are merged, or of a variant such as DoRA, have their whole rank; unmerge, or take plain LoRA"
        )
    masks: Masks = []
    handles = []
    for layer in layers:
        a: Any = layer.lora_A[adapter]
        b: Any = layer.lora_B[adapter]
        place = torch.arange(layer.r[adapter], device=a.weight.device)
        factors = (place < rank) * (len(place) / rank)  # PEFT multiplies with α/r
        handles.append(b.register_forward_pre_hook(_scaled_by(factors)))  # of B, so that Opacus sees what A and B see
        learns = place == rank - 1 if frozen else place < rank
        masks += [(a.weight, learns[:, None]), (b.weight, learns[None, :])]
    handles += [parameter.register_hook(mask.__mul__) for parameter, mask in masks if parameter.requires_grad]
    try:
        with learning_only(masks):
            yield masks
    finally:
        for handle in handles:
            handle.remove()


def _scaled_by(factors: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    return lambda module, args: (args[0] * factors.to(args[0].dtype),)


def drawn_rank(config: RunConfig, client: str, step: int) -> int:
    """The rank of a step, which is counted over the whole run; personalisation comes after the last round."""
    adapter = config.adapter
    number = min(step // config.train.steps, config.federation.rounds)
    of = ("round", number) if adapter.draw == "round" else (client, step)
    return int(generator(config.seed, "rank", *of).integers(adapter.smallest_rank, adapter.rank + 1))


def _around(config: RunConfig, model: nn.Module, client: str) -> Callable[[int], AbstractContextManager[Masks]]:
    return lambda step: at_rank(model, drawn_rank(config, client, step), config.adapter.frozen)


SAYS = (
    "Each layer computes `y = W0 x + (alpha/r) B A x`; the sites train A and B, which are averaged apart, at ranks b drawn by "
    "chance, so that the first b rows of A and columns of B work too, with alpha/b."
)
DYLORA = Method(
    lora_config, LORA.parts, (), LORA.chain, exact=False, says=SAYS, rate=2e-3, around=_around, nested=True
)  # the rate of LoRA, untuned
