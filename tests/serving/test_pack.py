"""Packs: what is packed is served as it was, one that takes another's place is seen, and a torn or forged one is refused."""

import json
import math
import shutil
import struct
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedsb.basis.spectral import random_basis
from fedsb.errors import AdapterError, FedsbError, StoreError
from fedsb.serving.bank import Bank
from fedsb.serving.forms import Form, Kind, formed
from fedsb.serving.forms import Formed as AnyFormed
from fedsb.serving.pack import Pack, index_of
from fedsb.serving.packing import write_pack
from fedsb.serving.sources import Folders, Store, source_of
from fedsb.serving.tenants import Tenants
from tests.cli.front_door import complaint, printed
from tests.serving.test_mixed import LAYERS, adapter, basis_of
from tests.serving.test_peft_folder import written
from tests.serving.test_tenants import Shop, finished, shop

__all__ = ["finished", "shop"]  # fixtures
MODEL = "0" * 64


class Formed:
    """A source of one adapter of each form, without files."""

    def __init__(self) -> None:
        from fedsb.serving.forms import formed

        self.told = {
            f"{method}-{seed}": formed(adapter(method, basis_of(method), seed), basis_of(method))
            for method in ("lora-sb", "nested-sb", "ravan", "lora", "flora")
            for seed in range(2)
        }

    def names(self) -> list[str]:
        return sorted(self.told)

    def has(self, name: str) -> bool:
        return name in self.told

    def version(self, name: str) -> int:
        return 7

    def mark(self, name: str) -> object:
        return 7

    def load(self, name: str, version: int) -> Any:
        return self.told[name]


