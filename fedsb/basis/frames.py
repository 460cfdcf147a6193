"""The basis: the frozen B and A of every adapted layer, which all clients of a run share."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from fedsb.errors import BasisError

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


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


@dataclass(frozen=True)
class Basis:
    """What is frozen and shared, by layer name (the module's path in the base model), and the core at the start.

    B, A and R0 of the same layers for methods with a core between two frames; A alone, or nothing at all, for others.

    Attributes:
        B: (out, r), fp32 or bf16; of LoRA-SB with orthonormal columns.
        A: (r, in), same dtype; of LoRA-SB with orthonormal rows.
        R0: (r, r) fp32, the core before the first round; zeros, or diag(S) as in LoRA-SB (arXiv 2411.19557, section 3).
    """

    B: dict[str, Tensor]
    A: dict[str, Tensor]
    R0: dict[str, Tensor] = field(repr=False)

    def __post_init__(self) -> None:
        if self.B.keys() != self.R0.keys() or (self.B and self.A.keys() != self.B.keys()):
            raise BasisError("a basis needs B, A and R0 for the same layers, or has no B and R0 at all; rebuild it")
        for name, b in self.B.items():
            a, r0 = self.A[name], self.R0[name]
            if b.ndim != 2 or a.ndim != 2 or b.shape[1] != a.shape[0] or r0.shape != (a.shape[0], a.shape[0]):
                raise BasisError(
                    f"layer {name}: B {tuple(b.shape)}, A {tuple(a.shape)} and R0 {tuple(r0.shape)} do not fit together; "
                    "rebuild the basis"
                )

    @cached_property
    def fingerprint(self) -> str:
        """See `fingerprint_of`."""
        return fingerprint_of(self.B, self.A)

    @property
    def rank(self) -> int | None:
        """r, the number of rows of every A; None if nothing is frozen."""
        return next(iter(self.A.values())).shape[0] if self.A else None

    @property
    def nbytes(self) -> int:
        """Bytes of B and A, which is what a client receives that cannot rebuild them."""
        return sum(t.numel() * t.element_size() for part in (self.B, self.A) for t in part.values())

    def cut(self, rank: int) -> "Basis":
        """The leading columns of B, rows of A and blocks of R0."""
        return Basis(
            {name: b[:, :rank].contiguous() for name, b in self.B.items()},
            {name: a[:rank].contiguous() for name, a in self.A.items()},
            {name: r0[:rank, :rank].contiguous() for name, r0 in self.R0.items()},
        )

    def to(self, dtype: torch.dtype) -> "Basis":
        """The same basis with B and A kept in `dtype`; R0 stays fp32."""
        return Basis(
            {name: t.to(dtype) for name, t in self.B.items()},
            {name: t.to(dtype) for name, t in self.A.items()},
            self.R0,
        )
