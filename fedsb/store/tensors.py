"""Tensors on disk, as safetensors: written whole or not at all, read as copies."""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor

from fedsb.errors import StoreError
from fedsb.store.files import write_file

SMALL = 2**22  # bytes of a file whose header is kept at hand


@dataclass(frozen=True)
class _Layout:
    """Where tensors of one dtype lie in a file, in its order; names: sorted."""

    dtype: torch.dtype
    names: tuple[str, ...]
    order: tuple[int, ...]  # of the names: where each is in the file
    sizes: tuple[int, ...]
    shapes: tuple[torch.Size, ...]

    def tensors(self, data: bytearray) -> dict[str, Tensor]:
        """What is in such a file, all in one memory."""
        parts = torch.frombuffer(data, dtype=self.dtype).split(self.sizes)
        return {name: parts[i].view(shape) for name, i, shape in zip(self.names, self.order, self.shapes, strict=True)}


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors (any device, any strides) as safetensors through `write_file`. Raises DiskError.

    Serialised in memory first, since safetensors' own `save_file` reports a full disk as a SafetensorError and makes
    files with mode 0600.
    """
    write_file(path, to_safetensors(_apart(tensors), dict(metadata or {})))


def tensors_of(data: bytes, path: Path) -> dict[str, Tensor]:
    """The tensors of a small file that was read already; `path` is where it was. Far quicker than `load_tensors` where they are
    many, and quicker still where a file with the same header was read before: adapters of a store are mostly alike.
    Raises StoreError if it is torn, or no safetensors file."""
    begin = 8 + int.from_bytes(data[:8], "little")
    try:
        layout = _layout(data[:begin], len(data)) if begin < len(data) <= SMALL else None
        if layout is not None:
            return layout.tensors(bytearray(memoryview(data)[begin:]))
        return dict(sorted(from_safetensors(data).items()))  # it has no order of its own
    except (SafetensorError, KeyError) as error:  # KeyError: a dtype that torch does not have
        raise StoreError(f"{path}: is no whole safetensors file ({error}); restore it or delete its folder") from error


@functools.lru_cache(maxsize=16)
def _layout(head: bytes, size: int) -> _Layout | None:
    """What the header of a file of so many bytes says; None unless all is of one dtype. Raises as safetensors does."""
    found = from_safetensors(head + bytes(size - len(head)))  # it looks at everything but the numbers
    entries = {name: entry for name, entry in json.loads(head[8:]).items() if name != "__metadata__"}
    dtype = next((tensor.dtype for tensor in found.values()), None)
    if dtype is None or any(tensor.dtype != dtype for tensor in found.values()) or entries.keys() != found.keys():
        return None
    in_file = sorted(found, key=lambda name: entries[name]["data_offsets"])
    at, names = {name: i for i, name in enumerate(in_file)}, tuple(sorted(found))
    return _Layout(
        dtype,
        names,
        tuple(at[name] for name in names),
        tuple(found[name].numel() for name in in_file),
        tuple(found[name].shape for name in names),
    )


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file and its metadata.

    The tensors are copies: those of safetensors keep the file mapped, and a process may have only 65,530 mappings.
    Raises StoreError if the file is missing, torn, or no safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name).clone() for name in list(file.keys())}, dict(file.metadata() or {})
    except FileNotFoundError:
        raise StoreError(f"{path}: there is no such file; check the folder's name") from None
    except (SafetensorError, OSError) as error:
        raise StoreError(f"{path}: is no whole safetensors file ({error}); restore it or delete its folder") from error


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors, none of which shares memory with another (safetensors refuses those that do)."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        address = plain.untyped_storage().data_ptr()
        apart[name] = plain.clone() if address in seen else plain
        seen.add(address)
    return apart
