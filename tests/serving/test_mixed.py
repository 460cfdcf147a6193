"""Batches in which every row has a tenant of its own: against the dense sum, one tenant at a time, in any order, while others
come and go."""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedsb.adapters.lora_sb import LORA_SB
from fedsb.adapters.methods import METHODS
from fedsb.basis.frames import Basis
from fedsb.basis.spectral import random_basis
from fedsb.cli.evaluate import evaluated
from fedsb.errors import AdapterError, StoreError
from fedsb.serving.bank import Bank, Place
from fedsb.serving.forms import Known, form_of, formed
from fedsb.serving.mixed import MixedLinear, Together, mix
from fedsb.store.adapters import Manifest, ModelId, StoredAdapter
from tests.adapters.samples import llama
from tests.federation.test_methods import basis_for
from tests.federation.tiny import classification, config_of, federate, save_model, save_task, table

RANK = 3
LAYERS = {"model.layers.0.self_attn.q_proj": (32, 32), "model.layers.1.mlp.down_proj": (32, 48)}


Layers = Mapping[str, tuple[int, int]]


def adapter(method: str, basis: Basis, seed: int, rank: int = RANK, scale: float = 1.0, layers: Layers = LAYERS) -> StoredAdapter:
    """A random adapter of a method."""
    draw = torch.Generator().manual_seed(seed)
    state = {}
    for layer, (out, in_) in layers.items():
        sizes = {"r": rank, "in": in_, "out": out, "h": 2}
        for part, letters in METHODS[method].parts.items():
            state[f"{layer}.{part}"] = 0.3 * torch.randn([sizes[letter] for letter in letters], generator=draw)
    manifest = Manifest(
        client=f"tenant-{seed}",
        version=1,
        base_model=ModelId(name="x", sha256=""),
        method=method,
        rank=rank,
        scale=scale,
        basis_fingerprint=basis.fingerprint,
        shapes={},
        dtypes={},
        sha256="",
        round=1,
        task="t",
        created="",
    )
    return StoredAdapter(state, manifest)


def basis_of(method: str, seed: int = 0, layers: Layers = LAYERS) -> Basis:
    rank = RANK * (2 if METHODS[method].heads else 1)
    return random_basis(layers, rank, seed) if METHODS[method].frames == ("B", "A") else Basis({}, {}, {})


def dense(model: Any, stored: StoredAdapter, basis: Basis) -> Any:
    """The model with the adapter's update in its weights."""
    says = METHODS[stored.manifest.method]
    with torch.no_grad():
        for layer, parts in stored.expanded.items():
            b, a = (side[layer].double() if layer in side else None for side in (basis.B, basis.A))
            weight = model.get_submodule(layer).weight
            weight += says.update(parts, b, a, stored.manifest.scale, weight.double()).to(weight.dtype)
    return model


TOKENS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12], [5, 6, 7, 8], [3, 3, 9, 4]])


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(tokens).logits
    return found


@pytest.mark.parametrize("method", ["lora-sb", "ravan", "lora", "dylora", "flora", "flora-ones"])
def test_each_row_has_the_update_of_its_own_tenant(method: str) -> None:
    basis = basis_of(method)
    tenants = [adapter(method, basis, seed, scale=1.5 if method == "lora" else 1.0) for seed in range(2)]
    bank = Bank(4)
    model = mix(llama(), bank)
    one, two = (bank.add(tenant, basis) for tenant in tenants)
    plain = logits(llama(), TOKENS)
    wanted = [logits(dense(llama(), tenant, basis), TOKENS) for tenant in tenants]
    with bank.using([two, None, one, one]):
        found = logits(model, TOKENS)
    for row, from_ in enumerate((wanted[1], plain, wanted[0], wanted[0])):
        torch.testing.assert_close(found[row], from_[row], rtol=1e-4, atol=1e-4)
    assert (wanted[0] - plain).abs().max() > 0.01 and (found[0] - found[2]).abs().max() > 0.01
    base = logits(mix(llama(), Bank(2)), TOKENS)
    torch.testing.assert_close(base, plain, rtol=1e-5, atol=1e-5)  # one product for q, k and v rounds otherwise
    assert torch.equal(logits(model, TOKENS), base)  # where nobody is said to use anything
    with bank.using([None] * 4):
        assert torch.equal(logits(model, TOKENS), base)


