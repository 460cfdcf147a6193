"""RAVAN: a sum of heads, each a trained scale times a trained r x r matrix between frozen bases of its own.

    y = W0·x + Σ_i s_i·B_i·H_i·A_i·x          i = 1…h, x (…, in), A_i (r, in), H_i (r, r), B_i (out, r), y (…, out)

Raje, Askin, Jhunjhunwala, Joshi, "Ravan: Multi-Head Low-Rank Adaptation for Federated Fine-Tuning", arXiv 2506.05568. As many
numbers as a core of rank r·√h, and an update of rank h·r. With B = [B_1 … B_h] and A the A_i one below the other it is
B·blockdiag(s_i·H_i)·A·x: LoRA-SB of rank h·r whose core is block diagonal, and so the same layer with another core.

Clients upload the products M_i = s_i·H_i, as in the paper (abstract): the mean of B_i·M_i·A_i is B_i·(mean of M_i)·A_i, whereas
with s and H averaged apart it would not be. A state is the products, so every round starts from H_i = M_i and s_i = 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedsb.abilities import HEADS as DEFAULT_HEADS
from fedsb.adapters.lora_sb import LoraSbConfig, LoraSbLinear
from fedsb.adapters.method import Method, Parts
from fedsb.basis.frames import Basis
from fedsb.basis.spectral import heads_basis

HEADS, SCALES = ".heads", ".scales"


@dataclass
class RavanConfig(LoraSbConfig):
    """Configuration for `get_peft_model(model, RavanConfig(r=32, heads=4))`; the rest is `LoraSbConfig`'s.

    Attributes:
        r: rank of one head.
        heads: how many there are.
        basis: "random" (from `seed`) or "later".
    """

    method: str = "ravan"
    heads: int = DEFAULT_HEADS

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads < 1:
            raise ValueError(f"heads = {self.heads}: there must be one or more")
        if self.basis == "weights":
            raise ValueError('basis = "weights" is LoRA-SB\'s; RAVAN\'s heads have random ones: set basis = "random" or "later"')

    def core(self) -> nn.Module:
        """New heads."""
        return Heads(self.heads, self.r)

    def build(self, layers: Mapping[str, LoraSbLinear]) -> Basis:
        """Random frames, orthonormal over all heads together where there is room."""
        shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
        return heads_basis(shapes, self.r, self.heads, self.seed)


class Heads(nn.Module):
    """z (…, h·r) → (…, h·r): part i of z times s_i·H_i. Owns its parameters, so that Opacus finds gradients of single records
    for scales too (by functorch).

    Attributes:
        heads: H (h, r, r), zero at the start.
        scales: s (h,), one at the start.
        in_features: h·r.
    """

    def __init__(self, heads: int, r: int) -> None:
        super().__init__()
        self.in_features = heads * r
        self.heads = nn.Parameter(torch.zeros(heads, r, r, dtype=torch.float32))
        self.scales = nn.Parameter(torch.ones(heads, dtype=torch.float32))

    def forward(self, z: Tensor) -> Tensor:
        """Each head on its own part."""
        parts = z.unflatten(-1, self.heads.shape[:2])  # (…, h, r)
        moved = torch.einsum("...hj,hij->...hi", parts, self.heads)
        return (moved * self.scales[:, None]).flatten(-2)

    @property
    def weight(self) -> Tensor:
        """blockdiag(s_i·H_i) (h·r, h·r): what LoRA-SB's core would be."""
        whole: Tensor = torch.block_diag(*(self.scales[:, None, None] * self.heads))
        return whole

    def start(self) -> None:
        """H = 0 and s = 1: the base model."""
        with torch.no_grad():
            self.heads.zero_()
            self.scales.fill_(1)


def _config(rank: int, alpha: float, told: dict[str, Any]) -> RavanConfig:
    return RavanConfig(r=rank, basis="later", **told)


def _chain(parts: Parts, b: Tensor | None, a: Tensor | None, scale: float) -> tuple[Tensor, ...]:
    assert b is not None and a is not None
    return b, torch.block_diag(*parts["heads"]), a


def _reach(step: float, sent: Tensor) -> Tensor:
    """|s·H - M| ≤ |s - 1|·|M| + |s|·|H - M|, where s comes from 1 and H from M, each by at most `step`."""
    return step * (sent.abs() + 1 + step)


def _native(parts: Parts) -> dict[str, Tensor]:
    return {"heads": parts["heads"], "scales": torch.ones(len(parts["heads"]))}


SAYS = (
    "The sites share frozen random bases (B_i, A_i) of several heads; each layer computes `y = W0 x + sum_i s_i B_i H_i A_i x`. "
    "The scales s_i and the small matrices H_i are trained, and their products averaged."
)
RAVAN = Method(
    _config,
    {"heads": ("h", "r", "r")},
    ("B", "A"),
    _chain,
    exact=True,
    says=SAYS,
    heads=True,
    native=_native,
    reach=_reach,
)
