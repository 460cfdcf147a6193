import contextlib
import errno
import json
import os
import resource
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsb.errors import DiskError, StoreError
from fedsb.store import files
from fedsb.store.tensors import load_tensors, save_tensors
from tests.store.samples import litter


def _full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextlib.contextmanager
def _at_most(size: int) -> Iterator[None]:
    """Let no file grow beyond `size` bytes: a real refusal by the kernel, after a part has been written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_write_file_is_readable_by_other_users_and_makes_folders(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    old = os.umask(0o077)
    try:
        files.write_file(path, b"one")
        files.write_file(path, b"two")
        with files.staged_folder(tmp_path / "folder") as staged:
            save_tensors(staged / "t.safetensors", {"a": torch.ones(1)})
    finally:
        os.umask(old)
    assert path.read_bytes() == b"two"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "folder" / "t.safetensors").stat().st_mode) == 0o644
    assert litter(tmp_path) == []


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path = tmp_path / "file"
    files.write_file(path, b"old")
    monkeypatch.setattr(os, call, _full)
    with pytest.raises(DiskError, match=r"file: cannot be written \(No space left on device\); free some space"):
        files.write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert litter(tmp_path) == []


def test_a_write_cut_short_by_the_kernel_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    files.write_file(path, b"old")
    with _at_most(100_000), pytest.raises(DiskError, match=r"file: cannot be written"):
        files.write_file(path, b"x" * 300_000)
    assert path.read_bytes() == b"old"
    assert litter(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_every_refusal_of_the_disk_has_a_remedy(tmp_path: Path, code: int) -> None:
    with pytest.raises(DiskError) as caught, files.writing(tmp_path / "x"):
        raise OSError(code, os.strerror(code))
    assert str(caught.value) == f"{tmp_path}/x: cannot be written ({os.strerror(code)}); {files.REMEDIES[code]}"


def test_staged_folder_replaces_the_whole_folder(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    for name in ("one", "two"):
        with files.staged_folder(path) as staged:
            (staged / name).write_text(name)
            assert staged.parent == tmp_path
    assert [p.name for p in path.iterdir()] == ["two"]
    assert litter(tmp_path) == []


def test_an_error_inside_staged_folder_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    with files.staged_folder(path) as staged:
        (staged / "file").write_text("old")
    with pytest.raises(KeyError), files.staged_folder(path) as staged:
        (staged / "file").write_text("new")
        raise KeyError
    assert (path / "file").read_text() == "old"
    assert litter(tmp_path) == []


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failing_rename_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    path = tmp_path / "folder"
    with files.staged_folder(path) as staged:
        (staged / "file").write_text("old")
    calls, replace = 0, os.replace

    def _replace(source: Path, target: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == failing:
            _full()
        replace(source, target)

    monkeypatch.setattr(os, "replace", _replace)
    with pytest.raises(DiskError, match="folder: cannot be written"), files.staged_folder(path) as staged:
        (staged / "file").write_text("new")
    assert (path / "file").read_text() == "old"
    assert litter(tmp_path) == []


def test_staged_folder_through_a_symbolic_link_replaces_its_target(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with files.staged_folder(tmp_path / "link") as staged:
        (staged / "file").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "file").read_text() == "new"


def test_staged_folder_refuses_to_replace_a_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("mine")
    with pytest.raises(StoreError, match="x: is a file"), files.staged_folder(tmp_path / "x"):
        pass
    assert (tmp_path / "x").read_text() == "mine"


def test_a_killed_process_leaves_the_old_folder_and_a_leftover_that_can_be_cleaned(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    with files.staged_folder(path) as staged:
        (staged / "file").write_text("old")
    code = (
        "import os, signal, pathlib\nfrom fedsb.store.files import staged_folder\n"
        f"with staged_folder(pathlib.Path({str(path)!r})) as staged:\n"
        "    (staged / 'file').write_text('new')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = Path(files.__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == -signal.SIGKILL
    assert (path / "file").read_text() == "old"
    assert len(litter(tmp_path)) == 1
    files.clean_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_tensors_roundtrip_with_metadata(tmp_path: Path) -> None:
    shared = torch.randn(3, 4)
    tensors = {"a": shared, "b": shared, "t": shared.T, "half": torch.randn(2, 2).bfloat16(), "none": torch.zeros(0, 3)}
    save_tensors(tmp_path / "x.safetensors", tensors, {"who": "ünï"})
    loaded, metadata = load_tensors(tmp_path / "x.safetensors")
    assert metadata == {"who": "ünï"}
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_loaded_tensors_keep_no_file_mapped(tmp_path: Path) -> None:
    save_tensors(tmp_path / "x.safetensors", {"a": torch.ones(64, 64)})
    loaded, _ = load_tensors(tmp_path / "x.safetensors")
    assert loaded and str(tmp_path / "x.safetensors") not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("kept", [0, 4, 30, -1])
def test_a_torn_tensor_file_is_refused(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.ones(8)})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(StoreError, match=r"x\.safetensors: is no whole safetensors file"):
        load_tensors(path)


def test_missing_files_are_told(tmp_path: Path) -> None:
    for read in (load_tensors, files.sha256_of, files.read_file, files.read_json):
        with pytest.raises(StoreError, match="nowhere: there is no such file"):
            read(tmp_path / "nowhere")


@pytest.mark.parametrize("data", [b"", b'{"a": 1', b"[1]", b"\xff\xfe"])
def test_json_that_is_no_object_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(StoreError, match="x: is no JSON object"):
        files.read_json(tmp_path / "x")


def test_sha256_is_the_known_one(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert files.sha256_of(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_events_are_read_in_order_and_a_missing_file_has_none(tmp_path: Path) -> None:
    path = tmp_path / "run" / "events.jsonl"
    assert files.read_events(path) == []
    for number in range(3):
        files.append_line(path, json.dumps({"n": number}))
    assert files.read_events(path) == [{"n": 0}, {"n": 1}, {"n": 2}]


@given(cut=st.integers(1, 12))
def test_a_torn_last_line_costs_no_other_event(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = tmp_path_factory.mktemp("events") / "events.jsonl"
    for number in range(2):
        files.append_line(path, json.dumps({"n": number, "é": 1}))
    os.truncate(path, path.stat().st_size - cut)
    assert files.read_events(path) == [{"n": 0, "é": 1}]
    files.append_line(path, '{"n": 2}')
    assert files.read_events(path) == [{"n": 0, "é": 1}, {"n": 2}]


def test_a_spoilt_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"n": 0}\n{"n":\n{"n": 2}\n')
    with pytest.raises(StoreError, match=r"events\.jsonl: line 2 is no JSON object"):
        files.read_events(path)


def test_an_event_cut_short_by_the_kernel_is_taken_back(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    files.append_line(path, '{"n": 0}')
    before = path.read_bytes()
    with _at_most(len(before) + 5), pytest.raises(DiskError, match=r"events\.jsonl: cannot be written"):
        files.append_line(path, '{"n": 1}')
    assert path.read_bytes() == before


def test_a_line_with_a_newline_is_a_defect(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="newline"):
        files.append_line(tmp_path / "x", "a\nb")
