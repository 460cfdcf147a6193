"""A pack: adapters of very many tenants in one file, with the bases that they go through, each read when it is asked for.

A safetensors file: `numbers.K` (n, size), rows of adapters of kind K, in the order of its shapes; `basis.K.B.LAYER` and
`basis.K.A.LAYER`; `index`, JSON as bytes (`Index`). The file is mapped, so what was never asked for takes no memory, and
processes on one machine share what was.
"""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedsb.basis.frames import fingerprint_of
from fedsb.errors import AdapterError, StoreError
from fedsb.sections import SITE_NAME, Section
from fedsb.serving.forms import Formed, Kind, Shared
from fedsb.store.files import Stamp, stamp_of

log = logging.getLogger(__name__)


class KindEntry(Section):
    """A kind of adapters. shapes: layer, part, shape."""

    form: Literal["core", "lora", "flora"]
    basis: str
    shapes: list[tuple[str, str, list[int]]]


class TenantEntry(Section):
    """Where a tenant's adapter lies. sha256: of its row."""

    kind: int = Field(ge=0)
    row: int = Field(ge=0)
    version: int
    sha256: str


class Index(Section):
    """What a pack holds. model, model_name: the base model's SHA-256 and setting."""

    format: Literal["fedsb pack 1"] = "fedsb pack 1"
    model: str
    model_name: str
    kinds: list[KindEntry]
    tenants: dict[str, TenantEntry]


@dataclass(frozen=True)
class _Open:
    """A pack as it was when it was opened."""

    state: Stamp
    file: Any
    index: Index
    kinds: list[Kind]


class Pack:
    """A pack as a source. One that takes its place (by a rename) is opened when it is next asked for.

    Args:
        model: SHA-256 of the base model that it must be for.

    Raises StoreError if it is no pack, or torn, and AdapterError if it is for another base model.
    """

    def __init__(self, path: Path, model: str) -> None:
        self.path, self._model = path, model
        self._now = self._opened()
        self._seen: Stamp | None = self._now.state  # what was looked at last, also if it could not be taken
        self._spoilt = ""  # how the file that is open was written over; "" if it was not

    def names(self) -> list[str]:
        """As `Source`."""
        return sorted(self._pack.index.tenants)

    def has(self, name: str) -> bool:
        """As `Source`."""
        return name in self._pack.index.tenants

    def version(self, name: str) -> int:
        """As `Source`."""
        return self._entry(self._pack, name).version

    def mark(self, name: str) -> object:
        """As `Source`: of the row's bytes and what they are numbers of, since versions of other stores bear the same numbers."""
        pack = self._pack
        entry = self._entry(pack, name)
        kind = pack.index.kinds[entry.kind]
        return entry.sha256, kind.form, kind.basis

    def load(self, name: str, version: int) -> Formed:
        """As `Source`. Raises StoreError while the file that is open is written over: what is mapped may be gone."""
        pack = self._pack
        if self._spoilt:
            raise StoreError(f"{self._spoilt}; put a whole pack in its place by a rename, as `fedsb pack` does")
        entry = self._entry(pack, name)
        row: Tensor = pack.file.get_slice(f"numbers.{entry.kind}")[entry.row]
        if digest_of(row) != entry.sha256:
            raise AdapterError(f"{self.path}: the row of {name} is damaged; pack the stores again")
        if not bool(row.isfinite().all()):
            raise AdapterError(f"{self.path}: the adapter of {name} holds NaN or infinity; train it again")
        return Formed(pack.kinds[entry.kind], row)

    @property
    def _pack(self) -> _Open:
        seen = stamp_of(self.path)
        if seen != self._seen:
            self._seen = seen
            try:
                self._now, self._spoilt = self._opened(), ""
            except (StoreError, AdapterError) as error:
                same = seen is not None and seen.inode == self._now.state.inode  # the very file that is mapped
                self._spoilt = str(error) if same else self._spoilt
                others = "no others" if same else "others from the old pack"
                log.error("adapters in memory are served on, and %s: %s", others, error)
        return self._now

    def _entry(self, pack: _Open, name: str) -> TenantEntry:
        if name not in pack.index.tenants:
            raise StoreError(f"{self.path}: has no adapter {name}; pack it too")
        return pack.index.tenants[name]

    def _opened(self) -> _Open:
        state = stamp_of(self.path)
        if state is None:
            raise StoreError(f"{self.path}: there is no such pack; make it with `fedsb pack`")
        index = index_of(self.path)
        try:
            file: Any = safe_open(self.path, framework="pt")
        except (SafetensorError, OSError) as error:  # it was replaced in between
            raise StoreError(f"{self.path}: is no whole pack ({error}); make it with `fedsb pack`") from None
        if index.model != self._model:
            raise AdapterError(
                f"{self.path}: is of {index.model_name} ({index.model[:12]}), and this server has another model "
                f"({self._model[:12]})"
            )
        try:
            kinds = [_kind(file, number, entry) for number, entry in enumerate(index.kinds)]
            sizes = [file.get_slice(f"numbers.{number}").get_shape() for number in range(len(kinds))]
        except (SafetensorError, KeyError) as error:
            raise StoreError(f"{self.path}: lacks a part ({error}); pack the stores again") from None
        for kind, entry, size in zip(kinds, index.kinds, sizes, strict=True):
            if len(size) != 2 or size[1] != kind.size or (kind.form == "core" and kind.basis != _fingerprint(kind)):
                raise StoreError(
                    f"{self.path}: its rows or basis are not what its index says; pack the stores again ({entry.form})"
                )
        for name, told in index.tenants.items():
            if SITE_NAME.fullmatch(name) is None or told.kind >= len(kinds) or told.row >= sizes[told.kind][0]:
                raise StoreError(f"{self.path}: has no row for {name[:100]!r}; pack the stores again")
        return _Open(state, file, index, kinds)


def index_of(path: Path) -> Index:
    """What a pack holds. Raises StoreError if it is none, or torn."""
    try:
        with safe_open(path, framework="pt") as file:
            told = file.get_tensor("index").numpy().tobytes()
        return Index.model_validate_json(told)
    except FileNotFoundError:
        raise StoreError(f"{path}: there is no such pack; make it with `fedsb pack`") from None
    except (SafetensorError, OSError, ValidationError, TypeError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise StoreError(f"{path}: is no whole pack ({reason}); make it with `fedsb pack`") from None


def _kind(file: Any, number: int, entry: KindEntry) -> Kind:
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for layer, part, shape in entry.shapes:
        shapes.setdefault(layer, {})[part] = tuple(shape)
    shared: dict[str, Shared] = {}
    if entry.form == "core":
        sides = {side: {layer: file.get_tensor(f"basis.{number}.{side}.{layer}").clone() for layer in shapes} for side in "BA"}
        shared = {layer: Shared(sides["B"][layer], sides["A"][layer]) for layer in shapes}
    return Kind(entry.form, entry.basis, shared, shapes)


def _fingerprint(kind: Kind) -> str:
    return fingerprint_of({n: each.B for n, each in kind.shared.items()}, {n: each.A for n, each in kind.shared.items()})


def digest_of(row: Tensor) -> str:
    """SHA-256 (hex) of a row's bytes."""
    return hashlib.sha256(row.contiguous().view(torch.uint8).numpy().data).hexdigest()
