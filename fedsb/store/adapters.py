"""The adapter store: published personal adapters, versioned, each with a manifest.

    <store>/<client>/v0001/core.safetensors   the client's state
    <store>/<client>/v0001/manifest.json      `Manifest`
    <store>/<client>/current                  {"version": 1}, replaced atomically

A version is written aside, renamed into place before `current` names it, and never changed afterwards, so a reader sees
a whole version or none. Publishers of one client take turns through a file lock.
"""

import contextlib
import fcntl
import functools
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from fedsb.adapters.head import Features, plain
from fedsb.adapters.method import Parts
from fedsb.adapters.methods import METHODS
from fedsb.errors import AdapterError, StoreError
from fedsb.sections import SITE_NAME
from fedsb.store.files import read_file, read_json, sha256_of, staged_folder, write_file, write_json, writing
from fedsb.store.tensors import save_tensors, tensors_of

CORE_FILE, MANIFEST_FILE, CURRENT_FILE, LOCK_FILE = "core.safetensors", "manifest.json", "current", ".lock"
VERSION = re.compile(r"v(\d{4,})")
HEAD = re.compile(r"head\.(.+)\.(weight|bias)")  # `head.<module path>.weight`


class ModelId(BaseModel):
    """A base model: its name (hub id, folder or short name) and SHA-256."""

    model_config = ConfigDict(frozen=True, strict=True)

    name: str
    sha256: str


class Manifest(BaseModel):
    """What a published adapter is. Unknown keys, which a later version may write, are passed over."""

    model_config = ConfigDict(frozen=True, strict=True)

    client: str
    version: int
    base_model: ModelId
    method: str
    rank: int
    scale: float = 1.0
    basis_fingerprint: str
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    sha256: str
    round: int
    task: str
    created: str
    epsilon: float | None = None
    seed: int | None = None  # of what follows from it: NOLA's random matrices
    sides: dict[str, tuple[int, int]] | None = None  # layer → (out, in), where the parts do not show them
    encoder: ModelId | None = None  # that looks at each prompt, where the method has one
    kind: str | None = None  # of the model, as `model.kind`; None in what was published before there was speech
    standardised: bool = False  # whether the head is on standardised features (`fedsb/adapters/head.py`)


@dataclass(frozen=True)
class StoredAdapter:
    """One version of a client's adapter: its state (fp32; the parts of its method, and head parameters) and its manifest."""

    state: dict[str, Tensor]
    manifest: Manifest

    def cut(self, rank: int) -> "StoredAdapter":
        """The leading blocks of its parts at a rank. Raises StoreError if its method has no such, or a rank that is not below."""
        method = METHODS[self.manifest.method]
        if not method.nested:
            raise StoreError(
                f"{self.manifest.client}: an adapter of method {self.manifest.method} cannot be cut to a rank; leave --rank out"
            )
        if not 0 < rank <= self.manifest.rank:
            raise StoreError(f"{self.manifest.client}: its rank is {self.manifest.rank}; give --rank from 1 to that, not {rank}")
        state = {
            name: t[tuple(map(slice, method.cut(name.rpartition(".")[2], tuple(t.shape), rank)))].contiguous()
            for name, t in self.state.items()
        }
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        scale = self.manifest.scale * self.manifest.rank / rank  # α is the same, and α/r another
        return StoredAdapter(state, self.manifest.model_copy(update={"rank": rank, "scale": scale, "shapes": shapes}))

    def plain(self, features: Features) -> "StoredAdapter":
        """With a head that the base model's own classifier can be. `features`: of that model."""
        if not self.manifest.standardised:
            return self
        head = {f"head.{name}": tensor for name, tensor in plain(self.head, features).items()}
        return StoredAdapter(self.state | head, self.manifest.model_copy(update={"standardised": False}))

    @property
    def layers(self) -> dict[str, dict[str, Tensor]]:
        """Layer name → part of the method (`core`, or `A` and `B`) → tensor."""
        found: dict[str, dict[str, Tensor]] = {}
        for name, tensor in self.state.items():
            if not HEAD.fullmatch(name):
                layer, _, part = name.rpartition(".")
                found.setdefault(layer, {})[part] = tensor
        return found

    @property
    def expanded(self) -> Mapping[str, Parts]:
        """The layers in fp64, with the parts that the chain of the method takes."""
        wide = {name: {part: t.double() for part, t in parts.items()} for name, parts in self.layers.items()}
        expand, manifest = METHODS[self.manifest.method].expand, self.manifest
        if expand is None:
            return wide
        if manifest.seed is None or manifest.sides is None or manifest.sides.keys() != wide.keys():
            raise AdapterError(f"the adapter of {manifest.client} does not say its seed or layers; publish it anew")
        return expand(wide, manifest.sides, manifest.rank, manifest.seed)

    @functools.cached_property
    def numbers(self) -> Tensor:
        """All of its state, one after another in its order: (n,)."""
        return _numbers(self.state)

    @property
    def head(self) -> dict[str, Tensor]:
        """Head parameters by their name in the base model, e.g. `classifier.weight`."""
        return {name.removeprefix("head."): tensor for name, tensor in self.state.items() if HEAD.fullmatch(name)}


