"""The forms in which one batch can use adapters of many tenants at once.

    core    y = W0·x + B·R_t·A·x                     B and A are the basis, shared by all tenants on it; R_t (r, r) is one's own
    lora    y = W0·x + B_t·A_t·x                     any plain low-rank update
    flora   y = W0·x + Σ_j b_tj∘(W0·(a_tj∘x))        FLoRA (arXiv 2312.05677): a weight times a low-rank matrix, entry by entry

What a method's chain (`fedsb.adapters.method`) says decides which form an adapter takes.
"""

import functools
from dataclasses import dataclass
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
class Formed:
    """An adapter in its form. shared: layer → what is shared; empty unless the form is "core"."""

    form: Form
    shared: dict[str, Shared]
    factors: Factors

    @property
    def shapes(self) -> Shapes:
        """Layer → part → shape."""
        return {layer: {part: tuple(t.shape) for part, t in parts.items()} for layer, parts in self.factors.items()}

    @property
    def sides(self) -> dict[str, tuple[int, int]]:
        """Layer → (out, in) of what it goes through."""
        found = {layer: (each.B.shape[0], each.A.shape[1]) for layer, each in self.shared.items()}
        return found or {n: (p["B"].shape[0], p["A"].shape[1]) for n, p in self.factors.items() if not n.startswith(HEAD)}


def form_of(method: str) -> Form | None:
    """The form that adapters of a method take; None if they have none: what they do to W0 is no short product (Bone), is none of
    weights (LoPA), has magnitudes (LoRAFusion), or lies in the weights (what is folded into them)."""
    says = METHODS[method]
    if says.chain is None or says.output is not None or says.folds or "magnitude" in says.parts:
        return None
    return "flora" if says.multiplies else "core" if says.frames == ("B", "A") else "lora"


def formed(adapter: StoredAdapter, basis: Basis) -> Formed:
    """An adapter in its form. Raises AdapterError if it has none (`form_of` says why), or another basis."""
    manifest = adapter.manifest
    says, form = METHODS[manifest.method], form_of(manifest.method)
    if form is None or says.chain is None:
        raise AdapterError(f"the adapter of {manifest.client} is of {manifest.method}, which no batch of several tenants can use")
    if manifest.basis_fingerprint != basis.fingerprint:
        raise AdapterError(f"the adapter of {manifest.client} was trained on another basis; load the basis of its own run")
    cut = basis.cut(manifest.rank) if says.nested and basis.rank and manifest.rank < basis.rank else basis
    shared: dict[str, Shared] = {}
    factors: Factors = {}
    narrow = form == "core" and says.expand is None
    for layer, parts in (adapter.layers if narrow else adapter.expanded).items():
        b, a = cut.B.get(layer), cut.A.get(layer)
        if form == "core":
            first, *between, last = says.chain(parts, b, a, manifest.scale)
            if b is None or a is None or first is not b or last is not a:
                raise AdapterError(f"the adapter of {manifest.client} does not go through its basis; train it again")
            core = between[0] if len(between) == 1 else functools.reduce(torch.matmul, [each.double() for each in between])
            room = basis.B[layer].shape[1] - core.shape[0]
            factors[layer] = {"core": torch.nn.functional.pad(core, (0, room, 0, room)) if room else core}
            shared[layer] = Shared(basis.B[layer], basis.A[layer])
        else:
            wide_b, wide_a = (None if side is None else side.double() for side in (b, a))
            *before, last = says.chain(parts, wide_b, wide_a, manifest.scale)
            factors[layer] = {"A": last, "B": functools.reduce(torch.matmul, before)}
    for name, tensor in adapter.head.items():
        module, _, part = name.rpartition(".")
        factors.setdefault(HEAD + module, {})[part] = tensor
    return Formed(form, shared, factors)
