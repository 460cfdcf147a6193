"""Putting the adapter that a configuration asks for onto a base model."""

import warnings
from typing import Any

import torch
from peft import TaskType, get_peft_model
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from fedsb.adapters.lora import start_of_a
from fedsb.adapters.methods import METHODS
from fedsb.adapters.state import HEAD, Layout, State, layers_of, told_of
from fedsb.adapters.tuner import set_basis
from fedsb.basis.frames import Basis
from fedsb.basis.spectral import check_rank, seeded
from fedsb.config import RunConfig
from fedsb.errors import AdapterError, BasisError

HEAD_SPREAD = 0.02  # standard deviation of a new head's weights, as transformers initialises them


def attach(model: Any, config: RunConfig) -> Any:
    """The PEFT model before it has a basis (`give_basis`) and a state. Works on the meta device too.

    Raises AdapterError if no layer matches, BasisError if the rank does not fit one.
    """
    adapter, method = config.adapter, METHODS[config.adapter.method]
    targets = adapter.target_modules if isinstance(adapter.target_modules, str) else list(adapter.target_modules)
    task = TaskType.SEQ_CLS if config.model.kind == "classification" else TaskType.CAUSAL_LM
    told: dict[str, Any] = {"target_modules": targets, "task_type": task}
    if set(method.frames) == {"B", "A"}:
        told |= {"basis_dtype": config.basis.dtype, "seed": config.seed}
    if method.heads:
        told["heads"] = adapter.head_count
    peft_config = method.config(adapter.rank, scale_of(config) * adapter.rank, told)
    try:
        with (
            torch.random.fork_rng(devices=[]),
            warnings.catch_warnings(),
        ):  # PEFT 0.21 asks transformers 5.23 in a way that is deprecated
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            peft_model = get_peft_model(model, peft_config)
    except ValueError as error:
        names = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise AdapterError(
            f"adapter.target_modules = {targets} matches no layer of {config.model.source}; "
            f"its linear layers are {', '.join(names)}"
        ) from error
    layers = layers_of(peft_model)
    check_rank(shapes_of(peft_model), adapter.rank)
    adapted = [f".{name}" for name in layers]
    missed = [t for t in targets if not any(name.endswith(f".{t}") for name in adapted)] if isinstance(targets, list) else []
    if missed:
        raise AdapterError(
            f"adapter.target_modules: {', '.join(missed)} matches no linear layer of {config.model.source}; leave it out"
        )
    if method.frames == ("A",):
        for layer in layers.values():
            layer.lora_A["default"].requires_grad_(False)
    _keep_heads_in_fp32(peft_model)
    peft_model.eval()
    return peft_model


def scale_of(config: RunConfig) -> float:
    """α / r: what an update of the LoRA family is scaled by. 1 unless `adapter.alpha` is set."""
    return (config.adapter.alpha or config.adapter.rank) / config.adapter.rank


def give_basis(model: nn.Module, basis: Basis, config: RunConfig) -> None:
    """Put what is frozen and shared in place: B and A of LoRA-SB and RAVAN, A of FFA-LoRA, nothing of LoRA.

    Raises BasisError if it was not made for this method and these layers, before anything is changed.
    """
    layers, frames = layers_of(model), METHODS[config.adapter.method].frames
    if {side for side, part in (("B", basis.B), ("A", basis.A)) if part} != set(frames):
        raise BasisError(f"this basis was not made for adapter.method = {config.adapter.method}; use the one of its own run")
    if basis.B:
        set_basis(model, basis)
        return
    if basis.A and {name: tuple(a.shape) for name, a in basis.A.items()} != {
        name: tuple(layer.lora_A["default"].weight.shape) for name, layer in layers.items()
    }:
        raise BasisError("this basis was made for other layers or another rank; use the one that was built for this model")
    with torch.no_grad():
        for name, a in basis.A.items():
            layers[name].lora_A["default"].weight.copy_(a)


def _keep_heads_in_fp32(model: nn.Module) -> None:
    """A trained head is an fp32 master like the cores: small steps would vanish in bf16."""

    def widen(head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs)

    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            for head in module.modules_to_save.values():
                head.float().register_forward_pre_hook(widen)


def shapes_of(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Layer name → (out, in) of every adapted layer."""
    return {name: (layer.out_features, layer.in_features) for name, layer in layers_of(model).items()}


def layout_of(model: nn.Module) -> Layout:
    """The layout of the model's state."""
    return Layout(tuple((name, tuple(t.shape)) for name, t in told_of(model).items()))


def initial_state(layout: Layout, seed: int) -> State:
    """The base model as a state, from which everybody starts: cores and B zero, A and the head's weights from the seed."""
    state = {}
    for name, shape in layout.shapes:
        if name.startswith(HEAD) and len(shape) > 1:
            state[name] = torch.randn(shape, generator=seeded(seed, name)) * HEAD_SPREAD
        elif name.endswith(".A") and not name.startswith(HEAD):
            state[name] = start_of_a(shape, seeded(seed, name))
        else:
            state[name] = torch.zeros(shape)
    return state
