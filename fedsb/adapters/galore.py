"""GaLore in a federation: full-parameter training in a subspace, which is another one each round.

    round t:   W = W_t + P_t·N        P_t (out, r) orthonormal columns, N (r, in), from 0
    after it:  W_{t+1} = W_t + P_t·mean(N_i)

Zhao, Zhang, Chen, Wang, Anandkumar, Tian, "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection",
arXiv 2403.03507, algorithm 2. There the gradient G (out, in) of W is projected, R = Pᵀ·G, Adam makes N of R, and W moves by P·N.
R is the gradient of N above, so while P stays, that is Adam on N; P stays for a round. The mean of the updates P·N_i is P times
the mean of the N_i, exactly. A client sends N, r·in numbers a layer, and receives P and, once, what was added to W.

Two differences from the paper. P stands on the side of the outputs, which is the smaller one, that the paper projects, only where
out ≤ in. And P is random, from the seed and the round: the leading singular vectors of the gradient, which the paper takes, are
of private data here. Full fine-tuning on one machine, with the paper's P, is `fedsb.training.galore`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils.peft_types import register_peft_method
from torch import Tensor, nn
from torch.nn import functional

from fedsb.adapters.method import Method, Parts
from fedsb.adapters.own_layer import OwnLinear
from fedsb.adapters.own_tuner import OwnConfig, OwnTuner
from fedsb.adapters.peft_type import FEDSB_GALORE
from fedsb.basis.spectral import check_rank, random_orthonormal
from fedsb.errors import AdapterError


@dataclass
class GaloreConfig(OwnConfig):
    """Configuration for `get_peft_model(model, GaloreConfig(r=64))`: one round's P, random, and N.

    Attributes:
        r: rank of the projection.
    """

    r: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = FEDSB_GALORE
        if self.r < 1:
            raise AdapterError(f"r = {self.r} makes no projection; set r from 1 on")


class Projector(nn.Module):
    """Holds P (out, r), frozen."""

    P: Tensor

    def __init__(self, p: Tensor) -> None:
        super().__init__()
        self.register_buffer("P", p)


class GaloreLinear(OwnLinear):
    """One adapted linear layer."""

    adapter_layer_names = ("fedsb_galore_n",)
    other_param_names = ("fedsb_galore_p",)

    def __init__(self, base_layer: nn.Linear, adapter_name: str, r: int) -> None:
        super().__init__(base_layer)
        self.fedsb_galore_n = nn.ModuleDict()
        self.fedsb_galore_p = nn.ModuleDict()
        self.update_layer(adapter_name, r)

    def update_layer(self, adapter_name: str, r: int) -> None:
        """Add an adapter with a random P, and N = 0."""
        device = self.base_layer.weight.device
        n = nn.Linear(self.in_features, r, bias=False, device=device, dtype=torch.float32)
        nn.init.zeros_(n.weight)
        self.fedsb_galore_n[adapter_name] = n
        shape = (self.out_features, min(r, self.out_features))  # of a larger rank `check` says what is wrong
        p = torch.empty(shape, device="meta") if device.type == "meta" else _drawn(shape, None)
        self.fedsb_galore_p[adapter_name] = Projector(p.to(device))
        self.set_adapter(self.active_adapters)

    def trained(self, adapter: str) -> dict[str, nn.Parameter]:
        """`N` (r, in)."""
        found: Any = {"N": self.fedsb_galore_n[adapter].weight} if adapter in self.fedsb_galore_n else {}
        return dict(found)

    def frozen(self, adapter: str) -> dict[str, Tensor]:
        """`P` (out, r)."""
        found: Any = {"P": self.fedsb_galore_p[adapter].P} if adapter in self.fedsb_galore_p else {}
        return dict(found)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """P·N (out, in), fp32."""
        return self.frozen(adapter)["P"] @ self.trained(adapter)["N"]

    def adapted(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """W0·x + P·N·x of each."""
        y: Tensor = self.base_layer(x)
        for name in names:
            y = y + self._added(x, name)
        return y

    def mixed(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """One batch, adapter after adapter."""
        y: Tensor = self.base_layer(x).clone()
        for name in sorted(set(names) & self.fedsb_galore_n.keys()):
            rows = [row for row, other in enumerate(names) if other == name]
            y[rows] += self._added(x[rows], name)
        return y

    def _added(self, x: Tensor, name: str) -> Tensor:
        n, p = self.fedsb_galore_n[name], self.frozen(name)["P"]
        return functional.linear(n(x.to(n.weight.dtype)), p).to(x.dtype)  # type: ignore[arg-type]


class GaloreModel(OwnTuner):
    """A transformers model whose target layers are `GaloreLinear`."""

    prefix = "fedsb_galore_"
    tuner_layer_cls = GaloreLinear
    called = "GaLore"

    def told(self, config: GaloreConfig) -> tuple[int]:
        """The rank."""
        return (config.r,)

    def check(self, layers: dict[str, Any], config: GaloreConfig, adapter_name: str) -> None:
        """Hold the rank against all layers, so that the smallest is named."""
        check_rank({name: (layer.out_features, layer.in_features) for name, layer in layers.items()}, config.r)


register_peft_method(name="fedsb_galore", config_cls=GaloreConfig, model_cls=GaloreModel, prefix="fedsb_galore_")


def _drawn(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    out, r = shape
    return random_orthonormal(out, r, generator or torch.default_generator)


def _config(rank: int, alpha: float, told: dict[str, Any]) -> GaloreConfig:
    return GaloreConfig(r=rank, **told)


def _chain(parts: Parts, b: Tensor | None, a: Tensor | None, scale: float) -> tuple[Tensor, ...]:
    return parts["P"], parts["N"]


def _fold(clients: Sequence[Parts], weights: Sequence[float], mean: Parts, scale: float) -> tuple[Tensor, Tensor]:
    """P (out, r) and the mean of the N (r, in), fp64."""
    return mean["P"].double(), mean["N"].double()


SAYS = (
    "In each round the sites train `y = (W + P N) x` with a P that is drawn anew, the same for all, and P times the mean of "
    "the N is added to W (GaLore)."
)
GALORE = Method(
    _config,
    {"P": ("out", "r"), "N": ("r", "in")},
    (),
    _chain,
    exact=True,
    says=SAYS,
    fold=_fold,
    restarts=True,
    rate=1e-3,  # untuned
    draws={"P": _drawn},
    down=("P",),
)
