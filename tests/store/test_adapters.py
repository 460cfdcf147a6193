import errno
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsb.errors import AdapterError, DiskError, StoreError
from fedsb.store.adapters import clients, load, versions
from fedsb.store.files import sha256_of
from fedsb.store.tensors import save_tensors
from tests.store.samples import litter, publish, state


def test_publish_and_load(tmp_path: Path) -> None:
    tensors = state(1) | {"head.classifier.weight": torch.randn(3, 8), "head.classifier.bias": torch.randn(3)}
    assert publish(tmp_path, "hospital-a", tensors, epsilon=3.5) == 1
    stored = load(tmp_path, "hospital-a")
    assert stored.state.keys() == tensors.keys()
    assert all(torch.equal(stored.state[name], tensors[name]) for name in tensors)
    assert stored.layers.keys() == {"model.layers.0.q_proj", "model.layers.1.q_proj"}
    assert stored.head.keys() == {"classifier.weight", "classifier.bias"}
    written = json.loads((tmp_path / "hospital-a" / "v0001" / "manifest.json").read_text())
    created = datetime.fromisoformat(written.pop("created"))
    assert created.utcoffset() is not None and abs((datetime.now(UTC) - created).total_seconds()) < 60
    assert written == {
        "client": "hospital-a",
        "version": 1,
        "base_model": {"name": "tiny/model", "sha256": "ab" * 32},
        "method": "lora-sb",
        "rank": 4,
        "basis_fingerprint": "00" * 32,
        "shapes": {name: list(tensor.shape) for name, tensor in tensors.items()},
        "dtypes": dict.fromkeys(tensors, "float32"),
        "sha256": sha256_of(tmp_path / "hospital-a" / "v0001" / "core.safetensors"),
        "round": 5,
        "task": "chain_sum",
        "epsilon": 3.5,
        "standardised": False,
        "scale": 1.0,
        "seed": None,
        "sides": None,
        "encoder": None,
        "kind": None,
    }


