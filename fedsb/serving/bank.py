"""The bank: adapters of many tenants side by side in memory, and which of them each row of a batch uses.

Adapters of one form (`fedsb.serving.forms`), and of the same basis, layers and shapes, are a group, each in a slot of its own.
Slot 0 of each group is zero: the base model.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from fedsb.basis.frames import Basis
from fedsb.errors import AdapterError, StoreError
from fedsb.serving.forms import Form, Formed, Kind, Shared, formed, misfit
from fedsb.serving.pool import Pool
from fedsb.store.adapters import StoredAdapter


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
class Stack:
    """Of layers that are given the same input, those that a group of cores adapts, g of them, side by side.

    Attributes:
        A: (g·r, in), one layer's rows after another's.
        B: (outputs of all the layers, g·r), each layer's B beside zeros.
    """

    layers: tuple[str, ...]
    A: Tensor
    B: Tensor
    _wide: dict[torch.dtype, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def wide(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A and Bᵀ, in the wider dtype of the two."""
        if dtype not in self._wide:
            wide = torch.promote_types(dtype, self.A.dtype)
            self._wide[dtype] = self.A.to(wide), self.B.to(wide).mT
        return self._wide[dtype]


class Buffers:
    """Memory that is used again, so that what each step is given lies where it lay in the step before, as a captured graph of a
    GPU would need it (none is captured so far). Addresses change only when more rows are asked for than ever before."""

    def __init__(self) -> None:
        self._held: dict[object, Tensor] = {}

    def rows(self, name: object, count: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """(count, *shape), with whatever was in it; of one name always the same memory."""
        held = self._held.get(name)
        if held is None or len(held) < count:
            held = self._held[name] = torch.empty(count, *shape, dtype=dtype, device=device)
        return held[:count]

    def put(self, name: object, values: Tensor) -> Tensor:
        """A copy of values (n, …)."""
        return self.rows(name, len(values), values.shape[1:], values.dtype, values.device).copy_(values)


class Group:
    """Adapters of one form, and of the same layers and shapes.

    Attributes:
        shared: layer → what is shared; empty unless the form is "core".
        views: layer → part → (capacity, *shape), a view of all slots.
    """

    def __init__(self, form: Form, shared: dict[str, Shared], pool: Pool) -> None:
        self.form, self.pool = form, pool
        self.shared = {name: Shared(*(side.to(pool.numbers) for side in (each.B, each.A))) for name, each in shared.items()}
        self.views = {layer: {part: pool.view(layer, part) for part in parts} for layer, parts in pool.shapes.items()}
        self.free = list(range(pool.capacity - 1, 0, -1))
        self.buffers = Buffers()  # of steps in which each sequence gets one token
        self._stacks: dict[tuple[str, ...], Stack | None] = {}

    def stack(self, layers: tuple[str, ...], outs: Sequence[int]) -> Stack | None:
        """Of layers with so many outputs, which are given the same input; None if the group adapts none of them."""
        if layers not in self._stacks:
            mine = [layer for layer in layers if layer in self.shared]
            blocks = [
                self.shared[layer].B if layer in self.shared else self.pool.numbers.new_empty(out, 0)
                for layer, out in zip(layers, outs, strict=True)
            ]
            a = torch.cat([self.shared[layer].A for layer in mine]) if mine else None
            self._stacks[layers] = None if a is None else Stack(tuple(mine), a, torch.block_diag(*blocks))
        return self._stacks[layers]


@dataclass(frozen=True)
class Span:
    """Sequences of one length that go through their adapters together. take: (k, L) which tokens of their Use; None: all of them,
    in order, k sequences. slots: (k,) where their adapters are; 0 is none."""

    take: Tensor | None
    slots: Tensor


class Use:
    """What rows of a batch, or tokens of a packed one, use: adapters of one group.

    Attributes:
        take: (m,) which rows or tokens; None: all of them, in order.
        slots: (k,) where the adapters of the rows are; of a packed batch of its sequences.
        again: whether the group's buffers are used, which the next step that does so writes over.
    """

    def __init__(self, group: Group, take: Tensor | None, slots: Tensor, spans: Sequence[Span], again: bool = False) -> None:
        self.group, self.take, self.slots, self.spans, self.again = group, take, slots, spans, again
        self._cores: dict[tuple[str, ...], list[Tensor]] = {}

    def cores(self, layers: tuple[str, ...]) -> list[Tensor]:
        """Of g layers, for each span: (k·g, r, r) fp32, transposed. Gathered once, however many steps use them."""
        if layers not in self._cores:
            self._cores[layers] = [self._gathered(layers, span.slots).flatten(0, 1).mT for span in self.spans]
        return self._cores[layers]

    def _gathered(self, layers: tuple[str, ...], slots: Tensor) -> Tensor:
        """(k, g, r, r) fp32."""
        views = [self.group.views[layer]["core"] for layer in layers]
        buffers, shape = self.group.buffers if self.again else Buffers(), (len(views), *views[0].shape[1:])
        found = buffers.rows(layers, len(slots), shape, torch.float32, slots.device)
        for i, view in enumerate(views):
            found[:, i] = view[slots]
        return found

    def through(self, h: Tensor, layers: tuple[str, ...]) -> Tensor:
        """R·h of g layers: tokens that use it (m, g·r) fp32 → the same. Each core is read once, however many tokens its sequence
        has."""
        g, cores = len(layers), self.cores(layers)
        if self.spans[0].take is None:
            return _through(h, cores[0], g, len(self.slots))
        found = torch.empty_like(h)
        for span, each in zip(self.spans, cores, strict=True):
            assert span.take is not None
            flat = span.take.flatten()
            found[flat] = _through(h[flat], each, g, len(span.slots))
        return found


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
        self._changes = 0
        self._packed: object = None  # what `pack` was told last
        self.batch: Sequence[Use] = []
        self.rows = 0  # of the batch; 0: none was said, or it is packed
        self.packed = False

    def add(self, adapter: StoredAdapter, basis: Basis) -> Place:
        """Load an adapter. Raises AdapterError if it has none of the bank's forms, another basis, or layers that the model does
        not have; BankFull."""
        return self.put(formed(adapter, basis), adapter.manifest.client)

    def put(self, told: Formed, name: str) -> Place:
        """Load an adapter that is in its form; name: its tenant. Raises as `add`."""
        kind = told.kind
        with self._lock:
            if kind.key not in self._keys:
                self._require(kind, name)
                pool = Pool(kind.shapes, self.capacity, self.dtype, self.device)
                self.groups.append(Group(kind.form, kind.shared, pool))
                self._keys[kind.key] = len(self.groups) - 1
            return self._put(told, self._keys[kind.key])

    @property
    def taken(self) -> int:
        """Slots that hold an adapter."""
        return sum(self.capacity - 1 - len(group.free) for group in self.groups)

    def _require(self, kind: Kind, client: str) -> None:
        if wrong := misfit(kind):
            raise AdapterError(f"the adapter of {client} has a layer {wrong}, which no batch can go through; publish it anew")
        for layer, sides in kind.sides.items():
            if self.layers and self.layers.get(layer) != sides:
                has = "does not have" if layer not in self.layers else f"has with {self.layers[layer]} and not {sides}"
                raise AdapterError(f"the adapter of {client} is for a layer {layer}, which this model {has}")

    def _put(self, told: Formed, number: int) -> Place:
        group = self.groups[number]
        if not group.free:
            raise BankFull(
                f"{self.capacity - 1} adapters of this form are loaded already; unload one, or make the bank larger", number
            )
        slot = group.free.pop()
        group.pool.write(slot, told.numbers)
        self._changes += 1
        return Place(number, slot)

    def remove(self, place: Place) -> None:
        """Unload an adapter; no row may use it any more."""
        group = self.groups[place.group]
        with self._lock:
            group.pool.clear(place.slot)
            group.free.append(place.slot)
            if len(group.free) == group.pool.capacity - 1:
                group.buffers = Buffers()  # which take rows · layers · r² numbers, and nobody of the group is left
            self._changes += 1

    @contextmanager
    def using(self, places: Sequence[Place | None]) -> Iterator[None]:
        """While open, row i of a batch uses the adapter at places[i]; None is the base model."""
        before = self.batch, self.rows, self.packed
        self.batch = [Use(group, rows, slots, [Span(None, slots)]) for group, rows, slots in self._grouped(places)]
        self.rows, self.packed = len(places), False
        try:
            yield
        finally:
            self.batch, self.rows, self.packed = before

    def pack(self, places: Sequence[Place | None], lengths: Sequence[int]) -> None:
        """From now on a batch is one row of sequences one after another, of these lengths, the i-th with the one at places[i].

        Sequences of one length go through together, so that each adapter is read once for a sequence and not for each token.
        A step that is like the one before takes what was gathered for that.
        """
        told = (tuple(places), tuple(lengths), self._changes)
        if told == self._packed and self.packed:
            return
        starts = [end - length for end, length in zip(accumulate(lengths), lengths, strict=True)]
        self.batch, self.rows, self.packed, self._packed = [], 0, True, told
        uses = []
        for group, rows, slots in self._grouped(places):
            held = list(range(len(places))) if rows is None else rows.tolist()
            if all(lengths[i] == 1 for i in held):  # a step in which each of them gets one token
                first = None if rows is None else torch.tensor([starts[i] for i in held], device=self.device)
                take = None if first is None else group.buffers.put("take", first)
                slots = group.buffers.put("slots", slots)
                uses.append(Use(group, take, slots, [Span(None, slots)], again=True))
                continue
            tokens = torch.cat([torch.arange(starts[i], starts[i] + lengths[i]) for i in held]).to(self.device)
            begins = [end - lengths[i] for end, i in zip(accumulate(lengths[i] for i in held), held, strict=True)]
            spans = []
            for length in sorted({lengths[i] for i in held}):
                some = [n for n, i in enumerate(held) if lengths[i] == length]
                first = torch.tensor([begins[n] for n in some], device=self.device)
                spans.append(Span(first[:, None] + torch.arange(length, device=self.device), slots[some]))
            uses.append(Use(group, None if rows is None else tokens, slots, spans))
        self.batch = uses

    def _grouped(self, places: Sequence[Place | None]) -> list[tuple[Group, Tensor | None, Tensor]]:
        """Group, which rows are its (None: all), and their slots."""
        rows: dict[int, list[int]] = {}
        for row, place in enumerate(places):
            if place:
                rows.setdefault(place.group, []).append(row)
        found: list[tuple[Group, Tensor | None, Tensor]] = []
        for number, held in rows.items():
            chosen = range(len(places)) if len(rows) == 1 else held  # rows of the base model go along, in slot 0
            slots = torch.tensor([place.slot if (place := places[row]) else 0 for row in chosen], device=self.device)
            found.append((self.groups[number], None if len(rows) == 1 else torch.tensor(held, device=self.device), slots))
        return found


def _through(h: Tensor, cores: Tensor, g: int, k: int) -> Tensor:
    """R_i·h of each of g layers, for each token h of sequence i: h (k·L, g·r), cores (k·g, r, r) → (k·L, g·r)."""
    n, width = h.shape
    if n == k:
        return torch.bmm(h.view(k * g, 1, width // g), cores).view(n, width)
    by_core = h.view(k, n // k, g, width // g).transpose(1, 2).reshape(k * g, n // k, width // g)
    return torch.bmm(by_core, cores).view(k, g, n // k, width // g).transpose(1, 2).reshape(n, width)
