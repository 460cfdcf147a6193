from pathlib import Path

import pytest
import torch

from fedsb.errors import BasisError, StoreError
from fedsb.store.basis_files import load_basis, save_basis
from fedsb.store.tensors import load_tensors, save_tensors
from tests.store.samples import basis

SHAPES = {"model.layers.1.b": (8, 6), "model.layers.0.a": (5, 7)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_basis_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    saved = basis(SHAPES, dtype=dtype)
    assert save_basis(tmp_path, saved) == tmp_path / "basis" / f"{saved.fingerprint}.safetensors"
    loaded = load_basis(tmp_path, saved.fingerprint)
    assert loaded.fingerprint == saved.fingerprint
    for part in ("B", "A", "R0"):
        ours, theirs = getattr(loaded, part), getattr(saved, part)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[n], theirs[n]) and ours[n].dtype == theirs[n].dtype for n in ours)


@pytest.mark.parametrize("side", ["B", "A", "R0"])
def test_a_changed_number_is_refused(tmp_path: Path, side: str) -> None:
    saved = basis(SHAPES)
    path = save_basis(tmp_path, saved)
    tensors, metadata = load_tensors(path)
    tensors[f"model.layers.0.a.{side}"][0, 0] += 1e-6
    save_tensors(path, tensors, metadata)
    with pytest.raises(BasisError, match="is not the basis that its name says"):
        load_basis(tmp_path, saved.fingerprint)


def test_a_lost_side_and_a_torn_file_are_refused(tmp_path: Path) -> None:
    saved = basis(SHAPES)
    path = save_basis(tmp_path, saved)
    tensors, metadata = load_tensors(path)
    del tensors["model.layers.0.a.R0"]
    save_tensors(path, tensors, metadata)
    with pytest.raises(BasisError, match="is not the basis that its name says"):
        load_basis(tmp_path, saved.fingerprint)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BasisError, match="is not the basis that its name says"):
        load_basis(tmp_path, saved.fingerprint)


def test_the_same_frames_with_another_r0_replace_the_file(tmp_path: Path) -> None:
    first = basis(SHAPES)
    second = type(first)(first.B, first.A, {name: r0 + 1 for name, r0 in first.R0.items()})
    for saved in (first, second):
        save_basis(tmp_path, saved)
    loaded = load_basis(tmp_path, first.fingerprint)
    assert all(torch.equal(loaded.R0[name], second.R0[name]) for name in SHAPES)


def test_a_missing_basis_and_a_name_that_is_no_fingerprint_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="has no such basis"):
        load_basis(tmp_path, "00" * 32)
    for name in ("../../secret", "", "0" * 63, "A" * 64, "0" * 64 + "\n"):
        with pytest.raises(BasisError, match="is no basis fingerprint"):
            load_basis(tmp_path, name)