def test_tenants_of_unlike_methods_bases_and_ranks_share_a_batch() -> None:
    first, other, none = basis_of("lora-sb"), basis_of("lora-sb", 1), basis_of("lora")
    told = [
        (adapter("lora-sb", first, 0), first),
        (adapter("lora-sb", other, 1), other),
        (adapter("lora", none, 2), none),
        (adapter("flora", none, 3, rank=2), none),
    ]
    bank = Bank(3)
    model = mix(llama(), bank)
    places: list[Place | None] = [bank.add(*each) for each in told]
    assert len({place.group for place in places if place}) == 4
    tokens = TOKENS[[0, 0, 0, 0, 0]]
    with bank.using([*places, None]):
        found = logits(model, tokens)
    wanted = [logits(dense(llama(), *each), tokens[:1])[0] for each in told]
    for row, each in enumerate([*wanted, logits(llama(), tokens[:1])[0]]):
        torch.testing.assert_close(found[row], each, rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=7), st.randoms(use_true_random=False))
def test_a_row_does_not_depend_on_its_neighbours_nor_on_their_order(chosen: list[int], random: Any) -> None:
    model, bank, places, _ = SHARED
    tokens = torch.tensor([[5 + i, 6, 7] for i in chosen])
    with bank.using([places[i] for i in chosen]):
        together = logits(model, tokens)
    order = list(range(len(chosen)))
    random.shuffle(order)
    with bank.using([places[chosen[i]] for i in order]):
        shuffled = logits(model, tokens[order])
    torch.testing.assert_close(shuffled, together[order], rtol=1e-5, atol=1e-5)
    for row, i in enumerate(chosen):
        with bank.using([places[i]]):
            torch.testing.assert_close(logits(model, tokens[row : row + 1])[0], together[row], rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=10)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=6))
