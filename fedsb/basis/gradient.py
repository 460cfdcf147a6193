"""The first update of full fine-tuning, estimated on public examples: LoRA-SB's basis (arXiv 2411.19557, section 3).

The gradient of each layer is formed in the backward pass, sketched at once and freed before the next layer's, so no
second model-sized buffer ever exists. The paper's sign step needs the whole sum, so `sign=True` keeps one: a model-sized
fp32 buffer on the CPU.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from fedsb.basis.frames import Basis
from fedsb.basis.spectral import check_rank, frames_from_sketches, leading_frames, seeded
from fedsb.errors import BasisError

T = TypeVar("T")


class Accumulator(Protocol):
    """Takes one layer's gradients (out, in) as they come and yields the leading frames of their sum."""

    def add(self, gradient: Tensor) -> None: ...

    def finite(self) -> bool: ...

    def frames(self, rank: int) -> tuple[Tensor, Tensor, Tensor]: ...


class Sketch:
    """One-pass linear sketches Y = GΩ (out, k) and Z = ΨG (l, in) of a sum of gradients, k = r + 8, l = 2k.

    Linear: sketches of parts may be added up. Memory out·k + l·in instead of out·in numbers.
    """

    def __init__(self, shape: tuple[int, int], rank: int, generator: torch.Generator, device: torch.device) -> None:
        out, in_ = shape
        k = min(rank + 8, out, in_)
        size = min(2 * k, out)
        self.omega = torch.randn(in_, k, generator=generator).to(device)
        self.psi = torch.randn(size, out, generator=generator).to(device)
        self.y = torch.zeros(out, k, device=device)
        self.z = torch.zeros(size, in_, device=device)

    def add(self, gradient: Tensor) -> None:
        gradient = gradient.to(torch.float32)
        self.y.addmm_(gradient, self.omega)
        self.z.addmm_(self.psi, gradient)

    def finite(self) -> bool:
        return bool(torch.isfinite(self.y).all() and torch.isfinite(self.z).all())

    def frames(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        return frames_from_sketches(self.y.cpu(), self.z.cpu(), self.psi.cpu(), rank)


class WholeSum:
    """The sum itself, for the paper's sign step: an out x in fp32 buffer on the CPU."""

    def __init__(self, shape: tuple[int, int], generator: torch.Generator) -> None:
        self.sum = torch.zeros(shape)
        self.generator = generator

    def add(self, gradient: Tensor) -> None:
        self.sum += gradient.to("cpu", torch.float32)

    def finite(self) -> bool:
        return bool(torch.isfinite(self.sum).all())

    def frames(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        return leading_frames(self.sum.sign(), rank, self.generator)


@contextmanager
def _gradients_go_to(layers: Mapping[str, nn.Module], accumulators: Mapping[str, Accumulator]):  # type: ignore[no-untyped-def]
    """Within this context each layer's weight gradient is handed over in the backward pass and freed at once."""
    weights: dict[str, nn.Parameter] = {name: layer.weight for name, layer in layers.items()}  # type: ignore[misc]

    def hand_over(accumulator: Accumulator) -> Callable[[Tensor], None]:
        def hook(weight: Tensor) -> None:
            assert weight.grad is not None
            accumulator.add(weight.grad)
            weight.grad = None

        return hook

    handles = []
    try:
        for name, weight in weights.items():
            weight.requires_grad_(True)
            handles.append(weight.register_post_accumulate_grad_hook(hand_over(accumulators[name])))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for weight in weights.values():
            weight.requires_grad_(False)
            weight.grad = None


def gradient_basis(
    layers: Mapping[str, nn.Module],
    batches: Iterable[T],
    loss: Callable[[T], Tensor],
    rank: int,
    *,
    seed: int,
    sign: bool = False,
    r0_scale: float = 0.0,
) -> Basis:
    """Leading frames of the first update ΔW = -η·g, or -η·sign(g) with `sign`, g the summed gradient.

    Args:
        layers: layer name → linear layer (weight (out, in)) of a model whose parameters are all frozen.
        batches: public examples.
        loss: a batch → its scalar loss, differentiable through the layers.
        rank: r.
        seed: seed of the sketching matrices.
        sign: as in the paper; costs a model-sized fp32 buffer.
        r0_scale: η. R0 = η·diag(S) with S the singular values of sign(g), or of g scaled to root mean square 1 so that
            both variants speak of the same size; 0 gives R0 = 0.

    Returns:
        A Basis in fp32 on the CPU; its frames' signs are those of -g, so R0 is positive.

    Raises:
        BasisError: no batch, a rank that does not fit, or a gradient that is not finite.
    """
    shapes = {name: (int(layer.weight.shape[0]), int(layer.weight.shape[1])) for name, layer in layers.items()}  # type: ignore[union-attr,index,arg-type,operator]
    check_rank(shapes, rank)
    accumulators: dict[str, Accumulator] = {}
    for name, layer in layers.items():
        generator = seeded(seed, "sketch", name)
        device: torch.device = layer.weight.device  # type: ignore[assignment,union-attr]
        accumulators[name] = WholeSum(shapes[name], generator) if sign else Sketch(shapes[name], rank, generator, device)
    seen = 0
    with _gradients_go_to(layers, accumulators), torch.enable_grad():
        for batch in batches:
            loss(batch).backward()  # type: ignore[no-untyped-call]
            seen += 1
    if not seen:
        raise BasisError("the basis cannot be estimated from no examples; give [basis.public] some")
    b, a, r0 = {}, {}, {}
    for name in layers:
        accumulator = accumulators.pop(name)
        if not accumulator.finite():
            raise BasisError(f"layer {name}: the estimated gradient is not finite; use dtype fp32 or other public examples")
        left, s, right = accumulator.frames(rank)
        rms = 1.0 if sign else float(s.square().sum().sqrt()) / (shapes[name][0] * shapes[name][1]) ** 0.5
        b[name], a[name], r0[name] = -left, right, torch.diag(s * (r0_scale / max(rms, 1e-30)))
    return Basis(b, a, r0)
