"""Tenants: loaded when asked for, newest version, kept while used, never more than there is room for."""

import shutil
import threading
from pathlib import Path

import pytest
import torch

from fedsb.errors import AdapterError, BasisError, StoreError
from fedsb.models import device_of, load_model, locate
from fedsb.sections import ModelSection
from fedsb.serving.bank import Bank, BankFull
from fedsb.serving.mixed import mix
from fedsb.serving.sources import source_of
from fedsb.serving.tenants import Tenants
from fedsb.store import adapters
from tests.federation.tiny import config_of, federate, save_model, save_task, table

TOKENS = torch.tensor([[5, 6, 7]])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of three clients, and its base model."""
    folder = tmp_path_factory.mktemp("serving")
    source, task = save_model(folder / "model"), save_task(folder / "task")
    federate(config_of(table(source, task, train={"learning_rate": 0.05}, personal={"steps": 4})), folder / "run")
    return folder / "run", source


class Shop:
    """Tenants of a copy of the run, with the model that they use."""

    def __init__(self, run: Path, source: str, capacity: int = 8) -> None:
        self.run, self.bank = run, Bank(capacity)
        self.source = locate(source)
        base = load_model(self.source, ModelSection.model_validate({"dtype": "fp32"}), None, device_of("cpu"))
        self.model = mix(base, self.bank)
        self.tenants = Tenants([source_of(run, self.source.sha256, self.bank.layers)], self.bank)

    def logits(self, lease: object) -> torch.Tensor:
        """What the model says with a lease's adapter."""
        with self.bank.using([lease.place]), torch.no_grad():  # type: ignore[attr-defined]
            found: torch.Tensor = self.model(TOKENS).logits
        return found

    def publish(self, name: str, factor: float) -> int:
        """A new version: the old one times a factor."""
        store = self.run / "adapters"
        old = adapters.load(store, name)
        return adapters.publish(
            store,
            name,
            {part: factor * tensor for part, tensor in old.state.items()},
            base_model=old.manifest.base_model,
            method=old.manifest.method,
            rank=old.manifest.rank,
            basis_fingerprint=old.manifest.basis_fingerprint,
            round=old.manifest.round,
            task=old.manifest.task,
        )


@pytest.fixture
def shop(finished: tuple[Path, str], tmp_path: Path) -> Shop:
    shutil.copytree(finished[0], tmp_path / "run")
    return Shop(tmp_path / "run", finished[1])


def test_a_tenant_is_loaded_when_it_is_asked_for(shop: Shop) -> None:
    assert shop.tenants.names() == ["client-0", "client-1", "client-2"] and shop.tenants.loaded == 0
    leases = [shop.tenants.take(name) for name in ("client-0", "client-1", "client-0")]
    assert shop.tenants.loaded == 2 and leases[0].place == leases[2].place
    one, other = shop.logits(leases[0]), shop.logits(leases[1])
    with torch.no_grad():
        base = shop.model(TOKENS).logits
    assert not torch.allclose(one, other) and not torch.allclose(one, base)
    for lease in leases:
        shop.tenants.give_back(lease)
    assert shop.tenants.loaded == 2  # for the next one


def test_a_request_ends_on_the_version_it_began_with(shop: Shop) -> None:
    first = shop.tenants.take("client-0")
    before = shop.logits(first)
    assert shop.publish("client-0", 2.0) == 2
    second = shop.tenants.take("client-0")
    assert (first.version, second.version) == (1, 2) and first.place != second.place
    assert torch.equal(shop.logits(first), before) and not torch.allclose(shop.logits(second), before)
    free = len(shop.bank.groups[0].free)
    shop.tenants.give_back(first)
    assert len(shop.bank.groups[0].free) == free + 1  # nobody uses the old one any more
    shop.tenants.give_back(second)
    assert len(shop.bank.groups[0].free) == free + 1 and shop.tenants.take("client-0").place == second.place


def test_unloading_hides_a_tenant_and_frees_it_when_it_is_done(shop: Shop) -> None:
    lease = shop.tenants.take("client-1")
    before = shop.logits(lease)
    assert shop.tenants.unload("client-1") and not shop.tenants.unload("client-1") and not shop.tenants.unload("nobody")
    assert shop.tenants.names() == ["client-0", "client-2"] and not shop.tenants.has("client-1")
    with pytest.raises(StoreError, match="there is no adapter of client-1"):
        shop.tenants.take("client-1")
    assert torch.equal(shop.logits(lease), before)
    shop.tenants.give_back(lease)
    assert len(shop.bank.groups[0].free) == 7
    assert shop.tenants.load("client-1") == 1 and shop.tenants.has("client-1")


