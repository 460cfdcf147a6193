"""A plain LoRA from a folder that PEFT wrote, and that anybody may have changed: checked before any of it is used."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedsb.errors import AdapterError, StoreError
from fedsb.serving.forms import Factors
from fedsb.store.tensors import tensors_of

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
CONFIG_BYTES, HEADER_BYTES = 1 << 20, 1 << 24
RANK = 512  # at the most
KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
UNCHANGED = (True, False, "gaussian", "eva", "orthogonal")  # ways to begin that leave the base model's weights as they are
READ = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "init_lora_weights"}
OF_TRAINING = {
    "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version", "lora_dropout",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "runtime_config",
    "megatron_config", "megatron_core", "qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
}  # fmt: skip


def read_lora(folder: Path, sides: Mapping[str, tuple[int, int]]) -> Factors:
    """Layer → A (r, in) and B (out, r), the scale in B; fp32.

    `sides`: layer → (out, in) of the model. Raises AdapterError if there is anything in it that is no plain LoRA of this model.
    """
    config = _config(folder / CONFIG_FILE)
    most = HEADER_BYTES + sum(4 * RANK * (out + in_) for out, in_ in sides.values())
    try:
        tensors = tensors_of(_read(folder / WEIGHTS_FILE, most), folder / WEIGHTS_FILE)
    except StoreError as error:
        raise AdapterError(str(error)) from None
    found: Factors = {}
    for name, tensor in tensors.items():
        match = KEY.fullmatch(name)
        if match is None:
            raise AdapterError(f"{folder}: has a tensor {name[:100]!r}, which is no lora_A or lora_B; serve plain LoRA")
        if tensor.dtype not in DTYPES:
            raise AdapterError(f"{folder}: {name[:100]} is {str(tensor.dtype).removeprefix('torch.')}; write it as fp32 or bf16")
        found.setdefault(match[1], {})[match[2]] = tensor.float()
    if not found:
        raise AdapterError(f"{folder}: holds no tensors; train it first")
    for layer, parts in found.items():
        _require(folder, layer, parts, sides.get(layer))
    if not bool(torch.cat([t.flatten() for parts in found.values() for t in parts.values()]).isfinite().all()):
        raise AdapterError(f"{folder}: holds NaN or infinity; train it again")
    scales = {layer: _scale(config, layer, len(parts["A"]), folder) for layer, parts in found.items()}
    return {layer: {"A": parts["A"], "B": scales[layer] * parts["B"]} for layer, parts in found.items()}


def _require(folder: Path, layer: str, parts: dict[str, Tensor], sides: tuple[int, int] | None) -> None:
    if sides is None:
        raise AdapterError(f"{folder}: has a layer {layer[:100]!r} that this model does not have; serve it with its own model")
    if parts.keys() != {"A", "B"}:
        raise AdapterError(f"{folder}: {layer} has no {'B' if 'A' in parts else 'A'}; export it again")
    a, b = tuple(parts["A"].shape), tuple(parts["B"].shape)
    rank = a[0] if a else 0
    if not 0 < rank <= RANK or (a, b) != ((rank, sides[1]), (sides[0], rank)):
        raise AdapterError(
            f"{folder}: {layer} has A {a} and B {b}, and this model takes (r, {sides[1]}) and ({sides[0]}, r) with r up to {RANK}"
        )


def _scale(config: dict[str, Any], layer: str, rank: int, folder: Path) -> float:
    """α/r, or α/√r. A pattern is taken for a layer's name or its end, as PEFT takes one without special characters."""
    if _of(config, "rank_pattern", layer, config["r"]) != rank:
        raise AdapterError(f"{folder}: {layer} is of rank {rank}, and its configuration says another; export it again")
    alpha = _of(config, "alpha_pattern", layer, config["lora_alpha"])
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _of(config: dict[str, Any], patterns: str, layer: str, otherwise: Any) -> Any:
    told = config.get(patterns) or {}
    return next((value for key, value in told.items() if layer == key or layer.endswith(f".{key}")), otherwise)


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(_read(path, CONFIG_BYTES))
    except (ValueError, RecursionError):
        raise AdapterError(f"{path}: is no JSON; export the adapter again") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise AdapterError(f"{path}: is no configuration of a LoRA; only those are served from folders")
    for key, value in config.items():
        empty = value is None or value is False or value == "" or value == [] or value == {}
        if key not in READ | OF_TRAINING and not empty:
            raise AdapterError(f"{path}: uses {key[:100]}, which no batch of several tenants can; serve plain LoRA")
    patterns = {**_table(config, "rank_pattern", path), **_table(config, "alpha_pattern", path)}
    if strange := [key for key in patterns if not re.fullmatch(r"[A-Za-z0-9_.]+", key)]:
        raise AdapterError(f"{path}: has a pattern {strange[0][:100]!r}; name layers, or the ends of their names")
    numbers = {"r": config.get("r"), "lora_alpha": config.get("lora_alpha"), **patterns}
    for key, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number < 1e6:
            raise AdapterError(f"{path}: {key} is no number above 0; export the adapter again")
    if config.get("bias", "none") != "none" or config.get("init_lora_weights", True) not in UNCHANGED:
        raise AdapterError(f"{path}: changes the base model's biases or weights; serve plain LoRA")
    return config


def _table(config: dict[str, Any], key: str, path: Path) -> dict[str, Any]:
    told = config.get(key) or {}
    if not isinstance(told, dict):
        raise AdapterError(f"{path}: {key} is no table; export the adapter again")
    return told


def _read(path: Path, most: int) -> bytes:
    """The bytes of a file. Raises AdapterError if it cannot be read, or is too large to be what it should."""
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise AdapterError(f"{path}: cannot be read ({error.strerror or error}); export the adapter again") from None
    if len(data) > most:
        raise AdapterError(f"{path}: has more than {most} bytes, and is no adapter of this model; export it again")
    return data
