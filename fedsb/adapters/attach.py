"""Putting the adapter that a configuration asks for onto a base model."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from peft import TaskType, get_peft_model
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from fedsb.abilities import FUSING
from fedsb.adapters.head import Features, features_of, linear_head, standardise
from fedsb.adapters.lora import start_of_a
from fedsb.adapters.methods import METHODS
from fedsb.adapters.state import CORE, HEAD, Layout, State, layers_of, told_of
from fedsb.adapters.tuner import set_basis
from fedsb.basis.frames import Basis
from fedsb.basis.spectral import check_rank, seeded
from fedsb.config import RunConfig
from fedsb.errors import AdapterError, BasisError
from fedsb.sections import ModelSection

DRAWS = {"A": start_of_a} | {part: draw for method in METHODS.values() for part, draw in method.draws.items()}
HEAD_SPREAD = 0.02  # standard deviation of a new head's weights, as transformers initialises them
STANDARDISED_SPREAD = 1e-3  # of one on standardised features, which are long: so that its first logits are next to nothing


def attach(model: Any, config: RunConfig, tokenizer: Any = None) -> Any:
    """The PEFT model before it has a basis (`give_basis`) and a state. Works on the meta device too.

    `tokenizer`: without it nothing can be computed with a classification head, whose features are standardised
    (`fedsb/adapters/head.py`).
    Raises AdapterError if no layer matches, BasisError if the rank does not fit one.
    """
    adapter, method = config.adapter, METHODS[config.adapter.method]
    targets = adapter.target_modules if isinstance(adapter.target_modules, str) else list(adapter.target_modules)
    task = {"classification": TaskType.SEQ_CLS, "causal": TaskType.CAUSAL_LM, "speech": None}[config.model.kind]
    told: dict[str, Any] = {"target_modules": targets, "task_type": task}
    if set(method.frames) == {"B", "A"}:
        told |= {"basis_dtype": config.basis.dtype, "seed": config.seed}
    if method.heads:
        told["heads"] = config.head_count
    if method.settings:
        told |= method.settings(config)
    peft_config = method.config(adapter.rank, scale_of(config) * adapter.rank, told)
    features = features_of(model, tokenizer) if tokenizer is not None and task == TaskType.SEQ_CLS else None
    linear = {name: (m.out_features, m.in_features) for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    try:
        with (
            torch.random.fork_rng(devices=[]),
            warnings.catch_warnings(),
        ):  # PEFT 0.21 asks transformers 5.23 in a way that is deprecated
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            peft_model: Any = get_peft_model(model, peft_config)
    except ValueError as error:
        hit = [name for name in linear if targets == "all-linear" or any(f".{name}".endswith(f".{t}") for t in targets)]
        narrow = {name: linear[name] for name in hit if linear[name][1] < adapter.rank}
        if narrow:  # PEFT's MiSS looks at the rank itself, and names no layer
            check_rank(narrow, adapter.rank)
        names = sorted({name.rpartition(".")[2] for name in linear})
        raise AdapterError(
            f"adapter.target_modules = {targets} matches no layer of {config.model.source}; "
            f"its linear layers are {', '.join(names)}"
        ) from error
    layers = layers_of(peft_model)
    if adapter.method not in FUSING:  # a pool's frames are not orthonormal, so they need no room
        check_rank(shapes_of(peft_model), adapter.rank)
    smallest = min(min(shape) for shape in shapes_of(peft_model).values())
    if method.start is not None and 2 * adapter.rank > smallest:
        raise BasisError(
            f"adapter.method = {adapter.method} takes 2 · adapter.rank = {2 * adapter.rank} directions of each layer's gradient, "
            f"and the smallest has {smallest}; lower the rank to {smallest // 2}"
        )
    adapted = [f".{name}" for name in layers]
    missed = [t for t in targets if not any(name.endswith(f".{t}") for name in adapted)] if isinstance(targets, list) else []
    if missed:
        raise AdapterError(
            f"adapter.target_modules: {', '.join(missed)} matches no linear layer of {config.model.source}; leave it out"
        )
    if method.frames == ("A",) and method.frame is None:
        for layer in layers.values():
            layer.lora_A["default"].requires_grad_(False)
    _prepare_heads(peft_model, features)
    peft_model.standardised_by = features  # for whoever wants the head as the base model's own (`StoredAdapter.plain`)
    peft_model.eval()
    return peft_model


def scale_of(config: RunConfig) -> float:
    """α/r, or α/√r where the method says so, by which LoRA's updates are scaled; α = r unless `adapter.alpha` is set."""
    rank = config.adapter.rank
    return (config.adapter.alpha or rank) / (rank**0.5 if METHODS[config.adapter.method].rslora else rank)


