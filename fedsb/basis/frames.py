"""The basis: what all clients of a run share and none of them trains: the frozen B and A of every adapted layer, and what was
folded into the base model's weights."""

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from fedsb.errors import BasisError

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
Fold = dict[str, tuple[Tensor, Tensor]]  # layer → U (out, k), V (k, in), fp32: U·V is added to the layer's weight W0


def fingerprint_of(b: Mapping[str, Tensor], a: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over the names, shapes, dtypes and bytes of all B (out, r) and A (r, in), in order of name.

    A core means nothing without its basis, so every message, checkpoint and adapter carries this.
    """
    digest = hashlib.sha256()
    for name in sorted(b.keys() | a.keys()):
        for side, tensor in ((side, part[name]) for side, part in (("B", b), ("A", a)) if name in part):
            digest.update(f"{name}:{side}:{tuple(tensor.shape)}:{tensor.dtype};".encode())
            digest.update(tensor.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def folded_fingerprint(before: str, fold: Fold) -> str:
    """The fingerprint of a basis once more is folded in: SHA-256 (hex) over the one before and over U and V."""
    sides = ({name: pair[side] for name, pair in fold.items()} for side in (0, 1))
    return hashlib.sha256(f"{before}:{fingerprint_of(*sides)}".encode()).hexdigest()


def beside(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Σ left·right as one left (out, k) and right (k, in), fp64.

    Where k would be more than the smaller side, one of them is the product and the other the identity: the same matrix in fewer
    numbers.
    """
    left, right = torch.cat([u.double() for u, _ in pairs], 1), torch.cat([v.double() for _, v in pairs])
    out, in_ = left.shape[0], right.shape[1]
    if left.shape[1] <= min(out, in_):
        return left, right
    product, identity = left @ right, torch.eye(min(out, in_), dtype=torch.float64)
    return (product, identity) if in_ <= out else (identity, product)


@dataclass(frozen=True)
class Basis:
    """What is frozen and shared, by layer name (the module's path in the base model), and the core at the start.

    B, A and R0 of the same layers for methods with a core between two frames; A alone, or nothing at all, for others.
    Methods that leave something behind in W0 add to `folds`, oldest first.

    Attributes:
        B: (out, r), fp32 or bf16; of LoRA-SB with orthonormal columns.
        A: (r, in), same dtype; of LoRA-SB with orthonormal rows.
        R0: (r, r) fp32, the core before the first round; diag(S) as in LoRA-SB (arXiv 2411.19557, section 3), zeros, or none at
            all, which is zero too.
        folds: what is added to W0, as factors.
    """

    B: dict[str, Tensor]
    A: dict[str, Tensor]
    R0: dict[str, Tensor] = field(repr=False)
    folds: tuple[Fold, ...] = ()

    def __post_init__(self) -> None:
        if (self.R0 and self.B.keys() != self.R0.keys()) or (self.B and self.A.keys() != self.B.keys()):
            raise BasisError("a basis needs B, A and R0 for the same layers, or has no B and R0 at all; rebuild it")
        for name, b in self.B.items():
            a, square = self.A[name], (b.shape[-1], b.shape[-1])
            r0 = tuple(self.R0[name].shape) if self.R0 else square
            if b.ndim != 2 or a.ndim != 2 or b.shape[1] != a.shape[0] or r0 != square:
                raise BasisError(
                    f"layer {name}: B {tuple(b.shape)}, A {tuple(a.shape)} and R0 {r0} do not fit together; rebuild the basis"
                )

    @cached_property
    def fingerprint(self) -> str:
        """See `fingerprint_of` and `folded_fingerprint`."""
        return functools.reduce(folded_fingerprint, self.folds, fingerprint_of(self.B, self.A))

    @property
    def rank(self) -> int | None:
        """r, the number of rows of every A; None if nothing is frozen."""
        return next(iter(self.A.values())).shape[0] if self.A else None

    @property
    def nbytes(self) -> int:
        """Bytes of B, A and the folds, which is what a client receives that cannot rebuild them."""
        frames = (t for part in (self.B, self.A) for t in part.values())
        folded = (t for fold in self.folds for pair in fold.values() for t in pair)
        return sum(t.numel() * t.element_size() for t in (*frames, *folded))

    def cut(self, rank: int) -> "Basis":
        """The leading columns of B, rows of A and blocks of R0."""
        return Basis(
            {name: b[:, :rank].contiguous() for name, b in self.B.items()},
            {name: a[:rank].contiguous() for name, a in self.A.items()},
            {name: r0[:rank, :rank].contiguous() for name, r0 in self.R0.items()},
        )

    def to(self, dtype: torch.dtype) -> "Basis":
        """The same basis with B and A kept in `dtype`; R0 and folds stay fp32."""
        return Basis(
            {name: t.to(dtype) for name, t in self.B.items()},
            {name: t.to(dtype) for name, t in self.A.items()},
            self.R0,
            self.folds,
        )

    def fold(self, more: Fold) -> "Basis":
        """The basis once more is folded into W0. Raises BasisError if U and V do not fit together."""
        for name, (u, v) in more.items():
            if u.ndim != 2 or v.ndim != 2 or u.shape[1] != v.shape[0] or u.dtype != torch.float32 or v.dtype != torch.float32:
                raise BasisError(f"layer {name}: U {tuple(u.shape)} and V {tuple(v.shape)} of a fold do not fit; send it again")
        folded = Basis(self.B, self.A, self.R0, (*self.folds, more))
        folded.__dict__["fingerprint"] = folded_fingerprint(self.fingerprint, more)  # without hashing all that was there before
        return folded
