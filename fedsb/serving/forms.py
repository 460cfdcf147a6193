"""The forms in which one batch can use adapters of many tenants at once.

    core    y = W0·x + B·R_t·A·x                     B and A are the basis, shared by all tenants on it; R_t (r, r) is one's own
    lora    y = W0·x + B_t·A_t·x                     any plain low-rank update
    flora   y = W0·x + Σ_j b_tj∘(W0·(a_tj∘x))        FLoRA (arXiv 2312.05677): a weight times a low-rank matrix, entry by entry

What a method's chain (`fedsb.adapters.method`) says decides which form an adapter takes.
"""

import functools
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from fedsb.adapters.methods import METHODS
from fedsb.basis.frames import Basis
from fedsb.errors import AdapterError
from fedsb.store.adapters import StoredAdapter

Form: TypeAlias = Literal["core", "lora", "flora"]
Factors: TypeAlias = dict[str, dict[str, Tensor]]  # layer → part → tensor, of one adapter
Shapes: TypeAlias = dict[str, dict[str, tuple[int, ...]]]
HEAD = "head."  # begins the names of a classification head's parameters, among the layers


@dataclass(frozen=True)
class Shared:
    """What all adapters of a group go through in one layer: B (out, r) and A (r, in) of a basis."""

    B: Tensor
    A: Tensor


@dataclass(frozen=True)
class Kind:
    """What adapters have in common that lie side by side.

    Attributes:
        basis: fingerprint of what is shared; "" if nothing is.
        shared: layer → what is shared; empty unless the form is "core".
        shapes: layer → part → shape, in order of name.
    """

    form: Form
    basis: str
    shared: dict[str, Shared]
    shapes: Shapes

    @cached_property
    def key(self) -> object:
        """Equal of two that are the same."""
        return self.form, self.basis, tuple((layer, *parts.items()) for layer, parts in self.shapes.items())

    @cached_property
    def size(self) -> int:
        """Numbers of an adapter."""
        return sum(math.prod(shape) for parts in self.shapes.values() for shape in parts.values())

    @property
    def sides(self) -> dict[str, tuple[int, int]]:
        """Layer → (out, in) of what it goes through."""
        found = {layer: (each.B.shape[0], each.A.shape[1]) for layer, each in self.shared.items()}
        return found or {n: (p["B"][0], p["A"][1]) for n, p in self.shapes.items() if not n.startswith(HEAD)}


def misfit(kind: Kind) -> str:
    """The first layer whose parts do not go together, in words; "" if all do, so that a batch can go through them."""
    for layer, parts in kind.shapes.items():
        if layer.startswith(HEAD):
            continue
        told = ", ".join(f"{part} {tuple(shape)}" for part, shape in parts.items())
        if kind.form == "core":
            shared = kind.shared.get(layer)
            fits = shared is not None and parts == {"core": (shared.B.shape[1], shared.A.shape[0])}
        else:
            flat = parts.keys() == {"A", "B"} and all(len(shape) == 2 for shape in parts.values())
            fits = flat and parts["A"][0] == parts["B"][1]
        if not fits or any(not length > 0 for shape in parts.values() for length in shape):
            return f"{layer} with {told}"
    return ""


@dataclass(frozen=True)
class Formed:
    """An adapter in its form. numbers: (size,), all parts one after another, in the order of the kind's shapes."""

    kind: Kind
    numbers: Tensor

    @classmethod
    def of(cls, form: Form, factors: Factors, basis: str = "", shared: dict[str, Shared] | None = None) -> "Formed":
        """From its parts by layer."""
        ordered = {layer: {part: factors[layer][part] for part in sorted(factors[layer])} for layer in sorted(factors)}
        shapes = {layer: {part: tuple(t.shape) for part, t in parts.items()} for layer, parts in ordered.items()}
        flat = torch.cat([t.flatten() for parts in ordered.values() for t in parts.values()])
        return cls(Kind(form, basis, shared or {}, shapes), flat)


def form_of(method: str) -> Form | None:
    """The form that adapters of a method take; None if they have none: what they do to W0 is no short product (Bone), is none of
    weights (LoPA), has magnitudes (LoRAFusion), or lies in the weights (what is folded into them)."""
    says = METHODS[method]
    if says.chain is None or says.output is not None or says.folds or "magnitude" in says.parts:
        return None
    return "flora" if says.multiplies else "core" if says.frames == ("B", "A") else "lora"


KNOWN = 16
Known: TypeAlias = dict[object, Kind]  # by what adapters are that are used just as they are stored


def formed(adapter: StoredAdapter, basis: Basis, known: Known | None = None) -> Formed:
    """An adapter in its form. known: filled in, and what spares the work for the next adapter that is alike.

    Raises AdapterError if it has no form (`form_of` says why), or another basis.
    """
    manifest = adapter.manifest
    says, form = METHODS[manifest.method], form_of(manifest.method)
    if form is None or says.chain is None:
        raise AdapterError(f"the adapter of {manifest.client} is of {manifest.method}, which no batch of several tenants can use")
    if manifest.basis_fingerprint != basis.fingerprint:
        raise AdapterError(f"the adapter of {manifest.client} was trained on another basis; load the basis of its own run")
    cut = basis.cut(manifest.rank) if says.nested and basis.rank and manifest.rank < basis.rank else basis
    alike = manifest.method, manifest.rank, manifest.scale, basis.fingerprint, tuple(manifest.shapes.items())
    if known and alike in known:
        return Formed(known[alike], adapter.numbers)
    as_stored = known is not None
    shared: dict[str, Shared] = {}
    factors: Factors = {}
    narrow = form == "core" and says.expand is None
    for layer, parts in (adapter.layers if narrow else adapter.expanded).items():
        b, a = cut.B.get(layer), cut.A.get(layer)
        if form == "core":
            first, *between, last = says.chain(parts, b, a, manifest.scale)
            if b is None or a is None or first is not b or last is not a:
                raise AdapterError(f"the adapter of {manifest.client} does not go through its basis; train it again")
            as_stored &= len(between) == 1 and between[0] is parts.get("core")
            core = between[0] if len(between) == 1 else functools.reduce(torch.matmul, [each.double() for each in between])
            room = basis.B[layer].shape[1] - core.shape[0]
            factors[layer] = {"core": torch.nn.functional.pad(core, (0, room, 0, room)) if room else core}
            as_stored &= not room
            shared[layer] = Shared(basis.B[layer], basis.A[layer])
        else:
            as_stored = False
            wide_b, wide_a = (None if side is None else side.double() for side in (b, a))
            *before, last = says.chain(parts, wide_b, wide_a, manifest.scale)
            factors[layer] = {"A": last, "B": functools.reduce(torch.matmul, before)}
    as_stored &= list(adapter.layers) == sorted(adapter.layers) and not adapter.head
    for name, tensor in adapter.head.items():
        module, _, part = name.rpartition(".")
        factors.setdefault(HEAD + module, {})[part] = tensor
    made = Formed.of(form, factors, basis.fingerprint if shared else "", shared)
    if known is not None and as_stored:
        if len(known) >= KNOWN:  # each holds a basis, and runs that refresh theirs have many
            known.clear()
        known[alike] = made.kind
    return made