def publish(
    store: Path,
    client: str,
    state: Mapping[str, Tensor],
    *,
    base_model: ModelId,
    method: str,
    rank: int,
    basis_fingerprint: str,
    round: int,
    task: str,
    scale: float = 1.0,
    epsilon: float | None = None,
    kind: str | None = None,
    standardised: bool = False,
    seed: int | None = None,
    sides: Mapping[str, tuple[int, int]] | None = None,
    encoder: ModelId | None = None,
) -> int:
    """Publish a client's state as its next version, make it the current one, and return its number, from 1.

    Raises StoreError (the client's name), AdapterError (a state that is no adapter of that rank) and DiskError; then
    the store is as before.
    """
    folder = _folder(store, client)
    _check(state, _numbers(state), method, rank, f"the adapter of {client}")
    with _turn(folder):
        version = max(_versions(folder), default=0) + 1
        with staged_folder(folder / f"v{version:04d}") as staged:
            save_tensors(staged / CORE_FILE, state)
            manifest = Manifest(
                client=client,
                version=version,
                base_model=base_model,
                method=method,
                rank=rank,
                scale=scale,
                basis_fingerprint=basis_fingerprint,
                shapes={name: tuple(tensor.shape) for name, tensor in state.items()},
                dtypes={name: _named(tensor.dtype) for name, tensor in state.items()},
                sha256=sha256_of(staged / CORE_FILE),
                round=round,
                task=task,
                created=datetime.now(UTC).isoformat(timespec="seconds"),
                epsilon=epsilon,
                kind=kind,
                standardised=standardised,
                seed=seed,
                sides=None if sides is None else dict(sides),
                encoder=encoder,
            )
            write_file(staged / MANIFEST_FILE, (manifest.model_dump_json(indent=2) + "\n").encode())
        write_json(folder / CURRENT_FILE, {"version": version})
    return version


def load(store: Path, client: str, version: int | None = None) -> StoredAdapter:
    """One version of a client's adapter, by default the current one, with everything that the manifest says checked.

    Raises StoreError if there is no such client or version, and AdapterError if its files are not what was published.
    """
    folder = _folder(store, client)
    if not (folder / CURRENT_FILE).exists():
        raise _unknown(store, client)
    number = _current(folder) if version is None else version
    known = _versions(folder)  # listed after `current` was read, since a version exists before `current` names it
    if number not in known:
        raise StoreError(f"{store / client}: has no version {number}; it has {', '.join(map(str, known)) or 'none'}")
    folder = folder / f"v{number:04d}"
    stored = _read(folder)
    if stored is None or (stored.manifest.client, stored.manifest.version) != (client, number):
        raise AdapterError(
            f"{folder}: is not what was published (missing, torn or changed); publish {client} anew, or name another version"
        )
    _check(stored.state, stored.numbers, stored.manifest.method, stored.manifest.rank, str(folder))
    return stored


def clients(store: Path) -> list[str]:
    """Names of the clients with a current adapter, sorted. Raises StoreError if there is no such store."""
    if not store.is_dir():
        raise StoreError(f"{store}: there is no adapter store; name the adapters/ folder of a run")
    return sorted(path.parent.name for path in store.glob(f"*/{CURRENT_FILE}") if SITE_NAME.fullmatch(path.parent.name))


def has(store: Path, client: str) -> bool:
    """Whether a store has a current adapter of a client. A name that cannot be one is not there."""
    return SITE_NAME.fullmatch(client) is not None and (store / client / CURRENT_FILE).is_file()


def current(store: Path, client: str) -> int:
    """Number of a client's current version. Raises StoreError if there is none."""
    folder = _folder(store, client)
    if not (folder / CURRENT_FILE).exists():
        raise _unknown(store, client)
    return _current(folder)