def test_versions_count_up_and_old_ones_stay(tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        assert publish(tmp_path, "b", state(seed)) == seed
    publish(tmp_path, "a.site_1", state())
    assert clients(tmp_path) == ["a.site_1", "b"]
    assert versions(tmp_path, "b") == [1, 2, 3]
    name = "model.layers.0.q_proj.core"
    assert torch.equal(load(tmp_path, "b").state[name], state(3)[name])
    assert torch.equal(load(tmp_path, "b", 1).state[name], state(1)[name])
    assert load(tmp_path, "b", 1).manifest.epsilon is None


def test_current_decides_which_version_is_served(tmp_path: Path) -> None:
    for seed in (1, 2):
        publish(tmp_path, "a", state(seed))
    (tmp_path / "a" / "current").write_text('{"version": 1}')
    assert load(tmp_path, "a").manifest.version == 1
    assert publish(tmp_path, "a", state(3)) == 3
    (tmp_path / "a" / "current").write_text('{"version": "2"}')
    with pytest.raises(StoreError, match="current: names no version"):
        load(tmp_path, "a")


@pytest.mark.parametrize("name", ["../a", "a/b", "..", ".a", "", "A", "a\n", "a" * 64, "/etc", "-a", "é"])
def test_names_that_could_leave_the_store_are_refused(tmp_path: Path, name: str) -> None:
    store = tmp_path / "store"
    for call in (lambda: publish(store, name, state()), lambda: load(store, name), lambda: versions(store, name)):
        with pytest.raises(StoreError, match="is no client name"):
            call()
    assert list(tmp_path.rglob("*")) == []


@given(name=st.text(max_size=70))
def test_no_accepted_name_leaves_the_store(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    store = tmp_path_factory.getbasetemp() / "store"
    with pytest.raises(StoreError) as caught:
        versions(store, name)
    assert "is no client name" in str(caught.value) or (store / name).resolve().parent == store.resolve()


def test_what_the_store_lacks_is_told(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no adapter store"):
        clients(tmp_path / "nowhere")
    with pytest.raises(StoreError, match="has no adapter of a"):
        load(tmp_path, "a")
    publish(tmp_path, "a", state())
    with pytest.raises(StoreError, match="has no version 7; it has 1"):
        load(tmp_path, "a", 7)


def _spoil(tmp_path: Path, name: str, value: torch.Tensor | None, rehash: bool = True) -> None:
    """Change one tensor of the stored core, and make the manifest's hash agree, as someone would who means it."""
    folder = tmp_path / "a" / "v0001"
    tensors = state()
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value
    save_tensors(folder / "core.safetensors", tensors)
    if rehash:
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["sha256"] = sha256_of(folder / "core.safetensors")
        (folder / "manifest.json").write_text(json.dumps(manifest))


CORE = "model.layers.0.q_proj.core"


@pytest.mark.parametrize(
    ("name", "value", "rehash", "told"),
    [
        (CORE, torch.zeros(4, 4), False, "is not what was published"),
        (CORE, torch.zeros(4, 5), True, "is not what was published"),
        (CORE, torch.zeros(4, 4, dtype=torch.float64), True, "is not what was published"),
        (CORE, None, True, "is not what was published"),
        ("model.layers.9.q_proj.core", torch.zeros(4, 4), True, "is not what was published"),
        (CORE, torch.full((4, 4), float("nan")), True, "holds NaN or infinity"),
    ],
)
def test_a_tampered_core_is_refused(tmp_path: Path, name: str, value: torch.Tensor | None, rehash: bool, told: str) -> None:
    publish(tmp_path, "a", state())
    _spoil(tmp_path, name, value, rehash)
    with pytest.raises(AdapterError, match=told):
        load(tmp_path, "a")


def test_a_version_of_another_client_is_refused(tmp_path: Path) -> None:
    publish(tmp_path, "a", state(1))
    publish(tmp_path, "b", state(2))
    for file in ("core.safetensors", "manifest.json"):
        (tmp_path / "b" / "v0001" / file).replace(tmp_path / "a" / "v0001" / file)
    with pytest.raises(AdapterError, match="is not what was published"):
        load(tmp_path, "a")


@pytest.mark.parametrize("file", ["core.safetensors", "manifest.json"])
def test_a_torn_version_is_refused(tmp_path: Path, file: str) -> None:
    publish(tmp_path, "a", state())
    os.truncate(tmp_path / "a" / "v0001" / file, 50)
    with pytest.raises(AdapterError, match="is not what was published"):
        load(tmp_path, "a")


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({}, "holds no core"),
        ({"head.classifier.bias": torch.zeros(2)}, "holds no core"),
        (state() | {"x.core": torch.zeros(3, 3)}, r"x\.core has shape \(3, 3\) where rank 4 is said"),
        (state() | {"lm_head.weight": torch.zeros(3, 3)}, "is neither core nor a head parameter"),
        (state() | {"x.core": torch.zeros(4, 4).bfloat16()}, "is bfloat16 instead of float32"),
        (state() | {"x.core": torch.full((4, 4), torch.inf)}, "holds NaN or infinity"),
    ],
)
def test_what_is_no_adapter_is_not_published(tmp_path: Path, tensors: dict[str, torch.Tensor], told: str) -> None:
    with pytest.raises(AdapterError, match=told):
        publish(tmp_path, "a", tensors)
    assert list(tmp_path.rglob("*")) == []


def test_a_full_disk_leaves_the_version_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(tmp_path, "a", state(1))

    def _full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for call in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, _full)
            with pytest.raises(DiskError, match="free some space"):
                publish(tmp_path, "a", state(2))
    assert versions(tmp_path, "a") == [1]
    assert load(tmp_path, "a").manifest.version == 1
    assert litter(tmp_path) == []


def test_a_first_publication_killed_before_current_is_not_listed(tmp_path: Path) -> None:
    publish(tmp_path, "a", state(1))
    (tmp_path / "a" / "current").unlink()
    assert clients(tmp_path) == []
    assert publish(tmp_path, "a", state(2)) == 2
    assert clients(tmp_path) == ["a"]


def test_a_reader_never_sees_half_a_version(tmp_path: Path) -> None:
    name = "model.layers.0.q_proj.core"
    publish(tmp_path, "a", state(1))
    done = threading.Event()

    def _read() -> int:
        while True:
            stored = load(tmp_path, "a")
            assert torch.equal(stored.state[name], state(stored.manifest.version)[name])
            if done.is_set():
                return load(tmp_path, "a").manifest.version

    with ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(_read) for _ in range(2)]
        try:
            for version in range(2, 12):
                assert publish(tmp_path, "a", state(version)) == version
        finally:
            done.set()
        assert [reader.result() for reader in readers] == [11, 11]


def test_publishers_of_one_client_take_turns(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        numbers = list(pool.map(lambda seed: publish(tmp_path, "a", state(seed)), range(12)))
    assert sorted(numbers) == list(range(1, 13)) == versions(tmp_path, "a")
    assert load(tmp_path, "a").manifest.version == 12
