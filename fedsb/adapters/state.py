"""What a client trains and sends: named fp32 tensors in one canonical order, and the flat vector that travels.

A name is `<layer>.<part>`, with the layer's path in the base model and a part of the method (`Method.parts`): `….q_proj.core`,
`….q_proj.A`; or `head.<path>` for a trained head. RAVAN trains heads and scales apart and sends their products.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.miss.layer import MissLinear
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from fedsb.adapters.lopa import LopaEmbedding
from fedsb.adapters.own_layer import OwnLinear
from fedsb.adapters.ravan import HEADS, SCALES
from fedsb.errors import AdapterError

State = dict[str, Tensor]
CORE = ".core"
HEAD = "head."


def layers_of(model: nn.Module) -> dict[str, Any]:
    """Layer name (its path in the base model) → adapted layer (ours, or PEFT's LoRA or MiSS), in the model's order; of LoPA the
    input embedding."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, OwnLinear | LopaEmbedding | LoraLinear | MissLinear)
    }


def parameters_of(model: nn.Module, adapter: str = "default") -> dict[str, nn.Parameter]:
    """Name → trained parameter, in the model's order; what is frozen (A of FFA-LoRA) is not among them."""
    found: dict[str, nn.Parameter] = {}
    for path, module in model.named_modules():
        path = path.removeprefix("base_model.model.")
        if isinstance(module, OwnLinear | LopaEmbedding):
            found |= {f"{path}.{part}": parameter for part, parameter in module.trained(adapter).items()}
        elif isinstance(module, LoraLinear) and adapter in module.lora_A:
            factors: dict[str, Any] = {"A": module.lora_A[adapter].weight, "B": module.lora_B[adapter].weight}
            found |= {f"{path}.{part}": factor for part, factor in factors.items() if factor.requires_grad}
        elif isinstance(module, MissLinear) and adapter in module.miss_block:
            found[path + ".D"] = module.miss_block[adapter]
        elif isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save:
            for name, parameter in module.modules_to_save[adapter].named_parameters():
                found[f"{HEAD}{path}.{name}"] = parameter
    return found


def frozen_of(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """Name → tensor of the state that is not trained."""
    own = {name: layer for name, layer in layers_of(model).items() if isinstance(layer, OwnLinear)}
    return {f"{path}.{part}": tensor for path, layer in own.items() for part, tensor in layer.frozen(adapter).items()}


def told_of(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """Name → tensor of the state, in the model's order: what is trained, but of RAVAN the products of heads and scales; and of
    GaLore what it is projected with."""
    found: dict[str, Tensor] = {name: p.detach() for name, p in parameters_of(model, adapter).items()}
    found |= frozen_of(model, adapter)
    for name in [name for name in found if name.endswith(SCALES) and not name.startswith(HEAD)]:
        heads = name.removesuffix(SCALES) + HEADS
        found[heads] = found.pop(name)[:, None, None] * found[heads]
    return found


def get_state(model: nn.Module, adapter: str = "default") -> State:
    """A copy of what is told, fp32 on the CPU."""
    return {name: t.to("cpu", torch.float32, copy=True).contiguous() for name, t in told_of(model, adapter).items()}


def set_state(model: nn.Module, state: Mapping[str, Tensor], adapter: str = "default") -> None:
    """Put tensors in place. Raises AdapterError if names or shapes are not the model's, before anything is changed."""
    told = told_of(model, adapter)
    if told.keys() != state.keys():
        odd = sorted(told.keys() ^ state.keys())[0]
        raise AdapterError(f"{odd} is in only one of model and adapter; use an adapter that was trained on this model")
    for name, tensor in told.items():
        if tensor.shape != state[name].shape:
            raise AdapterError(
                f"{name} has shape {tuple(state[name].shape)} where the model has {tuple(tensor.shape)}; "
                "use an adapter of the same rank and model"
            )
    with torch.no_grad():
        for name, parameter in parameters_of(model, adapter).items():
            parameter.copy_(state[name] if name in state else torch.ones_like(parameter))  # scales are in the heads already
        for name, tensor in frozen_of(model, adapter).items():
            tensor.copy_(state[name])


@dataclass(frozen=True)
class Layout:
    """Names and shapes of a state, in order; both sides of a federation hold the same one, proved by its fingerprint."""

    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> "Layout":
        """The layout of a state."""
        return cls(tuple((name, tuple(t.shape)) for name, t in state.items()))

    @property
    def size(self) -> int:
        """How many numbers a state has."""
        return sum(math.prod(shape) for _, shape in self.shapes)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over names and shapes."""
        return hashlib.sha256(json.dumps(self.shapes).encode()).hexdigest()

    def flatten(self, state: Mapping[str, Tensor]) -> Tensor:
        """A state → one fp32 vector (size,)."""
        return torch.cat([state[name].reshape(-1) for name, _ in self.shapes])

    def unflatten(self, flat: Tensor) -> State:
        """One vector (size,) → a state of views into it. Raises AdapterError on another size."""
        if flat.ndim != 1 or flat.numel() != self.size:
            raise AdapterError(f"a state of {self.size} numbers was expected and {tuple(flat.shape)} came; update both sides")
        parts = flat.split([math.prod(shape) for _, shape in self.shapes])
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes, parts, strict=True)}