def test_the_one_used_longest_ago_makes_room(shop: Shop, finished: tuple[Path, str]) -> None:
    small = Shop(shop.run, finished[1], capacity=3)  # two of them
    zero, one = small.tenants.take("client-0"), small.tenants.take("client-1")
    with pytest.raises(BankFull, match="2 adapters of this form are loaded already"):
        small.tenants.take("client-2")
    small.tenants.give_back(zero)
    two = small.tenants.take("client-2")
    assert two.place == zero.place and small.tenants.loaded == 2
    small.tenants.give_back(one)
    small.tenants.give_back(two)
    again = small.tenants.take("client-0")
    assert again.place == one.place  # client-1 was asked for before client-2


def test_from_several_threads(shop: Shop) -> None:
    wrong: list[str] = []
    wanted = {name: shop.tenants.take(name) for name in shop.tenants.names()}
    versions = {name: lease.version for name, lease in wanted.items()}

    def ask(name: str) -> None:
        for _ in range(50):
            lease = shop.tenants.take(name)
            if lease.version < versions[name] or (lease.held.stale and not lease.held.users):
                wrong.append(name)
            shop.tenants.give_back(lease)

    def renew() -> None:
        for factor in (1.1, 0.9, 1.2):
            shop.publish("client-0", factor)

    threads = [threading.Thread(target=ask, args=(name,)) for name in wanted for _ in range(2)] + [threading.Thread(target=renew)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for lease in wanted.values():
        shop.tenants.give_back(lease)
    assert not wrong and shop.tenants.take("client-0").version == 4
    assert len(shop.bank.groups[0].free) == 7 - 3


@pytest.mark.parametrize("name", ["../run", "nobody", "", "a/b", ".", "client-0/v0001", "CLIENT-0"])
def test_names_that_are_none_are_not_there(shop: Shop, name: str) -> None:
    assert not shop.tenants.has(name) and not shop.tenants.unload(name)
    with pytest.raises(StoreError, match="there is no adapter of"):
        shop.tenants.take(name)


def test_what_is_not_for_this_model_or_torn_is_refused(shop: Shop, finished: tuple[Path, str]) -> None:
    other = Tenants([source_of(shop.run, "0" * 64, shop.bank.layers)], shop.bank)
    with pytest.raises(AdapterError, match=r"client-0 was trained on .*, and this server has another model \(000000000000\)"):
        other.take("client-0")
    layers = shop.bank.layers
    for first, said in ((None, "does not have"), ((32, 8), r"has with \(32, 8\) and not \(32, 32\)")):
        shop.bank.layers = {**layers, "model.layers.0.self_attn.q_proj": first} if first else dict(list(layers.items())[1:])
        with pytest.raises(AdapterError, match=f"is for a layer model.layers.0.self_attn.q_proj, which this model {said}"):
            shop.tenants.take("client-0")
    shop.bank.layers = layers
    core = shop.run / "adapters" / "client-1" / "v0001" / adapters.CORE_FILE
    data = bytearray(core.read_bytes())
    data[-1] ^= 1
    core.write_bytes(data)
    kept = shop.tenants.take("client-0")
    with pytest.raises(AdapterError, match="is not what was published"):
        shop.tenants.take("client-1")
    shutil.rmtree(shop.run / "basis")
    assert shop.tenants.take("client-2").version == 1  # of a basis that is at hand
    alone = Tenants([source_of(shop.run, shop.source.sha256, shop.bank.layers)], shop.bank)
    with pytest.raises((StoreError, BasisError), match="this run has no such basis"):
        alone.take("client-0")
    assert shop.tenants.loaded == 2 and kept.version == 1


def test_links_in_a_store_are_not_followed(shop: Shop, tmp_path: Path) -> None:
    store = shop.run / "adapters"
    (store / "client-1").rename(tmp_path / "outside")
    (store / "client-1").symlink_to(tmp_path / "outside")
    core = store / "client-2" / "v0001" / adapters.CORE_FILE
    core.rename(tmp_path / "core")
    core.symlink_to(tmp_path / "core")
    assert shop.tenants.names() == ["client-0", "client-2"] and not shop.tenants.has("client-1")
    with pytest.raises(StoreError, match="there is no adapter of client-1"):
        shop.tenants.take("client-1")
    with pytest.raises(AdapterError, match="version 1 has a link, or a file is none; publish client-2 anew"):
        shop.tenants.take("client-2")
    assert shop.tenants.take("client-0").version == 1
