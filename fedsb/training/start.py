"""How a run starts: the basis that its configuration asks for."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fedsb.adapters.attach import initial_state, layout_of, scale_of, shapes_of
from fedsb.adapters.lora import start_of_a
from fedsb.adapters.lora_ga import lora_ga_basis
from fedsb.adapters.lora_xs import lora_xs_basis
from fedsb.adapters.methods import METHODS
from fedsb.adapters.pool import read_pool
from fedsb.adapters.state import layers_of, set_state
from fedsb.basis.frames import DTYPES, Basis
from fedsb.basis.gradient import gradient_basis
from fedsb.basis.sketch import SketchPlan
from fedsb.basis.spectral import heads_basis, random_basis, seeded, weights_basis
from fedsb.config import RunConfig
from fedsb.data.batches import Batch, collate, encode
from fedsb.data.sites import public_examples
from fedsb.errors import BasisError
from fedsb.models import load_extractor, locate
from fedsb.training.loss import causal_loss, classification_loss

MICROBATCH = 4  # examples per backward pass of the estimate: half a training step's activations or fewer


def can_rebuild(config: RunConfig) -> bool:
    """Whether a client can build the basis by itself, so that it need not be sent."""
    return config.basis.source in ("random", "weights")


def basis_source(config: RunConfig) -> str:
    """Where the basis comes from, for people: `none` if the method has none; of A alone `seed`, or `shape`."""
    method = METHODS[config.adapter.method]
    if set(method.frames) == {"B", "A"} or method.start is not None:
        return config.basis.source
    return ("shape" if method.frame else "seed") if method.frames else "none"


def needs_weights(config: RunConfig) -> bool:
    """Whether building the basis takes the model's weights, or only its shapes."""
    return config.basis.source not in ("random", "sketch", "pool")


def build_basis(config: RunConfig, model: Any, tokenizer: Any, device: torch.device) -> Basis:
    """Build what is frozen and shared, in the dtype in which it is kept and sent: the basis of LoRA-SB and RAVAN, A of FFA-LoRA
    and MiSS, nothing of LoRA, what LoRA-GA takes from W0. A basis from sketches is not built alone (`server/sketching.py`).

    Args:
        config: the run.
        model: the PEFT model of `attach`; on the meta device if `needs_weights` says no.
        tokenizer: only used for `basis.source = "public"`.
        device: where the model is.
    """
    section, method, rank = config.basis, METHODS[config.adapter.method], config.adapter.rank
    frames, shapes = method.frames, shapes_of(model)
    if section.source == "sketch":
        raise BasisError('basis.source = "sketch" is made of what clients send; it cannot be built by one side alone')
    if section.source == "public":
        return basis_of_gradients(config, _public_basis(config, model, tokenizer, device))
    if not frames:
        basis = Basis({}, {}, {})
    elif frames == ("A",):
        made = method.frame
        a = {
            name: made((rank, in_)) if made else start_of_a((rank, in_), seeded(config.seed, name))
            for name, (_, in_) in shapes.items()
        }
        basis = Basis({}, a, {})
    elif section.pool is not None:
        return read_pool(Path(section.pool), shapes, rank, config.head_count)  # fp32, so that an adapter is what it was
    elif method.heads:
        basis = heads_basis(shapes, rank, config.head_count, config.seed)
    elif section.source == "random":
        basis = random_basis(shapes, rank, config.seed)
    else:
        layers = {name: layer.get_base_layer() for name, layer in layers_of(model).items()}
        basis = weights_basis(layers, rank, config.seed)
        if config.adapter.method == "lora-xs":
            basis = lora_xs_basis(basis, layers, config.seed, scale_of(config))
    return basis.to(DTYPES[section.dtype])


def basis_of_gradients(config: RunConfig, leading: Basis) -> Basis:
    """The basis that leading singular vectors of gradients (`gradient_rank` of them) make for the method."""
    if METHODS[config.adapter.method].start is not None:
        return lora_ga_basis(leading, config.adapter.rank, scale_of(config))
    return leading.to(DTYPES[config.basis.dtype])


def gradient_rank(config: RunConfig) -> int:
    """How many leading singular vectors of a gradient the method takes: r, and of LoRA-GA 2·r."""
    return config.adapter.rank * (1 if METHODS[config.adapter.method].start is None else 2)


def sketch_plan(config: RunConfig, model: Any) -> SketchPlan:
    """What a client's sketch consists of; the same on both sides. `model`: the PEFT model of `attach`, on any device."""
    return SketchPlan.of(shapes_of(model), gradient_rank(config), config.seed)


def _public_basis(config: RunConfig, model: Any, tokenizer: Any, device: torch.device) -> Basis:
    section = config.basis
    loss = classification_loss if config.model.kind == "classification" else causal_loss
    transformer = model.get_base_model()
    set_state(model, initial_state(layout_of(model), config.seed))  # the head that training starts from, not a chance one
    return gradient_basis(
        {name: layer.get_base_layer() for name, layer in layers_of(model).items()},
        _public_batches(config, tokenizer, device),
        lambda batch: loss(transformer, batch),
        gradient_rank(config),
        seed=config.seed,
        sign=section.sign,
        r0_scale=section.eta if section.r0 == "paper" else 0.0,
    )


def _public_batches(config: RunConfig, tokenizer: Any, device: torch.device) -> Iterator[Batch]:
    examples, kind = public_examples(config), config.model.kind
    if not examples:
        raise BasisError("[basis.public] has no examples; give it some")
    extractor = load_extractor(locate(config.model.source)) if kind == "speech" else None
    rows = encode(examples, tokenizer, config.data.max_length, config.data.system_prompt, kind, extractor)
    for start in range(0, len(rows), MICROBATCH):
        yield collate(rows[start : start + MICROBATCH], tokenizer.pad_token_id, kind).to(device)
