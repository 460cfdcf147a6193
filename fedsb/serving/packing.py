"""Writing packs (`fedsb.serving.pack`)."""

import contextlib
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedsb.errors import AdapterError, StoreError
from fedsb.serving.forms import Kind
from fedsb.serving.pack import Index, KindEntry, TenantEntry, digest_of
from fedsb.serving.sources import Source
from fedsb.store.files import FILE_MODE, sync_folder, writing

NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.uint8: "U8"}


def write_pack(
    path: Path,
    sources: Sequence[Source],
    model: tuple[str, str],
    dtype: torch.dtype = torch.float32,
    told: Callable[[Iterable[str]], Iterable[str]] = lambda names: names,
) -> Index:
    """Put the newest adapter of each tenant into a pack, whole or not at all; of a name that several sources have the first's.

    Rows go to disk as they are read, so memory does not grow with their number.

    Args:
        model: the base model's SHA-256 and setting.
        dtype: of the rows, fp32 or bf16.
        told: shows how far it is.

    Raises AdapterError, BasisError or StoreError for an adapter that cannot be used, and if there is none; DiskError.
    """
    kinds: dict[object, tuple[int, Kind]] = {}
    tenants: dict[str, TenantEntry] = {}
    first = {name: source for source in reversed(sources) for name in source.names()}
    if not first:
        raise StoreError("there are no adapters to pack; name a store with some")
    with writing(path), tempfile.TemporaryDirectory(dir=path.parent, prefix=".pack-") as folder:
        rows: list[Any] = []
        with contextlib.ExitStack() as opened:
            for name in told(sorted(first)):
                version = first[name].version(name)
                formed = first[name].load(name, version)
                number, _ = kinds.setdefault(formed.kind.key, (len(kinds), formed.kind))
                if number == len(rows):
                    rows.append(opened.enter_context(Path(folder, str(number)).open("wb")))
                row = formed.numbers.to(dtype)
                if not bool(row.isfinite().all()):
                    raise AdapterError(f"the adapter of {name} holds numbers that {str(dtype)[6:]} cannot; pack it in fp32")
                index = rows[number].tell() // (row.numel() * row.element_size())
                rows[number].write(_bytes(row))
                tenants[name] = TenantEntry(kind=number, row=index, version=version, sha256=digest_of(row))
        of = [kind for _, kind in kinds.values()]
        entries = [
            KindEntry(
                form=k.form, basis=k.basis, shapes=[(n, p, [*s]) for n, parts in k.shapes.items() for p, s in parts.items()]
            )
            for k in of
        ]
        found = Index(model=model[0], model_name=model[1], kinds=entries, tenants=tenants)
        staged = Path(folder, "pack")
        _assemble(staged, found, of, [Path(folder, str(number)) for number in range(len(of))], dtype)
        staged.chmod(FILE_MODE)
        os.replace(staged, path)
        sync_folder(path.parent)
    return found


def _assemble(path: Path, index: Index, kinds: Sequence[Kind], rows: Sequence[Path], dtype: torch.dtype) -> None:
    """Write a safetensors file without holding its rows in memory: length of the header, header, tensors one after another."""
    header: dict[str, Any] = {"__metadata__": {"format": index.format}}
    parts: list[Path | bytes] = []
    end = 0

    def add(name: str, kind: torch.dtype, shape: Sequence[int], part: Path | bytes) -> None:
        nonlocal end
        size = part.stat().st_size if isinstance(part, Path) else len(part)
        header[name] = {"dtype": NAMES[kind], "shape": list(shape), "data_offsets": [end, end + size]}
        parts.append(part)
        end += size

    for number, (kind, file) in enumerate(zip(kinds, rows, strict=True)):
        add(f"numbers.{number}", dtype, (file.stat().st_size // (kind.size * dtype.itemsize), kind.size), file)
        for layer, shared in kind.shared.items():
            for side, tensor in (("B", shared.B), ("A", shared.A)):
                add(f"basis.{number}.{side}.{layer}", tensor.dtype, tensor.shape, _bytes(tensor))
    told = index.model_dump_json().encode()
    add("index", torch.uint8, (len(told),), told)
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(head)) + head)
        for part in parts:
            if isinstance(part, bytes):
                out.write(part)
            else:
                with part.open("rb") as source:
                    shutil.copyfileobj(source, out, 1 << 20)
        out.flush()
        os.fsync(out.fileno())


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