def test_a_packed_tenant_answers_as_from_its_store(shop: Shop, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "all.pack"
    told = printed(capsys, "pack", str(shop.run), "--out", str(path))
    assert told.startswith(f"{path}: 3 tenants, ") and [each.name for each in tmp_path.iterdir() if "pack" in each.name] == [
        "all.pack"
    ]
    packed = Tenants([source_of(path, shop.source.sha256, shop.bank.layers)], shop.bank)
    assert packed.names() == shop.tenants.names()
    for name in packed.names():
        assert torch.equal(shop.logits(packed.take(name)), shop.logits(shop.tenants.take(name))), name
    assert len(shop.bank.groups) == 1  # side by side with those of the store
    printed(capsys, "pack", str(shop.run), "--out", str(path), "--dtype", "bf16")
    half = Tenants([source_of(path, shop.source.sha256, shop.bank.layers)], shop.bank)
    exact, close = shop.logits(shop.tenants.take("client-0")), shop.logits(half.take("client-0"))
    assert not torch.equal(exact, close) and (exact - close).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_form_comes_back_number_for_number(tmp_path: Path, dtype: torch.dtype) -> None:
    source, path = Formed(), tmp_path / "p"
    index = write_pack(path, [source], (MODEL, "tiny"), dtype)
    assert len(index.kinds) == 4 and path.stat().st_mode & 0o777 == 0o644
    pack = Pack(path, MODEL)
    for name, told in source.told.items():
        found = pack.load(name, pack.version(name))
        assert pack.version(name) == 7 and found.kind.key == told.kind.key and found.kind.sides == told.kind.sides
        assert torch.equal(found.numbers, told.numbers.to(dtype))
        for layer, shared in told.kind.shared.items():
            assert torch.equal(found.kind.shared[layer].B, shared.B) and torch.equal(found.kind.shared[layer].A, shared.A)


def test_folders_of_peft_are_packed_and_the_first_source_of_a_name_counts(tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("two", 1)):
        written(tmp_path / "a" / name, seed)
    written(tmp_path / "b" / "two", 5)
    sides = {
        f"model.layers.{i}.self_attn.{part}": (32 if part == "q_proj" else 16, 32)
        for i in range(2)
        for part in ("q_proj", "v_proj")
    }
    sides |= {f"model.layers.{i}.mlp.down_proj": (32, 48) for i in range(2)}
    first, second = Folders(tmp_path / "b", sides), Folders(tmp_path / "a", sides)
    write_pack(tmp_path / "p", [first, second], (MODEL, "tiny"))
    pack = Pack(tmp_path / "p", MODEL)
    assert pack.names() == ["one", "two"]
    assert torch.equal(pack.load("one", 0).numbers, second.load("one", 0).numbers)
    assert torch.equal(pack.load("two", 0).numbers, first.load("two", 0).numbers)


def test_one_that_takes_its_place_is_seen_and_a_broken_one_is_not_taken(
    shop: Shop, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, model = tmp_path / "p", (shop.source.sha256, "tiny")
    store = Store(shop.run / "adapters", shop.source.sha256)
    write_pack(path, [store], model)
    tenants = Tenants([Pack(path, model[0])], shop.bank)
    before = tenants.take("client-0")
    old = shop.logits(before)
    shop.publish("client-0", 0.0)
    write_pack(path, [store], model)
    after = tenants.take("client-0")
    assert after.version == before.version + 1 and torch.equal(shop.logits(before), old)
    assert not torch.equal(shop.logits(after), old)
    (tmp_path / "torn").write_bytes(path.read_bytes()[:-100])
    (tmp_path / "torn").replace(path)
    assert tenants.take("client-1").version == 1 and tenants.take("client-0").version == after.version
    assert sum("others from the old pack" in record.getMessage() for record in caplog.records) == 1  # and is not told again


def test_another_store_of_the_same_versions_is_another_adapter(shop: Shop, tmp_path: Path) -> None:
    """Version 1 of one run is not version 1 of the next, nor that of another source."""
    path, model = tmp_path / "p", (shop.source.sha256, "tiny")
    store = Store(shop.run / "adapters", shop.source.sha256)
    write_pack(path, [store], model)
    tenants = Tenants([Pack(path, model[0])], shop.bank)
    before = shop.logits(tenants.take("client-0"))
    shutil.copytree(shop.run, tmp_path / "other")
    for name in ("adapters/client-0/v0001", "adapters/client-1/v0001"):
        (tmp_path / "other" / name).rename(tmp_path / "other" / f"{name}-old")
    (tmp_path / "other/adapters/client-1/v0001-old").rename(tmp_path / "other/adapters/client-0/v0001")
    manifest = tmp_path / "other/adapters/client-0/v0001/manifest.json"
    manifest.write_text(manifest.read_text().replace('"client-1"', '"client-0"'))
    shutil.rmtree(tmp_path / "other/adapters/client-1")
    other = Store(tmp_path / "other/adapters", shop.source.sha256)
    write_pack(path, [other], model)
    taken = tenants.take("client-0")
    assert taken.version == 1 and not torch.equal(shop.logits(taken), before)
    both = Tenants([other, store], shop.bank)
    changed = shop.logits(both.take("client-0"))
    both.sources = [store, other]
    assert torch.equal(shop.logits(both.take("client-0")), before) and torch.equal(changed, shop.logits(taken))


def test_a_pack_written_over_in_place_ends_nobody_who_is_there(shop: Shop, tmp_path: Path) -> None:
    """What is mapped of it may be gone: reading there would end the whole process."""
    path, model = tmp_path / "p", (shop.source.sha256, "tiny")
    store = Store(shop.run / "adapters", shop.source.sha256)
    write_pack(path, [store], model)
    whole = path.read_bytes()
    tenants = Tenants([Pack(path, model[0])], shop.bank)
    before = shop.logits(tenants.take("client-0"))
    with path.open("r+b") as file:
        file.truncate(4096)
    assert torch.equal(shop.logits(tenants.take("client-0")), before)
    with pytest.raises(StoreError, match=r"put a whole pack in its place by a rename"):
        tenants.take("client-1")
    (tmp_path / "new").write_bytes(whole)
    (tmp_path / "new").replace(path)
    assert tenants.take("client-1").version == 1


SHAPES: list[tuple[str, dict[str, tuple[int, ...]]]] = [
    ("core", {"core": (2, 8)}),
    ("core", {"core": (16,)}),
    ("core", {"core": (8, 8)}),
    ("core", {"core": (4, 4), "more": (1, 1)}),
    ("lora", {"A": (3, 32), "B": (32, 5)}),
    ("lora", {"A": (3, 32)}),
    ("lora", {"A": (3, 32), "B": (32, 3), "C": (2, 2)}),
    ("lora", {"A": (3, 2, 16), "B": (32, 3)}),
]


@pytest.mark.parametrize(("form", "shapes"), SHAPES, ids=str)
def test_parts_that_do_not_go_together_are_refused_and_end_nothing(
    form: Form, shapes: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    basis = random_basis(LAYERS, 4, 0)
    good, source = formed(adapter("lora-sb", basis, 0, rank=4), basis), Formed()
    size = sum(math.prod(shape) for shape in shapes.values())
    layers = good.kind.shapes if form == "core" else {next(iter(LAYERS)): {}}
    shared = good.kind.shared if form == "core" else {}
    bad = Kind(form, good.kind.basis if shared else "", shared, dict.fromkeys(layers, shapes))
    source.told = {"good": good, "bad": AnyFormed(bad, torch.zeros(size * len(layers)))}
    write_pack(tmp_path / "p", [source], (MODEL, "tiny"))
    bank = Bank(4)
    bank.layers = dict(LAYERS)
    tenants = Tenants([Pack(tmp_path / "p", MODEL)], bank)
    with pytest.raises(AdapterError, match="the adapter of bad has a layer .*, which no batch can go through; publish it anew"):
        tenants.take("bad")
    assert tenants.take("good").version == 7 and len(bank.groups) == 1


def test_numbers_that_the_rows_cannot_hold_are_not_packed(tmp_path: Path) -> None:
    source = Formed()
    told = source.told["lora-0"]
    source.told = {"large": AnyFormed(told.kind, torch.full_like(told.numbers, 3.4e38))}
    with pytest.raises(AdapterError, match="the adapter of large holds numbers that bfloat16 cannot; pack it in fp32"):
        write_pack(tmp_path / "p", [source], (MODEL, "tiny"), torch.bfloat16)
    assert not list(tmp_path.iterdir())


def test_many_threads_read_one_pack(tmp_path: Path) -> None:
    source = Formed()
    write_pack(tmp_path / "p", [source], (MODEL, "tiny"))
    pack, wrong = Pack(tmp_path / "p", MODEL), []

    def read() -> None:
        for _ in range(50):
            wrong.extend(name for name, told in source.told.items() if not torch.equal(pack.load(name, 7).numbers, told.numbers))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("pack") / "p"
    write_pack(path, [Formed()], (MODEL, "tiny"))
    return path.read_bytes()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_pack_is_refused_by_a_sentence_or_gives_what_was_packed(
    good: bytes, tmp_path: Path, data: st.DataObject
) -> None:
    """Cut off, or some bytes changed: an adapter that loads is bit for bit the one that was packed."""
    damaged = bytearray(good[: data.draw(st.one_of(st.just(len(good)), st.integers(0, len(good))), label="length")])
    header = struct.unpack("<Q", good[:8])[0] + 8
    places = st.one_of(st.integers(0, max(len(damaged) - 1, 0)), st.integers(0, min(header, max(len(damaged) - 1, 0))))
    for place in data.draw(st.lists(places, max_size=4), label="places") if damaged else ():
        damaged[place] = data.draw(st.integers(0, 255))
    path, source, said = tmp_path / "p", Formed(), ""
    path.write_bytes(damaged)
    try:
        pack = Pack(path, MODEL)
        for name in pack.names():
            found = pack.load(name, pack.version(name))
            if name in source.told:
                assert torch.equal(found.numbers, source.told[name].numbers) and found.kind.form == source.told[name].kind.form
                Bank(4).put(found, name)
    except FedsbError as error:
        said = str(error)
    assert said.count("\n") == 0 and len(said) < 500


def forged(good: bytes, **changes: Any) -> bytes:
    """The pack with another index."""
    size = struct.unpack("<Q", good[:8])[0]
    header = json.loads(good[8 : 8 + size])
    begin, end = header["index"]["data_offsets"]
    index = json.loads(good[8 + size + begin : 8 + size + end])
    told = json.dumps({**index, **changes}).encode()
    header["index"] = {"dtype": "U8", "shape": [len(told)], "data_offsets": [begin, begin + len(told)]}
    head = json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + good[8 + size : 8 + size + begin] + told


def test_a_forged_index_is_refused(good: bytes, tmp_path: Path) -> None:
    path = tmp_path / "p"
    path.write_bytes(good)
    index = index_of(path).model_dump()
    tenant = index["tenants"]["lora-0"]
    cases = [
        ({"tenants": {"../x": tenant}}, "has no row for '../x'"),
        ({"tenants": {"x": {**tenant, "row": 99}}}, "has no row for 'x'"),
        ({"tenants": {"x": {**tenant, "kind": 99}}}, "has no row for 'x'"),
        ({"kinds": index["kinds"][:-1]}, "has no row for"),
        ({"kinds": [{**each, "basis": "f" * 64} for each in index["kinds"]]}, "rows or basis are not what its index says"),
        ({"kinds": [{**each, "shapes": each["shapes"][:-1]} for each in index["kinds"]]}, "rows or basis are not what its index"),
        ({"format": "fedsb pack 2"}, "is no whole pack"),
    ]
    for changes, said in cases:
        path.write_bytes(forged(good, **changes))
        with pytest.raises(StoreError, match=said):
            Pack(path, MODEL)
    path.write_bytes(forged(good, tenants={"x": {**tenant, "sha256": "f" * 64}}))
    with pytest.raises(AdapterError, match="the row of x is damaged; pack the stores again"):
        Pack(path, MODEL).load("x", 1)
    path.write_bytes(good)
    with pytest.raises(AdapterError, match="this server has another model"):
        Pack(path, "1" * 64)


def test_what_cannot_be_packed_leaves_nothing(shop: Shop, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "p"
    assert "is none of fp32, bf16" in complaint(capsys, "pack", str(shop.run), "--out", str(out), "--dtype", "fp8")
    assert "name a file in a folder that is there" in complaint(capsys, "pack", str(shop.run), "--out", str(tmp_path))
    core = next((shop.run / "adapters" / "client-1").glob("v*/*.safetensors"))
    core.write_bytes(core.read_bytes()[:-10])
    assert "client-1" in complaint(capsys, "pack", str(shop.run), "--out", str(out))
    shutil.rmtree(shop.run / "adapters")
    (shop.run / "adapters").mkdir()
    assert "there are no adapters to pack" in complaint(capsys, "pack", str(shop.run), "--out", str(out))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    assert "is no whole pack" in complaint(capsys, "serve", str(shop.run / "config.toml"))