def test_greedy_tokens_of_a_mixed_batch_are_each_tenants_own(chosen: list[int]) -> None:
    """Prompts of unlike length, padded on the left, and the same prompt for several tenants."""
    model, bank, places, _ = SHARED
    prompts = [[7, 8, 9][: 1 + i % 3] for i in chosen]
    tokens = torch.tensor([[0] * (3 - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (3 - len(p)) + [1] * len(p) for p in prompts])
    with bank.using([places[i] for i in chosen]):
        together = model.generate(tokens, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    for row, i in enumerate(chosen):
        with bank.using([places[i]]):
            alone = model.generate(
                torch.tensor([prompts[row]]),
                attention_mask=torch.ones(1, len(prompts[row]), dtype=torch.int64),
                max_new_tokens=6,
                do_sample=False,
                pad_token_id=0,
            )
        assert together[row, 3:].tolist() == alone[0, len(prompts[row]) :].tolist()


def _shared() -> tuple[Any, Bank, list[Place | None], Sequence[StoredAdapter]]:
    """A model with five tenants of three forms, and none."""
    basis, none = basis_of("lora-sb"), basis_of("lora")
    told = [adapter("lora-sb", basis, i) for i in range(3)]
    others = [adapter("lora", none, 7), adapter("flora", none, 8)]
    bank = Bank(5)
    model = mix(llama(), bank)
    return model, bank, [None, *(bank.add(t, basis) for t in told), *(bank.add(t, none) for t in others)], told


SHARED = _shared()


def test_what_comes_and_goes_changes_nobody_else() -> None:
    basis = basis_of("lora-sb")
    bank = Bank(4)
    model = mix(llama(), bank)
    kept, gone = (bank.add(adapter("lora-sb", basis, seed), basis) for seed in (1, 2))
    with bank.using([kept]):
        before = logits(model, TOKENS[:1])
    bank.remove(gone)
    new = bank.add(adapter("lora-sb", basis, 3), basis)
    assert new == gone  # its slot is free again
    with bank.using([kept, new]):
        found = logits(model, TOKENS[:2])
    torch.testing.assert_close(found[:1], before, rtol=1e-5, atol=1e-5)
    wanted = logits(dense(llama(), adapter("lora-sb", basis, 3), basis), TOKENS[1:2])
    torch.testing.assert_close(found[1:], wanted, rtol=1e-4, atol=1e-4)
    bank.remove(new)
    with bank.using([new]):
        assert torch.equal(
            logits(model, TOKENS[:1]), logits(mix(llama(), Bank(2)), TOKENS[:1])
        )  # an empty slot is the base model


def test_a_step_of_one_token_each_finds_everything_where_it_was() -> None:
    """Whoever takes part, up to the most that ever did: a captured graph knows addresses. Two groups, so that there is `take`."""
    bases = [basis_of("lora-sb", seed) for seed in (0, 1)]
    bank = Bank(8)
    mix(llama(), bank)
    first, second = (
        [bank.add(adapter("lora-sb", basis, 10 * i + seed), basis) for seed in (1, 2, 3)] for i, basis in enumerate(bases)
    )
    layer = (next(iter(LAYERS)),)

    def step(places: list[Place]) -> list[tuple[int, ...]]:
        bank.pack(places, [1] * len(places))
        for use in bank.batch:
            mine = [place for place in places if bank.groups[place.group] is use.group]
            wanted = use.group.views[layer[0]]["core"][[place.slot for place in mine]]
            assert torch.equal(use.cores(layer)[0], wanted.float().mT)
            assert use.take is not None and use.take.tolist() == [i for i, place in enumerate(places) if place in mine]
        ordered = sorted(bank.batch, key=lambda use: bank.groups.index(use.group))
        return [
            (use.slots.data_ptr(), use.take.data_ptr(), use.cores(layer)[0].data_ptr()) for use in ordered if use.take is not None
        ]

    before = step([*first, *second])
    for places in ([first[2], second[0], first[1]], [second[1], first[0]], [*second, *first]):
        assert step(places) == before


def resident() -> int:
    """Bytes of anonymous memory of this process."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Anonymous:"))


def test_memory_is_taken_by_what_is_there_and_given_back() -> None:
    shape = {"x": (512, 512)}  # a core of 1 MiB
    basis = random_basis(shape, 512, 0)
    state = {"x.core": torch.ones(512, 512)}
    manifest = adapter("lora-sb", basis, 0).manifest.model_copy(update={"rank": 512})
    before = resident()
    bank = Bank(10_000)
    places = [bank.add(StoredAdapter(state, manifest), basis) for _ in range(64)]
    full = resident() - before
    assert 64 << 20 <= full < 100 << 20
    for place in places:
        bank.remove(place)
    assert resident() - before < full - (60 << 20)


@pytest.mark.parametrize("method", ["lora-sb", "lora-xs", "nested-sb", "ravan", "refreshed-sb", "lora", "dylora", "flora"])
@pytest.mark.parametrize("order", [1, -1])
def test_the_next_adapter_that_is_alike_has_the_same_form(method: str, order: int) -> None:
    """Whether or not others were formed before it: also of another scale or rank, and with layers in another order."""
    known: Known = {}
    bases = [basis_of(method, seed) for seed in (0, 1)]
    for seed, (basis, scale, rank) in enumerate(itertools.product(bases, (1.0, 0.5), (RANK, RANK, RANK - 1))):
        stored = adapter(method, basis, seed, rank, scale, dict(list(LAYERS.items())[::order]))
        shapes = {name: tuple(tensor.shape) for name, tensor in stored.state.items()}
        stored = StoredAdapter(stored.state, stored.manifest.model_copy(update={"shapes": shapes}))
        try:
            wanted = formed(stored, basis)
        except (RuntimeError, AdapterError) as error:  # another rank where the method has no such
            with pytest.raises(type(error)):
                formed(stored, basis, known)
            continue
        for found in (formed(stored, basis, known), formed(stored, basis, known)):
            assert torch.equal(found.numbers, wanted.numbers)
            assert (found.kind.key, found.kind.shared) == (wanted.kind.key, wanted.kind.shared)
    assert bool(known) == (form_of(method) == "core" and METHODS[method].chain is LORA_SB.chain and order == 1)


def test_a_full_bank_and_what_does_not_belong_are_refused() -> None:
    basis = basis_of("lora-sb")
    bank = Bank(2)
    bank.add(adapter("lora-sb", basis, 0), basis)
    with pytest.raises(StoreError, match="1 adapters of this form are loaded already; unload one, or make the bank larger"):
        bank.add(adapter("lora-sb", basis, 1), basis)
    with pytest.raises(AdapterError, match="tenant-0 was trained on another basis"):
        bank.add(adapter("lora-sb", basis, 0), basis_of("lora-sb", 1))
    with pytest.raises(AdapterError, match="is of bone, which no batch of several tenants can use"):
        stored = adapter("lora", basis_of("lora"), 0)
        bank.add(StoredAdapter(stored.state, stored.manifest.model_copy(update={"method": "bone"})), basis_of("lora"))


def test_a_batch_of_other_rows_is_a_mistake() -> None:
    bank = Bank(2)
    layer = MixedLinear(Together({"x": nn.Linear(2, 2)}, bank), "x")
    with bank.using([None, None]), pytest.raises(ValueError, match="layer x got 3 rows in a batch of 2"):
        layer(torch.zeros(3, 2))


def test_layers_that_are_not_given_the_same_go_apart() -> None:
    """As in cross attention, where q sees the decoder, and k and v the encoder."""
    torch.manual_seed(0)
    plain = {name: nn.Linear(6, out, bias=name != "k_proj") for name, out in (("q_proj", 4), ("k_proj", 2), ("v_proj", 2))}
    one, other = torch.randn(2, 3, 6), torch.randn(2, 5, 6)
    with torch.no_grad():
        wanted = [plain["q_proj"](one), plain["k_proj"](other), plain["v_proj"](other)]
        together = Together(plain, Bank(2))
        for _ in range(3):
            found = [together("q_proj", one), together("k_proj", other), together("v_proj", other)]
            for here, there in zip(found, wanted, strict=True):
                torch.testing.assert_close(here, there)
        assert together._apart


def test_every_method_has_a_form_or_a_reason() -> None:
    without = {method for method in METHODS if form_of(method) is None}
    assert without == {"bone", "bone-row", "lopa", "lora-ga", "fedex-lora", "flora-stacking", "galore"}


@pytest.mark.parametrize("kind", ["causal", "classification"])
@pytest.mark.parametrize("method", [method for method in METHODS if form_of(method)])
def test_a_run_is_scored_in_mixed_batches_as_one_at_a_time(method: str, kind: str, tmp_path: Path) -> None:
    source, task = save_model(tmp_path / "model", kind), save_task(tmp_path / "task", kind)
    sections: dict[str, Any] = {"train": {"learning_rate": 0.05}, "adapter": {"method": method}, **basis_for(method, task)}
    content = (table if kind == "causal" else classification)(source, task, **sections)
    federate(config_of({**content, "federation": {"clients": 3, "rounds": 2}}), tmp_path / "run")
    mixed, plain = evaluated(tmp_path / "run"), evaluated(tmp_path / "run", sequential=True)
    assert mixed.how == "9 adapters in mixed batches" and plain.how == "one adapter at a time"
    assert mixed.rows == plain.rows == 3 * 9
    for which, scores in plain.scores.items():
        for client, score in scores.items():
            other = mixed.scores[which][client]
            assert other["loss"] == pytest.approx(score["loss"], rel=1e-4, abs=1e-5)
            assert {k: v for k, v in other.items() if k != "loss"} == {k: v for k, v in score.items() if k != "loss"}
    assert json.dumps(mixed.scores)
