"""The bank: adapters of many tenants side by side in memory, in the forms in which one batch can use many of them at once.

    core    y = W0·x + B·R_t·A·x                     B and A are the basis, shared by all tenants on it; R_t (r, r) is one's own
    lora    y = W0·x + B_t·A_t·x                     any plain low-rank update
    flora   y = W0·x + Σ_j b_tj∘(W0·(a_tj∘x))        FLoRA (arXiv 2312.05677): a weight times a low-rank matrix, entry by entry

What a method's chain (`fedsb.adapters.method`) says decides which form an adapter takes. All numbers of an adapter lie in one
slot of its group, so that loading is one copy and unloading gives the memory back. Slot 0 of each group is zero: the base model.
"""

import functools
import mmap
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from fedsb.adapters.methods import METHODS
from fedsb.basis.frames import Basis
from fedsb.errors import AdapterError, StoreError
from fedsb.store.adapters import StoredAdapter

Form: TypeAlias = Literal["core", "lora", "flora"]
Factors: TypeAlias = dict[str, dict[str, Tensor]]  # layer → part → tensor, of one adapter
Shapes: TypeAlias = dict[str, dict[str, tuple[int, ...]]]
HEAD = "head."  # begins the names of a classification head's parameters, among the layers


class BankFull(StoreError):
    """A group that has no room for one more adapter. group: its number."""

    def __init__(self, message: str, group: int) -> None:
        super().__init__(message)
        self.group = group


@dataclass(frozen=True)
class Place:
    """Where an adapter lies in a bank."""

    group: int
    slot: int


@dataclass(frozen=True)
class Shared:
    """What all adapters of a group go through in one layer: B (out, r) and A (r, in) of a basis."""

    B: Tensor
    A: Tensor


@dataclass
class Group:
    """Adapters of one form, and of the same layers and shapes.

    Attributes:
        shared: layer → what is shared; empty unless the form is "core".
        views: layer → part → (capacity, *shape), a view of all slots.
    """

    form: Form
    shared: dict[str, Shared]
    pool: "Pool"
    views: dict[str, dict[str, Tensor]] = field(init=False)
    free: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.views = {layer: {part: self.pool.view(layer, part) for part in parts} for layer, parts in self.pool.shapes.items()}
        self.free = list(range(self.pool.capacity - 1, 0, -1))


@dataclass(frozen=True)
class Use:
    """What rows of a batch use.

    Attributes:
        take: which rows (k,), or None for all of them, in order; of a packed batch which tokens (k, L): k sequences of L tokens,
            each with its own adapter.
        slots: (k,) where the adapters are; 0 is none.
    """

    group: Group
    take: Tensor | None
    slots: Tensor


