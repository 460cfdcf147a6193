"""LoRA-XS: a trained r x r core between the leading singular vectors of the frozen weight.

    y = W0·x + (α/r)·U·R·(S·Vᵀ)·x,    W0 ≈ U·S·Vᵀ,    R at the start from N(0, 1e-5²)

Bałazy, Banaei, Aberer, Tabor, "LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters", arXiv 2405.17604,
section 3. As in the authors' code the singular values go to the side of the input; here that frame holds the scale too. The
layer is that of LoRA-SB, which needs no scale, since its frames are orthonormal.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedsb.adapters.lora_sb import LORA_SB, LoraSbConfig, LoraSbLinear
from fedsb.basis.frames import Basis
from fedsb.basis.spectral import seeded, weights_basis

SPREAD = 1e-5  # standard deviation of R at the start


@dataclass
class LoraXsConfig(LoraSbConfig):
    """Configuration for `get_peft_model(model, LoraXsConfig(r=64))`, with α = r; the rest is `LoraSbConfig`'s.

    Attributes:
        basis: "weights" or "later".
    """

    method: str = "lora-xs"
    basis: Literal["random", "weights", "later"] = "weights"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.basis == "random":
            raise ValueError('basis = "random" is LoRA-SB\'s; LoRA-XS takes the singular vectors of W0: set basis = "weights"')

    def build(self, layers: Mapping[str, LoraSbLinear]) -> Basis:
        """W0's leading singular vectors, and R0."""
        linear = {name: layer.get_base_layer() for name, layer in layers.items()}
        return lora_xs_basis(weights_basis(linear, self.r, self.seed), linear, self.seed, 1.0)


def lora_xs_basis(weights: Basis, layers: Mapping[str, nn.Module], seed: int, scale: float) -> Basis:
    """The frames U and (α/r)·S·Vᵀ, and R0.

    Args:
        weights: leading singular vectors of each W0.
        layers: the linear layers that they are of.
        scale: α/r.
    """
    a = {}
    for name, v in weights.A.items():
        w: Tensor = layers[name].weight.detach().cpu().float()  # type: ignore[operator,union-attr]
        values = (weights.B[name] * (w @ v.T)).sum(0)  # (r,)
        a[name] = scale * values[:, None] * v
    r0 = {name: SPREAD * torch.randn(r.shape, generator=seeded(seed, "R0", name)) for name, r in weights.R0.items()}
    return Basis(weights.B, a, r0)


def _config(rank: int, alpha: float, told: dict[str, Any]) -> LoraXsConfig:
    return LoraXsConfig(r=rank, basis="later", **told)


SAYS = (
    "The sites share W0's leading singular vectors; each layer computes `y = W0 x + (alpha/r) U R S V' x`, and only R is trained."
)
LORA_XS = dataclasses.replace(LORA_SB, config=_config, says=SAYS, rate=4e-3)
