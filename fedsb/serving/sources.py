"""Where a server finds adapters: stores of runs, and folders that PEFT wrote. Both are read as what a stranger may have put
there: names are strict, no link is followed, and nothing is used before it was checked whole."""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from fedsb.errors import AdapterError, StoreError
from fedsb.sections import SITE_NAME
from fedsb.serving.forms import Formed, Known, formed
from fedsb.serving.pack import Pack
from fedsb.serving.peft_folder import CONFIG_FILE, WEIGHTS_FILE, read_lora
from fedsb.store import adapters
from fedsb.store.adapters import CORE_FILE, CURRENT_FILE, MANIFEST_FILE
from fedsb.store.basis_files import load_basis

BASES = 8  # of runs, kept at hand
Sides = Mapping[str, tuple[int, int]]  # layer → (out, in) of the model


class Source(Protocol):
    """Adapters by name. A name that is none is simply not there."""

    def names(self) -> list[str]:
        """Sorted. Raises StoreError if the source is gone."""

    def has(self, name: str) -> bool:
        """Whether there is such an adapter."""

    def version(self, name: str) -> int:
        """Its number, as people are told it. Raises StoreError if it is not there."""

    def mark(self, name: str) -> object:
        """What is another after every change of its adapter, whatever the number. Raises StoreError if it is not there."""

    def load(self, name: str, version: int) -> Formed:
        """An adapter. Raises AdapterError, BasisError or StoreError if it cannot be used."""


class Store:
    """The adapters of a run: `adapters/`, beside its bases. model: SHA-256 of the base model."""

    def __init__(self, store: Path, model: str) -> None:
        self.store, self.model = store, model
        self._basis = lru_cache(maxsize=BASES)(load_basis)
        self._known: Known = {}

    def names(self) -> list[str]:
        """As `Source`."""
        return [name for name in adapters.clients(self.store) if self.has(name)]

    def has(self, name: str) -> bool:
        """As `Source`."""
        return adapters.has(self.store, name) and _plain(self.store, f"{name}/{CURRENT_FILE}")

    def version(self, name: str) -> int:
        """As `Source`."""
        return adapters.current(self.store, name)

    def mark(self, name: str) -> object:
        """As `Source`: the version, which is never written twice."""
        return self.version(name)

    def load(self, name: str, version: int) -> Formed:
        """As `Source`."""
        if not all(_plain(self.store, f"{name}/v{version:04d}/{file}") for file in (CORE_FILE, MANIFEST_FILE)):
            raise AdapterError(f"{self.store / name}: version {version} has a link, or a file is none; publish {name} anew")
        stored = adapters.load(self.store, name, version)
        manifest = stored.manifest
        if manifest.base_model.sha256 != self.model:
            raise AdapterError(
                f"the adapter of {name} was trained on {manifest.base_model.name} "
                f"({manifest.base_model.sha256[:12]}), and this server has another model ({self.model[:12]})"
            )
        if stored.head:
            raise AdapterError(f"the adapter of {name} has a classification head, and this server generates text")
        basis = self._basis(self.store.parent, manifest.basis_fingerprint)
        return formed(stored, basis, self._known)


class Folders:
    """A folder of folders with a plain LoRA each, as PEFT and `fedsb export` write them; a folder's name is the tenant's.

    sides: of the model, which say what can be an adapter of it.
    """

    def __init__(self, root: Path, sides: Sides) -> None:
        self.root, self.sides = root, sides

    def names(self) -> list[str]:
        """As `Source`."""
        if not self.root.is_dir():
            raise StoreError(f"{self.root}: there is no such folder; name one with adapters")
        return sorted(path.name for path in self.root.iterdir() if self.has(path.name))

    def has(self, name: str) -> bool:
        """As `Source`."""
        return SITE_NAME.fullmatch(name) is not None and all(
            _plain(self.root, f"{name}/{file}") for file in (CONFIG_FILE, WEIGHTS_FILE)
        )

    def version(self, name: str) -> int:
        """As `Source`: when its files were changed last, in nanoseconds."""
        try:
            return max((self.root / name / file).stat().st_mtime_ns for file in (CONFIG_FILE, WEIGHTS_FILE))
        except OSError:
            raise StoreError(f"{self.root}: has no adapter {name}; name one of its folders") from None

    def mark(self, name: str) -> object:
        """As `Source`."""
        return self.version(name)

    def load(self, name: str, version: int) -> Formed:
        """As `Source`; whatever the version, what is there now."""
        return Formed.of("lora", read_lora(self.root / name, self.sides))


def source_of(path: Path, model: str, sides: Sides) -> Source:
    """The adapters of a run (its folder, or its `adapters`), folders that PEFT wrote, or a pack.

    Raises StoreError if it is none of these, and AdapterError if it is a pack for another base model.
    """
    if path.is_file():
        return Pack(path, model)
    store = path / "adapters" if (path / "adapters").is_dir() else path
    if not store.is_dir():
        raise StoreError(f"{path}: there is no such folder; name the folder of a run, its adapters, or one of PEFT's folders")
    if any(store.glob(f"*/{CONFIG_FILE}")) and not any(store.glob(f"*/{CURRENT_FILE}")):
        return Folders(store, sides)
    return Store(store, model)


def _plain(root: Path, path: str) -> bool:
    """Whether there is such a file below a folder, with no link on the way to it."""
    found = root / path
    return found.is_file() and found.resolve() == root.resolve() / path
