"""Matrices of known spectrum, and what orthonormal means."""

import torch
from torch import Tensor, nn

from fedsb.basis.frames import Basis
from tests.adapters.samples import llama

SHAPES = {"wide": (16, 40), "tall": (40, 16), "square": (24, 24)}


def with_spectrum(out: int, width: int, values: Tensor, seed: int = 0) -> Tensor:
    """A (out, width) fp32 matrix with these singular values."""
    draw = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(out, len(values), dtype=torch.float64, generator=draw)).Q
    right = torch.linalg.qr(torch.randn(width, len(values), dtype=torch.float64, generator=draw)).Q
    return ((left * values.double()) @ right.T).float()


def decaying(n: int, base: float = 0.7) -> Tensor:
    """1, base, base², …"""
    return base ** torch.arange(n, dtype=torch.float64)


def far_from_orthonormal(basis: Basis) -> float:
    """The largest entry of BᵀB - I and AAᵀ - I over all layers."""
    eye = torch.eye(basis.rank, dtype=torch.float64)
    products = [(m.double().T @ m.double()) for m in basis.B.values()]
    products += [(m.double() @ m.double().T) for m in basis.A.values()]
    return max(float((p - eye).abs().max()) for p in products)


def linear_layers(model: nn.Module | None = None) -> dict[str, nn.Module]:
    """The adapted layers of a tiny Llama."""
    model = llama() if model is None else model
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"}


def assert_nearly_equal(one: Basis, other: Basis) -> None:
    """Not bit for bit: MKL rounds by where in memory a matrix lies."""
    for name in one.B:
        torch.testing.assert_close(one.B[name], other.B[name], atol=2e-5, rtol=0)
        torch.testing.assert_close(one.A[name], other.A[name], atol=2e-5, rtol=0)
