"""Tensors on disk, as safetensors: written whole or not at all, read as copies."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor

from fedsb.errors import StoreError
from fedsb.store.files import write_file


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors (any device, any strides) as safetensors through `write_file`. Raises DiskError.

    Serialised in memory first, since safetensors' own `save_file` reports a full disk as a SafetensorError and makes
    files with mode 0600.
    """
    write_file(path, to_safetensors(_apart(tensors), dict(metadata or {})))


def tensors_of(data: bytes, path: Path) -> dict[str, Tensor]:
    """The tensors of a small file that was read already; `path` is where it was. Far quicker than `load_tensors` where they are
    many. Raises StoreError if it is torn, or no safetensors file."""
    try:
        return dict(sorted(from_safetensors(data).items()))  # it has no order of its own
    except (SafetensorError, KeyError) as error:  # KeyError: a dtype that torch does not have
        raise StoreError(f"{path}: is no whole safetensors file ({error}); restore it or delete its folder") from error


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
