"""How a run starts: the basis that its configuration asks for."""

from collections.abc import Iterator
from typing import Any

import torch

from fedsb.adapters.attach import initial_state, layout_of, shapes_of
from fedsb.adapters.lora import start_of_a
from fedsb.adapters.methods import METHODS
from fedsb.adapters.state import layers_of, set_state
from fedsb.basis.frames import DTYPES, Basis
from fedsb.basis.gradient import gradient_basis
from fedsb.basis.sketch import SketchPlan
from fedsb.basis.spectral import heads_basis, random_basis, seeded, weights_basis
from fedsb.config import RunConfig
from fedsb.data.batches import Batch, collate, encode
from fedsb.data.tasks import labels_of, load_task
from fedsb.errors import BasisError
from fedsb.training.loss import causal_loss, classification_loss

MICROBATCH = 4  # examples per backward pass of the estimate: half a training step's activations or fewer


def can_rebuild(config: RunConfig) -> bool:
    """Whether a client can build the basis by itself, so that it need not be sent."""
    return config.basis.source in ("random", "weights")


def basis_source(config: RunConfig) -> str:
    """Where the basis comes from, for people: `none` if the method has no frames, `seed` if A alone follows from the seed."""
    frames = METHODS[config.adapter.method].frames
    return config.basis.source if set(frames) == {"B", "A"} else "seed" if frames else "none"


def needs_weights(config: RunConfig) -> bool:
    """Whether building the basis takes the model's weights, or only its shapes."""
    return config.basis.source not in ("random", "sketch")


def build_basis(config: RunConfig, model: Any, tokenizer: Any, device: torch.device) -> Basis:
    """Build what is frozen and shared, in the dtype in which it is kept and sent: the basis of LoRA-SB and RAVAN, A of FFA-LoRA,
    nothing of LoRA. A basis from sketches is not built alone (`server/sketching.py`).

    Args:
        config: the run.
        model: the PEFT model of `attach`; on the meta device if `needs_weights` says no.
        tokenizer: only used for `basis.source = "public"`.
        device: where the model is.
    """
    section, adapter, method = config.basis, config.adapter, METHODS[config.adapter.method]
    frames = method.frames
    if not frames:
        basis = Basis({}, {}, {})
    elif frames == ("A",):
        a = {name: start_of_a((adapter.rank, in_), seeded(config.seed, name)) for name, (_, in_) in shapes_of(model).items()}
        basis = Basis({}, a, {})
    elif method.heads:
        basis = heads_basis(shapes_of(model), adapter.rank, adapter.head_count, config.seed)
    elif section.source == "random":
        basis = random_basis(shapes_of(model), adapter.rank, config.seed)
    elif section.source == "weights":
        layers = {name: layer.get_base_layer() for name, layer in layers_of(model).items()}
        basis = weights_basis(layers, adapter.rank, config.seed)
    elif section.source == "sketch":
        raise BasisError('basis.source = "sketch" is made of what clients send; it cannot be built by one side alone')
    else:
        basis = _public_basis(config, model, tokenizer, device)
    return basis.to(DTYPES[section.dtype])


def sketch_plan(config: RunConfig, model: Any) -> SketchPlan:
    """What a client's sketch consists of; the same on both sides. `model`: the PEFT model of `attach`, on any device."""
    return SketchPlan.of(shapes_of(model), config.adapter.rank, config.seed)


def _public_basis(config: RunConfig, model: Any, tokenizer: Any, device: torch.device) -> Basis:
    section = config.basis
    loss = classification_loss if config.model.kind == "classification" else causal_loss
    transformer = model.get_base_model()
    set_state(model, initial_state(layout_of(model), config.seed))  # the head that training starts from, not a chance one
    return gradient_basis(
        {name: layer.get_base_layer() for name, layer in layers_of(model).items()},
        _public_batches(config, tokenizer, device),
        lambda batch: loss(transformer, batch),
        config.adapter.rank,
        seed=config.seed,
        sign=section.sign,
        r0_scale=section.eta if section.r0 == "paper" else 0.0,
    )


def _public_batches(config: RunConfig, tokenizer: Any, device: torch.device) -> Iterator[Batch]:
    task, kind = config.basis.public, config.model.kind
    assert task is not None  # RunConfig checks it
    wanted = min(config.basis.examples, task.train or config.basis.examples)
    sample = task.model_copy(update={"train": wanted})  # drawn, since files are often sorted
    examples = load_task(sample, "train", config.seed, labels_of(config))
    if not examples:
        raise BasisError("[basis.public] has no examples; give it some")
    rows = encode(examples, tokenizer, config.data.max_length, config.data.system_prompt, kind)
    for start in range(0, len(rows), MICROBATCH):
        yield collate(rows[start : start + MICROBATCH], tokenizer.pad_token_id, kind).to(device)
