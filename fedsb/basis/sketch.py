"""Sketches of the first gradient, which clients send so that the server finds the basis and nobody forms a gradient matrix.

    Y = G·Ω (out, q)          Z = Ψ·G (s, in)          G (out, in) = Σ_t g_t·h_tᵀ

h_t (in,) is a layer's input at a token and g_t (out,) the loss's gradient towards its output, so Y = gᵀ·(h·Ω) and
Z = (Ψ·gᵀ)·h cost out·q + s·in numbers. Both are linear in G: sketches of several examples or clients may be clipped, noised and
added up like any update, and what comes out is the sketch of the sum.

The sketch is that of Tropp, Yurtsever, Udell, Cevher, "Practical sketching algorithms for low-rank matrix approximation", SIAM
J. Matrix Anal. Appl. 38 (2017), arXiv 1609.00048. They rebuild the whole matrix from it: Q = orth(Y), X = (ΨQ)⁺Z (algorithm 4),
then the SVD of X, for which s must be well above q. A basis needs two subspaces and no singular values, so here each comes from
its own sketch, as in the range finder of Halko, Martinsson, Tropp, arXiv 0909.4061, algorithm 4.1, for G and for Gᵀ:

    B = the r leading left singular vectors of Y          A = the r leading right singular vectors of Z          q = s

With q = s = r the two rules give the same spans. Measured on gradients of SmolLM2 (share of ‖G‖ held, for as many numbers sent)
they are level without noise, and this one is ahead with noise, which the pseudoinverse amplifies; for synthetic spectra that
decay slowly, without noise, theirs is ahead.

Ω and Ψ are Gaussian with variance 1/(2q), so E(‖Y‖² + ‖Z‖²) = ‖G‖²: a sketch is about as long as the gradient.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fedsb.basis.frames import Basis
from fedsb.basis.spectral import check_rank, seeded
from fedsb.errors import BasisError

OVERSAMPLING = 8  # columns beyond the rank (Halko et al., section 4.2: 5 to 10); more cost bytes and hold hardly more


@dataclass(frozen=True)
class SketchPlan:
    """What a sketch consists of; the same on the server and on every client, since it follows from the configuration.

    Attributes:
        shapes: layer name and (out, in), in the model's order.
        rank: r of the basis that is to come out.
        seed: of the test matrices Ω and Ψ, which are public.
        oversampling: columns of Y and rows of Z beyond the rank; fewer where the layer's smaller side has no room for them.
    """

    shapes: tuple[tuple[str, tuple[int, int]], ...]
    rank: int
    seed: int
    oversampling: int = OVERSAMPLING

    def __post_init__(self) -> None:
        check_rank(dict(self.shapes), self.rank)
        if self.oversampling < 0:
            raise BasisError(f"an oversampling of {self.oversampling} leaves a sketch narrower than the rank; choose 0 or more")

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, int]], rank: int, seed: int, oversampling: int = OVERSAMPLING) -> "SketchPlan":
        """From layer name → (out, in). Raises BasisError if the rank does not fit a layer."""
        return cls(tuple(shapes.items()), rank, seed, oversampling)

    def width(self, shape: tuple[int, int]) -> int:
        """q = s of a layer (out, in)."""
        return min(self.rank + self.oversampling, *shape)

    @cached_property
    def tensors(self) -> tuple[tuple[str, tuple[int, int]], ...]:
        """Names and shapes of all Y and Z in the order in which they travel: `Layout(plan.tensors)` is a sketch's layout."""
        found = []
        for name, (out, in_) in self.shapes:
            q = self.width((out, in_))
            found += [(f"{name}.Y", (out, q)), (f"{name}.Z", (q, in_))]
        return tuple(found)

    @cached_property
    def size(self) -> int:
        """How many numbers a sketch has."""
        return sum(rows * columns for _, (rows, columns) in self.tensors)

    def split(self, flat: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """flat (…, size) → layer name → views Y (…, out, q) and Z (…, q, in). Raises BasisError on another size."""
        if flat.shape[-1:] != (self.size,):
            raise BasisError(f"a sketch of {self.size} numbers was expected and {tuple(flat.shape)} came; update both sides")
        parts = flat.split([rows * columns for _, (rows, columns) in self.tensors], dim=-1)
        views = [part.unflatten(-1, shape) for part, (_, shape) in zip(parts, self.tensors, strict=True)]
        return {name: (y, z) for (name, _), y, z in zip(self.shapes, views[::2], views[1::2], strict=True)}

    def test_matrices(self, name: str) -> tuple[Tensor, Tensor]:
        """Ω (in, q) and Ψ (q, out) of a layer, fp32 on the CPU; drawn anew at each call, so that they are never all there."""
        out, in_ = self._shape_of[name]
        q = self.width((out, in_))
        omega = torch.randn(in_, q, generator=seeded(self.seed, "sketch", name, "omega"))
        psi = torch.randn(q, out, generator=seeded(self.seed, "sketch", name, "psi"))
        return omega.mul_((2 * q) ** -0.5), psi.mul_((2 * q) ** -0.5)

    @cached_property
    def _shape_of(self) -> dict[str, tuple[int, int]]:
        return dict(self.shapes)


class _Tap(torch.autograd.Function):
    """Passes a layer's output on, and in the backward pass shows its input and gradient to `receive`.

    `anchor` is what the loss is differentiated by: a number that every tap pretends to depend on, so that neither
    weights nor anything else needs a gradient.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, h: Tensor, anchor: Tensor, receive: Callable[[Tensor, Tensor], None]) -> Tensor:
        """y (…, out) → y; h (…, in) is kept."""
        ctx.save_for_backward(h)
        ctx.receive = receive
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor, None, Tensor, None]:
        ctx.receive(*ctx.saved_tensors, upstream[0])
        return upstream[0], None, torch.zeros(()), None


@contextmanager
def _tapped(layers: Mapping[str, nn.Module], anchor: Tensor, receive: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Within this context a backward pass to `anchor` calls receive(name, h, g) for each use of each layer."""

    def hook_of(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            tapped: Tensor = _Tap.apply(output, inputs[0].detach(), anchor, lambda h, g: receive(name, h, g))  # type: ignore[no-untyped-call]
            return tapped

        return hook

    handles = [layer.register_forward_hook(hook_of(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def sketches(plan: SketchPlan, layers: Mapping[str, nn.Module], loss: Callable[[], Tensor], examples: int) -> Tensor:
    """The sketch of each example's gradient, by one forward and one backward pass: (examples, size), fp32.

    Nothing of shape (out, in) is formed, no parameter's gradient is touched, and the model is left as it was.

    Args:
        layers: the plan's layers by name, linear and frozen; inputs h (examples, …, in).
        loss: the sum of the examples' losses, computed through the layers.
        examples: how many the batch has; 1 takes the batch as one, so what comes out is the sketch of the summed gradient.

    Raises:
        BasisError: a layer that is not as planned, or that sees the tokens of several examples as one list.
    """
    _check_layers(plan, layers)
    device: torch.device = next(iter(layers.values())).weight.device  # type: ignore[assignment,union-attr]
    flat = torch.zeros(examples, plan.size, device=device)
    parts = plan.split(flat)

    def add(name: str, h: Tensor, g: Tensor) -> None:
        h, g = _by_example(name, h, examples), _by_example(name, g, examples)  # (n, T, in), (n, T, out)
        omega, psi = (matrix.to(device) for matrix in plan.test_matrices(name))
        y, z = parts[name]
        y += g.mT @ (h @ omega)  # (n, out, T)·(n, T, q)
        z += (psi @ g.mT) @ h  # (n, q, T)·(n, T, in)

    anchor = torch.zeros((), requires_grad=True)
    with torch.enable_grad(), _tapped(layers, anchor, add):
        torch.autograd.grad(loss(), anchor)
    return flat


def _by_example(name: str, tensor: Tensor, examples: int) -> Tensor:
    """(n, …, d) → (n, T, d) in fp32; a batch that is taken as one becomes (1, n·T, d)."""
    if examples > 1 and (tensor.ndim < 2 or tensor.shape[0] != examples):
        raise BasisError(
            f"layer {name} sees the tokens of several examples as one list, so that they cannot be clipped one by one; "
            "leave it out of adapter.target_modules"
        )
    return tensor.reshape(examples, -1, tensor.shape[-1]).float()


def _check_layers(plan: SketchPlan, layers: Mapping[str, nn.Module]) -> None:
    shapes = {name: tuple(layer.weight.shape) for name, layer in layers.items()}  # type: ignore[union-attr,operator,arg-type]
    if shapes != dict(plan.shapes):
        odd = sorted(name for name, shape in (shapes.items() ^ dict(plan.shapes).items()))[0]
        raise BasisError(f"layer {odd} is not the same in sketch plan and model; use the model that the run is configured for")


def sketched_basis(plan: SketchPlan, flat: Tensor) -> Basis:
    """The basis that a summed sketch (size,) points at: B and A fp32 on the CPU, R0 = 0.

    B (out, r) and A (r, in) are orthonormal whatever the sketch: of a gradient of lower rank the rest is filled up, and of pure
    noise it is a random basis. The largest entry of each column of B and of each row of A is positive.

    Raises:
        BasisError: a sketch of another size, or with NaN or infinity.
    """
    b, a = {}, {}
    for name, (y, z) in plan.split(flat.detach().cpu()).items():
        if not (torch.isfinite(y).all() and torch.isfinite(z).all()):
            raise BasisError(f"layer {name}: the summed sketch of the gradient is not finite; use dtype fp32 or other examples")
        b[name] = _leading(y, plan.rank)
        a[name] = _leading(z.T, plan.rank).T.contiguous()
    return Basis(b, a, {name: torch.zeros(plan.rank, plan.rank) for name in b})


def _leading(matrix: Tensor, rank: int) -> Tensor:
    """The leading left singular vectors (n, r), fp32, of a matrix (n, q), each with its largest entry positive."""
    u = torch.linalg.svd(matrix.double(), full_matrices=False).U[:, :rank]
    largest = u.gather(0, u.abs().argmax(0, keepdim=True))  # (1, r)
    signed: Tensor = u * largest.sign()
    return signed.float().contiguous()