def model_section(config: RunConfig) -> ModelSection:
    """How to load the base model: in fp32 where something is added to its weights, which bf16 would round away."""
    folds = METHODS[config.adapter.method].folds
    return config.model.model_copy(update={"dtype": "fp32"}) if folds else config.model


def give_basis(model: nn.Module, basis: Basis, config: RunConfig) -> None:
    """Put what is frozen and shared in place: B and A of LoRA-SB and RAVAN, A of FFA-LoRA; nothing of LoRA, nor of MiSS, whose
    layer has A built in. What is folded into the weights is not put there (`fold_into`).

    Raises BasisError if it was not made for this method and these layers, before anything is changed.
    """
    layers, method = layers_of(model), METHODS[config.adapter.method]
    wrong = {side for side, part in (("B", basis.B), ("A", basis.A)) if part} != set(method.frames)
    wrong |= method.fold is None and len(basis.folds) != (method.start is not None)
    if wrong or (method.frame and not all(torch.equal(a.float(), method.frame((*a.shape,))) for a in basis.A.values())):
        raise BasisError(f"this basis was not made for adapter.method = {config.adapter.method}; use the one of its own run")
    shapes = shapes_of(model)
    if any((u.shape[0], v.shape[1]) != shapes.get(name) for fold in basis.folds for name, (u, v) in fold.items()):
        raise BasisError("what this basis adds to the weights is for other layers; use the one that was built for this model")
    if basis.B:
        set_basis(model, basis)
        return
    if basis.A and {name: tuple(a.shape) for name, a in basis.A.items()} != {
        name: (config.adapter.rank, layer.in_features) for name, layer in layers.items()
    }:
        raise BasisError("this basis was made for other layers or another rank; use the one that was built for this model")
    with torch.no_grad():
        for name, a in ({} if method.frame else basis.A).items():
            layers[name].lora_A["default"].weight.copy_(a)


def _prepare_heads(model: nn.Module, features: Features | None) -> None:
    """A trained head is an fp32 master like the cores: small steps would vanish in bf16. It sees standardised features."""

    def widen(head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs)

    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            for head in module.modules_to_save.values():
                head.float().register_forward_pre_hook(widen)
                if features:
                    standardise(head, features)


def shapes_of(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Layer name → (out, in) of every adapted layer."""
    return {name: (layer.out_features, layer.in_features) for name, layer in layers_of(model).items()}


def layout_of(model: nn.Module) -> Layout:
    """The layout of the model's state."""
    return Layout(tuple((name, tuple(t.shape)) for name, t in told_of(model).items()))


def start_state(layout: Layout, basis: Basis, config: RunConfig) -> State:
    """The state before the first round: the base model's, but for what a basis says of it: R0, or LoRA-GA's A and B."""
    state = initial_state(layout, config.seed) | {name + CORE: r0 for name, r0 in basis.R0.items()}
    method, scale = METHODS[config.adapter.method], scale_of(config)
    for name, shape in layout.shapes:
        if begin := method.begins.get(name.rpartition(".")[2]):
            state[name] = begin(shape, seeded(config.seed, name))
    for name, parts in method.start(basis, scale).items() if method.start else ():
        state |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    return state


def restarted(layout: Layout, seed: int, server_round: int, state: Mapping[str, Tensor]) -> State:
    """A state whose adapters start anew after a round, with A of its own, while heads go on."""
    fresh = initial_state(layout, seed, f"round {server_round}")
    return fresh | {name: tensor for name, tensor in state.items() if name.startswith(HEAD)}


def initial_state(layout: Layout, seed: int, *role: str) -> State:
    """The base model as a state, from which everybody starts: zero, but `DRAWS` and the head's weights, from the seed."""
    state = {}
    linear = linear_head(name for name, _ in layout.shapes)
    for name, shape in layout.shapes:
        if name.startswith(HEAD) and len(shape) > 1:
            state[name] = torch.randn(shape, generator=seeded(seed, name)) * (STANDARDISED_SPREAD if linear else HEAD_SPREAD)
        elif (draw := DRAWS.get(name.rpartition(".")[2])) and not name.startswith(HEAD):
            state[name] = draw(shape, seeded(seed, name, *role))
        else:
            state[name] = torch.zeros(shape)
    return state
