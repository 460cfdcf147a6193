"""A basis on disk: `<run>/basis/<fingerprint>.safetensors`, holding B, A and R0 of every layer and what was folded into W0;
or only the newest folds, and the fingerprint of the basis before them, which is a file of its own."""

import functools
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from fedsb.basis.frames import Basis, Fold
from fedsb.errors import BasisError, StoreError
from fedsb.store.tensors import load_tensors, save_tensors

FINGERPRINT = re.compile(r"[0-9a-f]{64}")
SIDES = ("B", "A", "R0")
BEFORE = "before"  # in the metadata: fingerprint of the basis to which this file's folds are added
U = re.compile(r"\.U(\d+)$")


def save_basis(run: Path, basis: Basis, before: Basis | None = None) -> Path:
    """Write a basis atomically under its fingerprint and return the file. Raises DiskError.

    The fingerprint does not cover R0, which may differ between two runs on one basis; it gets a hash of its own.

    Args:
        before: a basis on disk that this one is with more folded in; then only that is written.
    """
    path, told = basis_file(run, basis.fingerprint), {"fingerprint": basis.fingerprint}
    tensors: dict[str, Tensor] = {}
    for number, fold in enumerate(basis.folds[len(before.folds) if before else 0 :]):
        tensors |= {f"{layer}.{side}{number}": t for layer, pair in fold.items() for side, t in zip("UV", pair, strict=True)}
    if before is not None:
        told[BEFORE] = before.fingerprint
    else:
        told["r0_sha256"] = _hash(basis.R0)
        for side, part in zip(SIDES, (basis.B, basis.A, basis.R0), strict=True):
            tensors |= {f"{layer}.{side}": tensor for layer, tensor in part.items()}
    save_tensors(path, tensors, told)
    return path


def load_basis(run: Path, fingerprint: str) -> Basis:
    """The basis of a run with that fingerprint, which is computed again from what was read.

    Raises StoreError if the run has no such basis, and BasisError if the file is torn or holds something else.
    """
    path: Path | None = basis_file(run, fingerprint)
    folds: list[Fold] = []
    try:
        while path is not None:
            if not path.exists():
                raise StoreError(f"{path}: this run has no such basis; name the run that trained it, or rebuild the basis")
            tensors, metadata = _tensors(path)
            folds = [*_folds(tensors), *folds]
            path = basis_file(run, metadata[BEFORE]) if BEFORE in metadata else None
        b, a, r0 = (_side(tensors, side) for side in SIDES)
        basis = functools.reduce(Basis.fold, folds, Basis(b, a, r0))
    except (BasisError, KeyError):
        raise _spoilt(basis_file(run, fingerprint)) from None
    if basis.fingerprint != fingerprint or metadata.get("r0_sha256") != _hash(basis.R0):
        raise _spoilt(basis_file(run, fingerprint))
    return basis


def first_basis(run: Path) -> Basis | None:
    """The basis that a run began with; None if it has none yet.

    Raises as `load_basis`.
    """
    stored = sorted((run / "basis").glob("*.safetensors"))
    roots = [path.stem for path in stored if BEFORE not in _tensors(path)[1]]
    return load_basis(run, roots[0]) if roots else None


def _folds(tensors: Mapping[str, Tensor]) -> list[Fold]:
    numbers = sorted({int(match[1]) for match in (U.search(name) for name in tensors) if match})
    return [
        {layer: (u, tensors[f"{layer}.V{number}"]) for layer, u in _side(tensors, f"U{number}").items()} for number in numbers
    ]


def _tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        return load_tensors(path)
    except StoreError:
        raise _spoilt(path) from None


def basis_file(run: Path, fingerprint: str) -> Path:
    """Where a basis of that fingerprint lies, if there is one. Raises BasisError for what is no fingerprint."""
    if not FINGERPRINT.fullmatch(fingerprint):
        raise BasisError(f"{fingerprint!r}: is no basis fingerprint (64 hex digits); take it from a manifest.json")
    return run / "basis" / f"{fingerprint}.safetensors"


def _side(tensors: Mapping[str, Tensor], side: str) -> dict[str, Tensor]:
    return {name.removesuffix(f".{side}"): tensor for name, tensor in tensors.items() if name.endswith(f".{side}")}


def _hash(cores: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of (r, r) tensors, in order of name."""
    digest = hashlib.sha256()
    for name in sorted(cores):
        core = cores[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tuple(core.shape)}:{core.dtype};".encode())
        digest.update(core.numpy().tobytes())
    return digest.hexdigest()


def _spoilt(path: Path) -> BasisError:
    return BasisError(f"{path}: is not the basis that its name says (torn or changed); delete it and rebuild the basis")
