"""Folders to carry away: a plain LoRA that an unmodified PEFT (and vLLM) reads, and our own format with the core apart.

Both hold `adapter_config.json`, `adapter_model.safetensors`, `README.md` and `manifest.json`, and replace an older
export whole. The plain LoRA of LoRA-SB puts everything trained on the B side (lora_B = B R, lora_A = A), so that A is the
same for all clients of a run. Scales are in lora_B. Updates that take W0 (Bone's, FLoRA's) are no short products: they are
truncated, and what is lost is said. FLoRA's are also a HiRA, which loses nothing.
"""

import functools
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fedsb.abilities import FUSING, PROMPTING
from fedsb.adapters.coefficients import pack, rows_of
from fedsb.adapters.lopa import NAMES as PROMPT_NAMES
from fedsb.adapters.methods import METHODS
from fedsb.basis.frames import Basis, beside
from fedsb.errors import BasisError, StoreError
from fedsb.store.adapters import StoredAdapter
from fedsb.store.card import card
from fedsb.store.files import read_json, sha256_of, staged_folder, write_file, write_json
from fedsb.store.tensors import save_tensors
from fedsb.store.truncation import truncated

CONFIG_FILE, WEIGHTS_FILE, CARD_FILE, MANIFEST_FILE = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "README.md",
    "manifest.json",
)
PREFIX = "base_model.model."
STACKED = re.compile(r"(.*?)\.(\d+)\.(.+)")  # model.layers . 0 . self_attn.q_proj
HEADS = ("classifier", "score")  # the heads that PEFT and vLLM know by name


def export_lora(
    stored: StoredAdapter,
    basis: Basis,
    out: Path,
    dtype: torch.dtype = torch.float32,
    modules: Collection[str] = (),
    *,
    weights: Mapping[str, Tensor] | None = None,
    rank: int | None = None,
) -> Path:
    """Write a plain LoRA: the last matrix of the method's chain as lora_A (r, in), the product of those before it, in fp64, as
    lora_B (out, r); of LoRA-SB A and B·R. What was folded into the base model's weights is put beside them, so that the folder
    fits the original model: its rank is then r and those of the folds together, and at most the smaller side of the layer. Layers
    of a smaller rank are filled up with zeros. Stored in `dtype`.

    `modules`: see `target_modules`. `rank`: cut to it, where the method can be (`StoredAdapter.cut`). A method that takes W0
    needs `weights` (layer → W0) and is truncated to `rank` (`truncated`); manifest and card say what is lost. Raises BasisError
    (not the adapter's basis or weights), StoreError (`out` is something else, there is no such rank, or the head is not plain)
    and DiskError; then whatever was at `out` is as before.
    """
    stored, basis = _fitted(stored, basis, rank)
    method, scale = METHODS[stored.manifest.method], stored.manifest.scale
    if method.output is not None:
        raise StoreError(f"{stored.manifest.method} changes no weights, and so is no LoRA; use --format core")
    loras: dict[str, tuple[Tensor, Tensor]] = {}
    lost: float | None = None
    if method.takes_weights:
        loras, lost = truncated(stored, weights or {}, rank, dtype)
    else:
        for layer, parts in stored.expanded.items():
            b, a = (side[layer].double() if layer in side else None for side in (basis.B, basis.A))
            assert method.chain is not None
            *before, last = method.chain(parts, b, a, scale)
            folds = [fold[layer] for fold in basis.folds if layer in fold]
            loras[layer] = beside([(functools.reduce(torch.matmul, before), last), *folds])
    most = max(right.shape[0] for _, right in loras.values())
    tensors: dict[str, Tensor] = {}
    for layer, (left, right) in loras.items():
        room = most - right.shape[0]
        tensors[f"{PREFIX}{layer}.lora_A.weight"] = functional.pad(right, (0, 0, 0, room)).to(dtype)
        tensors[f"{PREFIX}{layer}.lora_B.weight"] = functional.pad(left, (0, room)).to(dtype)
    return _write(out, stored, lora_config(stored, modules, most), tensors | _head(stored), lost)


def export_hira(
    stored: StoredAdapter, basis: Basis, out: Path, dtype: torch.dtype = torch.float32, modules: Collection[str] = ()
) -> Path:
    """Write a HiRA that an unmodified PEFT reads, W0∘(1 + B·A): as hira_A (r, in) the last matrix of the method's chain, as
    hira_B (out, r) the product of those before it. Nothing is lost. Raises as `export_lora`, and StoreError for a method that
    adds to W0 instead of multiplying it."""
    stored, basis = _fitted(stored, basis, None)
    method, scale = METHODS[stored.manifest.method], stored.manifest.scale
    if not method.multiplies or method.chain is None:
        raise StoreError(f"{stored.manifest.method} multiplies no weights, and so is no HiRA; use --format lora")
    tensors: dict[str, Tensor] = {}
    for layer, parts in stored.expanded.items():
        *before, last = method.chain(parts, None, None, scale)
        tensors[f"{PREFIX}{layer}.hira_A"] = last.to(dtype)
        tensors[f"{PREFIX}{layer}.hira_B"] = functools.reduce(torch.matmul, before).to(dtype)
    rank = next(tensor.shape[0] for name, tensor in tensors.items() if name.endswith("hira_A"))
    config = _common(stored, modules) | {"peft_type": "HIRA", "r": rank, "hira_dropout": 0.0, "fan_in_fan_out": False}
    return _write(out, stored, config, tensors | _head(stored))