def versions(store: Path, client: str) -> list[int]:
    """Numbers of a client's published versions, ascending. Raises StoreError for a client that the store lacks."""
    folder = _folder(store, client)
    if not (folder / CURRENT_FILE).exists():
        raise _unknown(store, client)
    return _versions(folder)


def _folder(store: Path, client: str) -> Path:
    if not SITE_NAME.fullmatch(client):
        raise StoreError(
            f"{client!r}: is no client name; use 1 to 63 of a-z, 0-9, dot, dash and underscore, beginning with a letter or digit"
        )
    return store / client


def _unknown(store: Path, client: str) -> StoreError:
    return StoreError(f"{store}: has no adapter of {client}; publish one, or name one of the store's folders")


def _versions(folder: Path) -> list[int]:
    matches = (VERSION.fullmatch(path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def _current(folder: Path) -> int:
    version = read_json(folder / CURRENT_FILE).get("version")
    if not isinstance(version, int):
        raise StoreError(f'{folder / CURRENT_FILE}: names no version; write {{"version": N}} into it')
    return version


@contextlib.contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """Hold a client's lock, which the system releases when the process ends, however it ends."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK_FILE).open("ab")
    with file:
        with writing(folder):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@functools.cache
def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _read(folder: Path) -> StoredAdapter | None:
    """The adapter of a version's folder, or None if hash, names, shapes or dtypes are not those of its manifest."""
    try:
        manifest = Manifest.model_validate_json(read_file(folder / MANIFEST_FILE))
        data = read_file(folder / CORE_FILE)
        if hashlib.sha256(data).hexdigest() != manifest.sha256:
            return None
        state = tensors_of(data, folder / CORE_FILE)
    except (StoreError, ValidationError):
        return None
    return StoredAdapter(state, manifest) if _described(state, manifest) else None


def _described(state: Mapping[str, Tensor], manifest: Manifest) -> bool:
    shapes, dtypes = manifest.shapes, manifest.dtypes
    return (
        state.keys() == shapes.keys() == dtypes.keys()
        and all(tensor.shape == shapes[name] for name, tensor in state.items())
        and all(_named(tensor.dtype) == dtypes[name] for name, tensor in state.items())
    )


def _numbers(state: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in state.values()]) if state else torch.empty(0)


def _check(state: Mapping[str, Tensor], numbers: Tensor, method: str, rank: int, where: str) -> None:
    """Refuse a state of another method, without layers, with half a layer, of another rank or dtype, or with NaN or infinity.

    numbers: all of the state, which is many small tensors, one after another.
    """
    if method not in METHODS:
        raise AdapterError(f"{where}: is of the method {method!r}, which this version does not have; update fedsb")
    kinds = tuple((name, tensor.shape, tensor.dtype) for name, tensor in state.items())
    if fault := _fault(kinds, method, rank) or _not_finite(state, numbers):
        raise AdapterError(f"{where}: {fault}")


@functools.lru_cache(maxsize=64)  # a store's adapters are mostly alike
def _fault(kinds: tuple[tuple[str, tuple[int, ...], torch.dtype], ...], method: str, rank: int) -> str | None:
    """What is wrong with tensors of these names, shapes and dtypes, and what to do."""
    says, found = METHODS[method], dict[str, set[str]]()
    for name, shape, dtype in kinds:
        layer, _, part = name.rpartition(".")
        if not HEAD.fullmatch(name):
            found.setdefault(layer, set()).add(part)
            if part not in says.parts:
                return f"{name} is neither {' nor '.join(says.parts)} nor a head parameter; train it again"
            if not says.fits(part, shape, rank):
                return f"{name} has shape {tuple(shape)} where rank {rank} is said; train it again"
        if dtype != torch.float32:
            return f"{name} is {_named(dtype)} instead of float32; train it again"
    if not found:
        return f"holds no {', no '.join(says.parts)}; train it first"
    torn = next((layer for layer, parts in found.items() if parts != says.parts.keys()), None)
    return None if torn is None else f"{torn} lacks a part; train it first"


def _not_finite(state: Mapping[str, Tensor], numbers: Tensor) -> str | None:
    """Whether there is NaN or infinity. All are looked at together first."""
    if bool(numbers.isfinite().all()):
        return None
    name = next(name for name, tensor in state.items() if not tensor.isfinite().all())
    return f"{name} holds NaN or infinity; train it again"
