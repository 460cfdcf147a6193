"""Putting the adapter that a configuration asks for onto a base model."""

import warnings
from typing import Any

import torch
from peft import TaskType, get_peft_model
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from fedsb.adapters.lora_sb import LoraSbConfig
from fedsb.adapters.state import HEAD, Layout, State, parameters_of
from fedsb.adapters.tuner import adapted_layers
from fedsb.basis.spectral import seeded
from fedsb.config import RunConfig
from fedsb.errors import AdapterError

HEAD_SPREAD = 0.02  # standard deviation of a new head's weights, as transformers initialises them


def attach(model: Any, config: RunConfig) -> Any:
    """The PEFT model with zero frames and zero cores; `set_basis` comes next. Works on the meta device too.

    Raises AdapterError if no layer matches, BasisError if the rank does not fit one.
    """
    adapter = config.adapter
    targets = adapter.target_modules if isinstance(adapter.target_modules, str) else list(adapter.target_modules)
    task = TaskType.SEQ_CLS if config.model.kind == "classification" else TaskType.CAUSAL_LM
    peft_config = LoraSbConfig(
        r=adapter.rank,
        target_modules=targets,
        basis="later",
        basis_dtype=config.basis.dtype,
        seed=config.seed,
        task_type=task,
    )
    try:
        with warnings.catch_warnings():  # PEFT 0.21 asks transformers 5.23 in a way that is deprecated
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            peft_model = get_peft_model(model, peft_config)
    except ValueError as error:
        names = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise AdapterError(
            f"adapter.target_modules = {targets} matches no layer of {config.model.source}; "
            f"its linear layers are {', '.join(names)}"
        ) from error
    adapted = [f".{name}" for name in adapted_layers(peft_model)]
    missed = [t for t in targets if not any(name.endswith(f".{t}") for name in adapted)] if isinstance(targets, list) else []
    if missed:
        raise AdapterError(
            f"adapter.target_modules: {', '.join(missed)} matches no linear layer of {config.model.source}; leave it out"
        )
    _keep_heads_in_fp32(peft_model)
    peft_model.eval()
    return peft_model


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
    return {name: (layer.out_features, layer.in_features) for name, layer in adapted_layers(model).items()}


def layout_of(model: nn.Module) -> Layout:
    """The layout of the model's state."""
    return Layout(tuple((name, tuple(p.shape)) for name, p in parameters_of(model).items()))


def initial_state(layout: Layout, seed: int) -> State:
    """The base model as a state: zero cores, and the seeded head that everybody starts from."""
    state = {}
    for name, shape in layout.shapes:
        fresh = name.startswith(HEAD) and len(shape) > 1
        state[name] = torch.randn(shape, generator=seeded(seed, name)) * HEAD_SPREAD if fresh else torch.zeros(shape)
    return state