def export_core(
    stored: StoredAdapter, basis: Basis, out: Path, modules: Collection[str] = (), rank: int | None = None, bits: int = 32
) -> Path:
    """Write our own format: core (r, r) fp32, or RAVAN's heads; A (r, in) and B (out, r) in the basis' dtype. Of NOLA
    coefficients alone, in `bits` each (`fedsb.adapters.coefficients`); of LoPA the prompt and its networks.

    Raises as `export_lora`, and StoreError for a method without cores.
    """
    stored, basis = _fitted(stored, basis, rank)
    if METHODS[stored.manifest.method].expand:
        return _write(out, stored, nola_config(stored, modules, bits), packed(stored, bits) | _head(stored))
    if stored.manifest.method in PROMPTING:
        named = {
            f"{PREFIX}{layer}.fedsb_lopa.{PROMPT_NAMES[part]}": tensor
            for layer, parts in stored.layers.items()
            for part, tensor in parts.items()
        }
        return _write(out, stored, lopa_config(stored), named)
    native = METHODS[stored.manifest.method].native
    if native is None:
        other = "hira" if METHODS[stored.manifest.method].multiplies else "lora"
        raise StoreError(f"{stored.manifest.method} has no cores, and so no format of ours; use --format {other}")
    tensors: dict[str, Tensor] = {}
    for layer, parts in stored.layers.items():
        tensors |= {f"{PREFIX}{layer}.fedsb_core.{name}": tensor for name, tensor in native(parts).items()}
        tensors[f"{PREFIX}{layer}.fedsb_A"] = basis.A[layer]
        tensors[f"{PREFIX}{layer}.fedsb_B"] = basis.B[layer]
    config = core_config(stored, modules) | {"basis_fingerprint": basis.fingerprint}  # of a cut basis it is another
    return _write(out, stored, config, tensors | _head(stored))


def lora_config(stored: StoredAdapter, modules: Collection[str], rank: int) -> dict[str, Any]:
    """`adapter_config.json` of the plain LoRA of some rank. lora_alpha = r, so that PEFT scales by 1."""
    return _common(stored, modules) | {
        "alpha_pattern": {},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {},
        "use_dora": False,
        "use_rslora": False,
    }


def packed(stored: StoredAdapter, bits: int) -> dict[str, Tensor]:
    """What a file of NOLA holds besides a head."""
    return {PREFIX + name: tensor for name, tensor in pack(rows_of(stored.layers), bits).items()}


def nola_config(stored: StoredAdapter, modules: Collection[str], bits: int) -> dict[str, Any]:
    """`adapter_config.json` of NOLA's coefficients, whose peft_type an unmodified PEFT refuses."""
    manifest = stored.manifest
    return _common(stored, modules) | {
        "alpha": manifest.scale * manifest.rank,
        "bases": next(iter(next(iter(stored.layers.values())).values())).numel(),
        "bits": bits,
        "peft_type": "FEDSB_NOLA",
        "seed": manifest.seed,
    }


def lopa_config(stored: StoredAdapter) -> dict[str, Any]:
    """`adapter_config.json` of LoPA's prompt, whose peft_type an unmodified PEFT refuses. It names the encoder."""
    ((embedding, parts),) = stored.layers.items()
    hidden, width = parts["U1"].shape
    return _common(stored, ()) | {
        "encoder": "" if stored.manifest.encoder is None else stored.manifest.encoder.name,
        "encoder_width": width,
        "hidden": hidden,
        "peft_type": "FEDSB_LOPA",
        "target_modules": [embedding],
        "tokens": parts["shared"].shape[0],
    }