class Pool:
    """Memory for adapters of the same shapes: (capacity, stride), a slot each.

    On a CPU a slot takes memory once it is written, and gives it back when it is cleared.
    """

    def __init__(self, shapes: Shapes, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        self.shapes, self.capacity = shapes, capacity
        sizes = [((layer, part), torch.Size(shape)) for layer, parts in shapes.items() for part, shape in parts.items()]
        self._places: dict[tuple[str, str], int] = {}
        size = 0
        for key, shape in sizes:
            self._places[key] = size
            size += shape.numel()
        page = mmap.PAGESIZE // dtype.itemsize
        self.stride = -(-size // page) * page  # whole pages, so that a slot's memory is its own
        self._memory: mmap.mmap | None = None
        if device.type == "cpu":
            self._memory = mmap.mmap(-1, capacity * self.stride * dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self.numbers = torch.frombuffer(self._memory, dtype=dtype)
        else:
            self.numbers = torch.zeros(capacity * self.stride, dtype=dtype, device=device)

    def view(self, layer: str, part: str) -> Tensor:
        """One part of one layer in all slots: (capacity, *shape)."""
        shape = self.shapes[layer][part]
        inner = torch.empty(shape, device="meta").stride()
        return self.numbers.as_strided((self.capacity, *shape), (self.stride, *inner), self._places[layer, part])

    def write(self, slot: int, factors: Factors) -> None:
        """Put an adapter into a slot, by one copy."""
        flat = torch.cat([factors[layer][part].reshape(-1) for layer, part in self._places])
        self.numbers[slot * self.stride :][: len(flat)].copy_(flat)

    def clear(self, slot: int) -> None:
        """Make a slot zero again, and let its memory go."""
        begin, count = slot * self.stride, self.stride
        if self._memory is None:
            self.numbers[begin : begin + count] = 0
        else:
            size = self.numbers.element_size()
            self._memory.madvise(mmap.MADV_DONTNEED, begin * size, count * size)


class Bank:
    """Adapters by place, and which of them the rows of a batch use.

    Args:
        capacity: adapters of a group at the most; only what is there takes memory (on a CPU).
        dtype: in which adapters are held; "fp32" cores lose nothing.
    """

    def __init__(self, capacity: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> None:
        self.capacity, self.dtype, self.device = capacity, dtype, torch.device(device)
        self.layers: dict[str, tuple[int, int]] = {}  # layer → (out, in) of the model that uses it; filled in by `mixed.mix`
        self.groups: list[Group] = []
        self._keys: dict[object, int] = {}
        self._lock = threading.Lock()  # adapters may come and go while others are used
        self.batch: list[Use] = []
        self.rows = 0  # of the batch; 0: none was said, or it is packed
        self.packed = False

    def add(self, adapter: StoredAdapter, basis: Basis) -> Place:
        """Load an adapter. Raises AdapterError if it has none of the bank's forms (`form_of` says why), another basis, or layers
        that the model does not have; BankFull."""
        form, shared, factors = _formed(adapter, basis)
        for layer, sides in _sides(shared, factors).items():
            if self.layers and self.layers.get(layer) != sides:
                has = "does not have" if layer not in self.layers else f"has with {self.layers[layer]} and not {sides}"
                raise AdapterError(f"the adapter of {adapter.manifest.client} is for a layer {layer}, which this model {has}")
        shapes: Shapes = {layer: {part: tuple(t.shape) for part, t in parts.items()} for layer, parts in factors.items()}
        key = (form, basis.fingerprint if shared else "", tuple((n, *sorted(p.items())) for n, p in shapes.items()))
        flat = {layer: {part: t.to(self.dtype) for part, t in parts.items()} for layer, parts in factors.items()}
        with self._lock:
            return self._put(key, form, shared, shapes, flat)

    def _put(self, key: object, form: Form, shared: dict[str, Shared], shapes: Shapes, factors: Factors) -> Place:
        if key not in self._keys:
            held = {name: Shared(each.B.to(self.device), each.A.to(self.device)) for name, each in shared.items()}
            self.groups.append(Group(form, held, Pool(shapes, self.capacity, self.dtype, self.device)))
            self._keys[key] = len(self.groups) - 1
        number = self._keys[key]
        group = self.groups[number]
        if not group.free:
            raise BankFull(
                f"{self.capacity - 1} adapters of this form are loaded already; unload one, or make the bank larger", number
            )
        slot = group.free.pop()
        group.pool.write(slot, factors)
        return Place(number, slot)

    def remove(self, place: Place) -> None:
        """Unload an adapter; no row may use it any more."""
        group = self.groups[place.group]
        with self._lock:
            group.pool.clear(place.slot)
            group.free.append(place.slot)

    @contextmanager
    def using(self, places: Sequence[Place | None]) -> Iterator[None]:
        """While open, row i of a batch uses the adapter at places[i]; None is the base model."""
        before = self.batch, self.rows, self.packed
        chosen = list(range(len(places)))
        self.batch = [Use(*parts) for parts in self._grouped(chosen, places)]
        self.rows, self.packed = len(places), False
        try:
            yield
        finally:
            self.batch, self.rows, self.packed = before

    def pack(self, places: Sequence[Place | None], lengths: Sequence[int]) -> None:
        """From now on a batch is one row of sequences one after another, of these lengths, the i-th with the one at places[i].

        Sequences of one length go through together, so that each adapter is read once for a sequence and not for each token.
        """
        starts = [end - length for end, length in zip(accumulate(lengths), lengths, strict=True)]
        self.batch, self.rows, self.packed = [], 0, True
        for length in sorted(set(lengths)):
            chosen = [i for i, each in enumerate(lengths) if each == length]
            alone = len(chosen) == len(lengths) and length == 1  # a step in which everybody gets one token
            begins = torch.tensor([starts[i] for i in chosen], device=self.device)
            for group, rows, slots in self._grouped(chosen, places):
                some = begins if rows is None else begins[rows]
                take = some[:, None] + torch.arange(length, device=self.device)
                self.batch.append(Use(group, None if alone and rows is None else take, slots))

    def _grouped(self, chosen: Sequence[int], places: Sequence[Place | None]) -> list[tuple[Group, Tensor | None, Tensor]]:
        """Of some rows: group, which of them are its (None: all), and their slots."""
        rows: dict[int, list[int]] = {}
        for row, i in enumerate(chosen):
            if place := places[i]:
                rows.setdefault(place.group, []).append(row)
        if len(rows) == 1:  # rows of the base model go along, in slot 0
            (number,) = rows
            slots = torch.tensor([place.slot if (place := places[i]) else 0 for i in chosen], device=self.device)
            return [(self.groups[number], None, slots)]
        return [
            (
                self.groups[number],
                torch.tensor(held, device=self.device),
                torch.tensor([place.slot for row in held if (place := places[chosen[row]])], device=self.device),
            )
            for number, held in rows.items()
        ]


def form_of(method: str) -> Form | None:
    """The form that adapters of a method take; None if they have none: what they do to W0 is no short product (Bone), is none of
    weights (LoPA), has magnitudes (LoRAFusion), or lies in the weights (what is folded into them)."""
    says = METHODS[method]
    if says.chain is None or says.output is not None or says.folds or "magnitude" in says.parts:
        return None
    return "flora" if says.multiplies else "core" if says.frames == ("B", "A") else "lora"


def _sides(shared: dict[str, Shared], factors: Factors) -> dict[str, tuple[int, int]]:
    """Layer → (out, in) of what an adapter goes through."""
    found = {layer: (each.B.shape[0], each.A.shape[1]) for layer, each in shared.items()}
    return found or {n: (p["B"].shape[0], p["A"].shape[1]) for n, p in factors.items() if not n.startswith(HEAD)}


def _formed(adapter: StoredAdapter, basis: Basis) -> tuple[Form, dict[str, Shared], Factors]:
    manifest = adapter.manifest
    says, form = METHODS[manifest.method], form_of(manifest.method)
    if form is None or says.chain is None:
        raise AdapterError(f"the adapter of {manifest.client} is of {manifest.method}, which no batch of several tenants can use")
    if manifest.basis_fingerprint != basis.fingerprint:
        raise AdapterError(f"the adapter of {manifest.client} was trained on another basis; load the basis of its own run")
    cut = basis.cut(manifest.rank) if says.nested and basis.rank else basis
    shared: dict[str, Shared] = {}
    factors: Factors = {}
    for layer, parts in adapter.expanded.items():
        b, a = (side[layer].double() if layer in side else None for side in (cut.B, cut.A))
        matrices = says.chain(parts, b, a, manifest.scale)
        if form == "core":
            first, *between, last = matrices
            if first is not b or last is not a:
                raise AdapterError(f"the adapter of {manifest.client} does not go through its basis; train it again")
            core = functools.reduce(torch.matmul, between)
            room = basis.B[layer].shape[1] - core.shape[0]
            factors[layer] = {"core": torch.nn.functional.pad(core, (0, room, 0, room))}
            shared[layer] = Shared(basis.B[layer], basis.A[layer])
        else:
            *before, last = matrices
            factors[layer] = {"A": last, "B": functools.reduce(torch.matmul, before)}
    for name, tensor in adapter.head.items():
        module, _, part = name.rpartition(".")
        factors.setdefault(HEAD + module, {})[part] = tensor
    return form, shared, factors
