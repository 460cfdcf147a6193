"""LoRAFusion: a pool of frozen adapters, of which only the mixture is trained: a coefficient of each in each layer.

    y = m∘(W0·x + Σ_i c_i·B_i·A_i·x)                       "sum", `lorafusion`
    y = m∘(W0·x + (Σ_i c_i·B_i)·(Σ_j c_j·A_j)·x)           "product", `lorafusion-product`

i, j = 1…N, c (N,) of each layer, A_i (r, in), B_i (out, r), m (out,) a magnitude of each output, x (…, in). Guo, Ali, Yang, Fan,
"LoRAFusion: A Crossbar-aware Multi-task Adaption Framework via Efficient Fusion of Pretrained LoRA Modules", GLSVLSI 2025, DOI
10.1145/3716368.3735213. Which of the two the paper means is not said in its abstract; the released code has the product (as
LoRAHub), whose N² terms mix B_i with A_j. Gradients are torch's own; the released ones are of neither.

With B = [B_1 … B_N] and A the A_i one below the other the sum is B·(diag(c)⊗I)·A and the product B·(c·cᵀ⊗I)·A: LoRA-SB of rank
N·r, whose core is made of c and whose basis is the pool; so it is the same layer with another core. The sum starts from c = 0,
which is the base model, where its gradient is not 0; the product, whose gradient is 0 there, from the first adapter of the pool.

m is left out in a federation (`magnitudes=False`), where it would make the mean of c inexact. Its form is ours: DoRA's
magnitude with the norm of W0 taken into it, which is the same set of functions; the released code has none.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedsb.adapters.lora_sb import LoraSbConfig, LoraSbLinear
from fedsb.adapters.method import Method, Parts
from fedsb.adapters.pool import pool_basis, read_lora
from fedsb.basis.frames import Basis

SUM, PRODUCT = "fusion", "fusion_product"  # the parts' names, which differ, since c means something else


@dataclass
class LoraFusionConfig(LoraSbConfig):
    """Configuration for `get_peft_model(model, LoraFusionConfig(pool=["pool/a", "pool/b"], r=8))`.

    Attributes:
        r: rank of one adapter of the pool, at least the largest.
        pool: folders of plain LoRAs. A saved adapter names them, and they are read again when it is loaded, unless
            `save_basis=True` was set.
        heads: how many there are; from `pool` if that is given.
        magnitudes: whether outputs have a trained magnitude.
        basis: "pool", or "later" (`set_basis`).
    """

    method: str = "lorafusion"
    r: int = 8
    pool: list[str] = field(default_factory=list)
    heads: int = 0
    magnitudes: bool = True
    basis: Literal["pool", "later"] = "pool"  # type: ignore[assignment]
    save_basis: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.pool = [str(folder) for folder in self.pool]
        self.heads = self.heads or len(self.pool)
        if self.heads < 1 or (self.basis == "pool" and len(self.pool) != self.heads):
            raise ValueError(
                f"pool lists {len(self.pool)} adapters and heads = {self.heads}; list each folder of the pool, or set "
                'basis = "later" and heads'
            )

    def core(self) -> nn.Module:
        """New coefficients."""
        return Fusion(self.heads, self.r, product=False)

    def build(self, layers: Mapping[str, LoraSbLinear]) -> Basis:
        """The pool, stacked."""
        shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
        return pool_basis([read_lora(Path(folder)) for folder in self.pool], shapes, self.r, self.pool)


@dataclass
class LoraFusionProductConfig(LoraFusionConfig):
    """The same of the product of sums."""

    method: str = "lorafusion-product"

    def core(self) -> nn.Module:
        """New coefficients."""
        return Fusion(self.heads, self.r, product=True)


class Fusion(nn.Module):
    """z (…, N·r), what the pool's A make of x → (…, N·r), what its B are given. Owns c, so that Opacus finds gradients of single
    records (by functorch).

    Attributes:
        in_features: N·r.
    """

    def __init__(self, count: int, r: int, *, product: bool) -> None:
        super().__init__()
        self.in_features, self.count, self.product = count * r, count, product
        self.register_parameter(PRODUCT if product else SUM, nn.Parameter(torch.zeros(count, dtype=torch.float32)))
        self.start()

    @property
    def coefficients(self) -> nn.Parameter:
        """c (N,)."""
        (found,) = self.parameters()
        return found

    def forward(self, z: Tensor) -> Tensor:
        """Sum: c_i·z_i; product: c_i·Σ_j c_j·z_j."""
        weighted: Tensor = z.unflatten(-1, (self.count, -1)) * self.coefficients[:, None]  # (…, N, r)
        if self.product:
            weighted = weighted.sum(-2, keepdim=True) * self.coefficients[:, None]
        return weighted.flatten(-2)

    @property
    def weight(self) -> Tensor:
        """diag(c)⊗I or c·cᵀ⊗I (N·r, N·r): what LoRA-SB's core would be."""
        return core_of(self.coefficients, self.in_features // self.count, product=self.product)

    def start(self) -> None:
        """Nothing of the pool; of the product its first adapter, as it is."""
        with torch.no_grad():
            self.coefficients.zero_()
            if self.product:
                self.coefficients[0] = 1


def core_of(c: Tensor, r: int, *, product: bool) -> Tensor:
    """c (N,) → the core (N·r, N·r) between the pool's frames."""
    core: Tensor = torch.kron(torch.outer(c, c) if product else c.diag(), torch.eye(r, dtype=c.dtype, device=c.device))
    return core


def _first(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    c = torch.zeros(shape)
    c[0] = 1
    return c


def _method(product: bool) -> Method:
    part, kind = (PRODUCT, LoraFusionProductConfig) if product else (SUM, LoraFusionConfig)

    def config(rank: int, alpha: float, told: dict[str, Any]) -> LoraFusionConfig:
        return kind(r=rank, basis="later", magnitudes=False, **told)

    def chain(parts: Parts, b: Tensor | None, a: Tensor | None, scale: float) -> tuple[Tensor, ...]:
        assert b is not None and a is not None
        return b, core_of(parts[part], b.shape[1] // len(parts[part]), product=product), a

    update = "(sum_i c_i B_i) (sum_j c_j A_j)" if product else "sum_i c_i B_i A_i"
    return Method(
        config,
        {part: ("h",)},
        ("B", "A"),
        chain,
        exact=not product,
        says=f"The sites share a pool of frozen adapters (B_i, A_i); each layer computes `y = W0 x + {update} x`, and only the "
        "coefficients c are trained (LoRAFusion).",
        rate=2e-2,  # untuned; the released code's default
        heads=True,
        begins={part: _first} if product else {},
        native=dict,
    )


LORAFUSION = _method(product=False)
LORAFUSION_PRODUCT = _method(product=True)