def core_config(stored: StoredAdapter, modules: Collection[str] = ()) -> dict[str, Any]:
    """`adapter_config.json` of our own format, whose peft_type an unmodified PEFT refuses."""
    heads = {"heads": _width(stored) // stored.manifest.rank} if METHODS[stored.manifest.method].heads else {}
    return _common(stored, modules) | {
        "basis_fingerprint": stored.manifest.basis_fingerprint,
        "method": stored.manifest.method,
        "peft_type": "FEDSB",
        **heads,
        **({"basis": "later", "magnitudes": False} if stored.manifest.method in FUSING else {}),
    }


def _width(stored: StoredAdapter) -> int:
    """The rank of the update, without what is folded into the weights."""
    return max(_widths(stored))


def _widths(stored: StoredAdapter) -> set[int]:
    return {METHODS[stored.manifest.method].width(parts, stored.manifest.rank) for parts in stored.layers.values()}


def _common(stored: StoredAdapter, modules: Collection[str]) -> dict[str, Any]:
    return {
        "base_model_name_or_path": stored.manifest.base_model.name,
        "inference_mode": True,
        "modules_to_save": modules_to_save(stored.head) or None,
        "r": stored.manifest.rank,
        "target_modules": target_modules(stored.layers, modules),
        "task_type": "SEQ_CLS" if stored.head else None if stored.manifest.kind == "speech" else "CAUSAL_LM",
    }


def target_modules(layers: Collection[str], modules: Collection[str] = ()) -> list[str]:
    """Leaf names (`q_proj`) where they stand for exactly the adapted layers, otherwise the layers' full paths; sorted.

    With `modules`, the names of all modules of the base model, that is decided exactly. Without, leaf names are used if
    the layers look like a whole stack (every layer number from 0 on has the same ones, each leaf in one place only); an
    adapter of only the first blocks of a model cannot be told apart then, and PEFT puts a zero LoRA on the others.
    """
    leaves = sorted({layer.rpartition(".")[2] for layer in layers})
    endings = tuple(f".{leaf}" for leaf in leaves)
    if modules:
        exact = {name for name in modules if name in leaves or name.endswith(endings)} == set(layers)
    else:
        exact = _whole_stack(layers)
    return leaves if exact else sorted(layers)


def _whole_stack(layers: Collection[str]) -> bool:
    numbers: dict[tuple[str, str], set[int]] = {}
    for layer in layers:
        match = STACKED.fullmatch(layer)
        if not match:
            return False
        numbers.setdefault((match[1], match[3]), set()).add(int(match[2]))
    leaves = {place.rpartition(".")[2] for _, place in numbers}
    one_stack = len({stack for stack, _ in numbers}) == 1 and len(leaves) == len(numbers)
    depth = max(map(len, numbers.values()), default=0)
    return one_stack and all(found == set(range(depth)) for found in numbers.values())


def modules_to_save(head: Collection[str]) -> list[str]:
    """The modules that PEFT keeps whole, from names of head parameters: `classifier` for `classifier.dense.weight`."""
    paths = {name.rpartition(".")[0] for name in head}
    return sorted({path.partition(".")[0] if path.partition(".")[0] in HEADS else path for path in paths})


def _head(stored: StoredAdapter) -> dict[str, Tensor]:
    return {f"{PREFIX}{name}": tensor for name, tensor in stored.head.items()}


def _fitted(stored: StoredAdapter, basis: Basis, rank: int | None) -> tuple[StoredAdapter, Basis]:
    """An adapter, cut to a rank if one is given, and as much of its run's basis as it stands on."""
    said = stored.manifest.basis_fingerprint
    if said != basis.fingerprint:
        raise BasisError(
            f"the adapter of {stored.manifest.client} was trained on basis {said[:12]}, not {basis.fingerprint[:12]}; "
            "load the basis of its own run"
        )
    if stored.manifest.standardised:
        raise StoreError(
            f"the adapter of {stored.manifest.client} has a head on standardised features, which no other program "
            "knows; export StoredAdapter.plain(features), with those of its base model"
        )
    method = METHODS[stored.manifest.method]
    stored = stored if rank is None or method.takes_weights else stored.cut(rank)
    basis = basis.cut(stored.manifest.rank) if method.nested else basis
    if method.frames and (stored.layers.keys() != basis.A.keys() or _widths(stored) != {basis.rank}):
        raise BasisError(
            f"the adapter of {stored.manifest.client} ({len(stored.layers)} layers, rank {_width(stored)}) lacks "
            f"the layers or the rank of its basis ({len(basis.A)} layers, rank {basis.rank}); publish the adapter anew"
        )
    return stored, basis


def _write(
    out: Path, stored: StoredAdapter, config: Mapping[str, Any], tensors: Mapping[str, Tensor], lost: float | None = None
) -> Path:
    _guard(out)
    truncation = {} if lost is None else {"truncated": {"rank": config["r"], "relative_loss": lost}}
    with staged_folder(out) as staged:
        write_json(staged / CONFIG_FILE, config)
        save_tensors(staged / WEIGHTS_FILE, tensors, {"format": "pt"})
        write_file(staged / CARD_FILE, card(stored, config, lost).encode())
        files = {name: sha256_of(staged / name) for name in (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE)}
        write_json(staged / MANIFEST_FILE, stored.manifest.model_dump(mode="json") | truncation | {"files": files})
    return out


def _guard(out: Path) -> None:
    """Refuse to replace a folder that is not an older export, or to which somebody has added files."""
    if not out.is_dir() or not any(out.iterdir()):
        return
    try:
        files = read_json(out / MANIFEST_FILE).get("files")
    except StoreError:
        files = None
    if not isinstance(files, dict):
        raise StoreError(f"{out}: is not empty and no export (no manifest.json of one); name a new folder")
    strangers = sorted({path.name for path in out.iterdir()} - files.keys() - {MANIFEST_FILE})
    if strangers:
        raise StoreError(f"{out}: holds {strangers[0]}, which no export wrote; move it away or name a new folder")
