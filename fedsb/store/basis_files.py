"""A basis on disk: `<run>/basis/<fingerprint>.safetensors`, holding B, A and R0 of every layer."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from fedsb.basis.frames import Basis
from fedsb.errors import BasisError, StoreError
from fedsb.store.tensors import load_tensors, save_tensors

FINGERPRINT = re.compile(r"[0-9a-f]{64}")
SIDES = ("B", "A", "R0")


def save_basis(run: Path, basis: Basis) -> Path:
    """Write a basis atomically under its fingerprint and return the file. Raises DiskError.

    The fingerprint covers B and A only, so R0, which may differ between two runs on one basis, gets a hash of its own.
    """
    path = _path(run, basis.fingerprint)
    tensors = {
        f"{layer}.{side}": tensor
        for side, part in zip(SIDES, (basis.B, basis.A, basis.R0), strict=True)
        for layer, tensor in part.items()
    }
    save_tensors(path, tensors, {"fingerprint": basis.fingerprint, "r0_sha256": _hash(basis.R0)})
    return path


def load_basis(run: Path, fingerprint: str) -> Basis:
    """The basis of a run with that fingerprint, which is computed again from what was read.

    Raises StoreError if the run has no such basis, and BasisError if the file is torn or holds something else.
    """
    path = _path(run, fingerprint)
    if not path.exists():
        raise StoreError(f"{path}: this run has no such basis; name the run that trained it, or rebuild the basis")
    try:
        tensors, metadata = load_tensors(path)
        basis = Basis(**{side: _side(tensors, side) for side in SIDES})
    except (StoreError, BasisError):
        raise _spoilt(path) from None
    if basis.fingerprint != fingerprint or metadata.get("r0_sha256") != _hash(basis.R0):
        raise _spoilt(path)
    return basis


def _path(run: Path, fingerprint: str) -> Path:
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
