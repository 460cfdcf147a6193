"""A pool of frozen adapters: plain LoRA folders, as PEFT and `fedsb export` write them, stacked as one basis."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from fedsb.basis.frames import Basis
from fedsb.errors import BasisError

Lora = dict[str, tuple[Tensor, Tensor]]  # layer → B (out, r) with α/r in it, A (r, in); fp32
PREFIX, CONFIG, WEIGHTS = "base_model.model.", "adapter_config.json", "adapter_model.safetensors"


def members_of(pool: Path) -> list[Path]:
    """The adapters in a folder, by name. Raises BasisError if there are none."""
    found = sorted(path.parent for path in pool.glob(f"*/{CONFIG}"))
    if not found:
        raise BasisError(
            f"{pool}: holds no folders with {CONFIG}; fill it with `fedsb export RUN --all --out {pool}`, or name another pool"
        )
    return found


def read_lora(folder: Path) -> Lora:
    """A plain LoRA; a head that was trained with it is not taken. Raises BasisError if it is none, or of a kind that is more than
    B·A on the original weights (DoRA, trained biases, PiSSA)."""
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text())
        tensors = load_file(folder / WEIGHTS)
        if config.get("peft_type") == "LORA":
            rank, alpha = int(config["r"]), float(config["lora_alpha"])
            scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    except (OSError, ValueError, TypeError, AttributeError, ArithmeticError, LookupError, SafetensorError) as error:
        raise BasisError(f"{folder}: is no adapter that can be read ({error}); fetch or export it again") from error
    odd = [key for key in ("use_dora", "use_qalora", "lora_bias", "fan_in_fan_out") if config.get(key)]
    odd += [key for key in ("rank_pattern", "alpha_pattern") if config.get(key)]
    if config.get("init_lora_weights", True) not in (True, False, "gaussian"):  # such as pissa, which changes W0 too
        odd.append(f"init_lora_weights = {config['init_lora_weights']}")
    if config.get("peft_type") != "LORA" or odd or config.get("bias", "none") != "none":
        what = f"has {odd[0]}" if odd else f"is of type {config.get('peft_type')} with bias {config.get('bias', 'none')}"
        raise BasisError(f"{folder}: {what}, and a pool takes plain LoRAs; export it with --format lora, or take it out")
    found: Lora = {}
    for name, a in tensors.items():
        if name.endswith(".lora_A.weight"):
            layer = name.removesuffix(".lora_A.weight")
            b = tensors.get(f"{layer}.lora_B.weight")
            if b is None:
                raise BasisError(f"{folder}: {layer} has lora_A without lora_B; fetch or export it again")
            found[layer.removeprefix(PREFIX)] = scale * b.float(), a.float()
    if not found:
        raise BasisError(f"{folder}: holds no lora_A and lora_B; fetch or export it again")
    return found


def pool_basis(members: Sequence[Lora], shapes: Mapping[str, tuple[int, int]], rank: int, names: Sequence[object]) -> Basis:
    """B = [B_1 … B_N] (out, N·r) and A, the A_i one below the other (N·r, in), of every layer, fp32.

    A member of lower rank is filled up with zeros, and so is a layer that a member does not adapt.

    Args:
        members: N adapters.
        shapes: layer → (out, in), of all adapted layers.
        rank: r.
        names: what to call the members.

    Raises BasisError for a member of higher rank, or of another model.
    """
    for member, name in zip(members, names, strict=True):
        for layer, (b, a) in member.items():
            if layer not in shapes:
                raise BasisError(f"{name}: adapts {layer}, which the run does not; add it to adapter.target_modules")
            if (b.shape[0], a.shape[1]) != shapes[layer]:
                raise BasisError(f"{name}: {layer} has another shape than in this model; take the adapter out of the pool")
            if len(a) > rank:
                raise BasisError(f"{name}: has rank {len(a)}, and the run {rank}; set adapter.rank = {len(a)}")
    b_of, a_of = {}, {}
    for layer, (out, in_) in shapes.items():
        nothing = torch.zeros(out, rank), torch.zeros(rank, in_)
        pairs = [member.get(layer, nothing) for member in members]
        b_of[layer] = torch.cat([functional.pad(b, (0, rank - b.shape[1])) for b, _ in pairs], 1)
        a_of[layer] = torch.cat([functional.pad(a, (0, 0, 0, rank - len(a))) for _, a in pairs])
    return Basis(b_of, a_of, {})


def read_pool(pool: Path, shapes: Mapping[str, tuple[int, int]], rank: int, count: int) -> Basis:
    """`pool_basis` of all adapters in a folder. Raises BasisError too if there are not `count`."""
    folders = members_of(pool)
    if len(folders) != count:
        raise BasisError(f"{pool}: holds {len(folders)} adapters, and adapter.heads = {count}; set it to {len(folders)}")
    return pool_basis([read_lora(folder) for folder in folders], shapes, rank, folders)
