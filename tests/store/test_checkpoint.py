import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedsb.errors import CheckpointError, DiskError
from fedsb.store.checkpoint import Checkpoint, latest, save
from tests.store.samples import litter, state


def _checkpoint(number: int) -> Checkpoint:
    tensors = state(number) | {"head.classifier.bias": torch.arange(3.0)}
    return Checkpoint(number, tensors, "digest", "ff" * 32, "ee" * 32, {"bytes": {"up": number}, "history": [0.5, None, "x"]})


def _same(a: Checkpoint | None, b: Checkpoint) -> bool:
    assert a is not None
    tensors = a.state.keys() == b.state.keys() and all(torch.equal(a.state[n], b.state[n]) for n in b.state)
    return tensors and replace(a, state={}) == replace(b, state={})


def test_the_newest_round_comes_back(tmp_path: Path) -> None:
    assert latest(tmp_path, "digest") is None
    for number in (1, 2, 9999, 10000):  # as text, 10000 comes before 9999
        assert save(tmp_path, _checkpoint(number)) == tmp_path / "checkpoints" / f"round-{number:04d}"
        assert _same(latest(tmp_path, "digest"), _checkpoint(number))
    assert (tmp_path / "checkpoints" / "round-0001" / "state.safetensors").exists()


def test_saving_a_round_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, _checkpoint(1))
    again = replace(_checkpoint(2), round=1)
    save(tmp_path, again)
    assert _same(latest(tmp_path, "digest"), again)


def test_leftovers_are_passed_over_and_cleaned_by_the_next_save(tmp_path: Path) -> None:
    save(tmp_path, _checkpoint(1))
    leftover = tmp_path / "checkpoints" / ".round-0002.k1ll3d.tmp"
    leftover.mkdir()
    (leftover / "round.json").write_text("{")
    assert _same(latest(tmp_path, "digest"), _checkpoint(1))
    save(tmp_path, _checkpoint(2))
    assert not leftover.exists()


def test_a_full_disk_leaves_the_round_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, _checkpoint(1))

    def _full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", _full)
        with pytest.raises(DiskError, match="No space left on device"):
            save(tmp_path, _checkpoint(2))
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["round-0001"]
    assert litter(tmp_path) == []
    assert _same(latest(tmp_path, "digest"), _checkpoint(1))


def test_a_foreign_checkpoint_names_both_remedies(tmp_path: Path) -> None:
    folder = save(tmp_path, _checkpoint(1))
    with pytest.raises(CheckpointError) as caught:
        latest(tmp_path, "another")
    assert str(folder) in str(caught.value)
    assert str(tmp_path / "config.toml") in str(caught.value)
    assert "another --out" in str(caught.value)


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("state.safetensors", _flip),
        ("state.safetensors", lambda file: os.truncate(file, 40)),
        ("state.safetensors", Path.unlink),
        ("round.json", lambda file: os.truncate(file, 40)),
        ("round.json", Path.unlink),
        ("round.json", lambda file: file.write_text("{}")),
        ("round.json", lambda file: file.write_text(file.read_text().replace('"round": 2', '"round": 3'))),
    ],
)
def test_a_torn_checkpoint_is_named_and_deleting_it_resumes_before(tmp_path: Path, name: str, spoil: object) -> None:
    save(tmp_path, _checkpoint(1))
    folder = save(tmp_path, _checkpoint(2))
    spoil(folder / name)  # type: ignore[operator]
    with pytest.raises(CheckpointError) as caught:
        latest(tmp_path, "digest")
    assert str(caught.value).startswith(f"{folder / name}: ")
    assert f"delete the folder {folder} to resume from the round before" in str(caught.value)
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    assert _same(latest(tmp_path, "digest"), _checkpoint(1))
