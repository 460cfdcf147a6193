"""NOLA: LoRA whose factors are sums of random matrices, of which only the coefficients are trained.

    y = W0·x + (α/r)·B·A·x      A = A_0 + Σ_i α_i·A_i,  B = Σ_j β_j·B_j      i, j = 1…k

x (…, in), A (r, in), B (out, r), y (…, out); α_i and β_j are the k + k trained numbers of a layer, whatever its shape and rank.
Koohpayegani, Navaneet, Nooralinejad, Kolouri, Pirsiavash, "NOLA: Compressing LoRA using Linear Combination of Random Basis",
arXiv 2310.02556, equations 2 and 3. A_i and B_j are uniform in ±1/√k, A_0 uniform in ±1/√in as LoRA's A; coefficients start at 0,
and so the update does, as B is 0. Random matrices follow from the seed (`random_sums.py`) and are never kept; A and B are, while
the coefficients stay as they are.

Averaging α and β apart is not averaging B·A, as with LoRA.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils.peft_types import register_peft_method
from torch import Tensor, nn
from torch.nn import functional

from fedsb.abilities import BASES
from fedsb.adapters.coefficients import BITS, CODES, STEPS, layers_of_rows, pack, rows_of, unpack
from fedsb.adapters.lora import lora_chain
from fedsb.adapters.method import Method, Parts, Shapes
from fedsb.adapters.own_layer import BASE, OwnLinear
from fedsb.adapters.own_tuner import OwnConfig, OwnTuner
from fedsb.adapters.peft_type import FEDSB_NOLA
from fedsb.adapters.random_sums import Side, combined
from fedsb.errors import AdapterError


@dataclass
class NolaConfig(OwnConfig):
    """Configuration for `get_peft_model(model, NolaConfig(r=16, bases=128, seed=0))`; which layers, `OwnConfig` says.

    Attributes:
        r: rank of the update.
        bases: k, how many random matrices A is made of, and B.
        alpha: updates are multiplied with alpha / r. None: r.
        seed: of the random matrices.
        bits: 32, 16, 8 or 4, in which `save_pretrained` writes each coefficient; below 32 it is rounded (`quantise`).
    """

    r: int = 16
    bases: int = BASES
    alpha: float | None = None
    seed: int = 0
    bits: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = FEDSB_NOLA
        if self.r < 1 or self.bases < 1 or self.bits not in BITS:
            raise AdapterError(
                f"r = {self.r}, bases = {self.bases} and bits = {self.bits} make no NOLA; set r and bases from 1 on, and bits to "
                "32, 16, 8 or 4"
            )

    @property
    def scale(self) -> float:
        """α/r."""
        return 1.0 if self.alpha is None else self.alpha / self.r


class Combined:
    """A or B of all layers that share random matrices, made together, and again when a layer finds that its coefficients have
    changed. A change in place behind `parameter.data` is not seen, as torch keeps no count of it; `copy_` under `no_grad` is."""

    def __init__(self, side: Side) -> None:
        self.side = side
        self._members: list[tuple[NolaLinear, str]] = []
        self._made: Tensor | None = None
        self._states: list[Any] = []  # of each member's coefficients, when it was made

    def join(self, layer: "NolaLinear", adapter: str) -> int:
        """Take part with a layer's coefficients; its number."""
        self._members.append((layer, adapter))
        return len(self._members) - 1

    def of(self, number: int) -> Tensor:
        """A layer's factor, through which gradients go to its coefficients; on their device."""
        own = self._coefficients(number)
        if self._made is None or _state(own) != self._states[number]:
            every = [self._coefficients(member) for member in range(len(self._members))]
            self._made = combined(torch.stack([each.to(own.device) for each in every]), self.side)
            self._states = [_state(each) for each in every]
        return self._made[number].to(own.device)

    def _coefficients(self, number: int) -> Tensor:
        layer, adapter = self._members[number]  # asked anew each time: PEFT may have replaced them
        return layer.trained(adapter)["alpha" if self.side.side == "A" else "beta"]

    def __getstate__(self) -> dict[str, Any]:
        """For copies of a model: without what was made, which torch does not copy where gradients go through it."""
        return self.__dict__ | {"_made": None}


def _state(c: Tensor) -> tuple[Any, ...]:
    """What is another once a tensor was changed."""
    version = -1 if c.is_inference() else c._version  # of an inference tensor torch keeps no count
    return torch.is_grad_enabled(), id(c), version, c.data_ptr(), c.requires_grad


class NolaLinear(OwnLinear):
    """One adapted linear layer."""

    adapter_layer_names = ("fedsb_nola_alpha", "fedsb_nola_beta")
    other_param_names = ("configs",)

    def __init__(self, base_layer: nn.Linear, adapter_name: str, config: NolaConfig) -> None:
        super().__init__(base_layer)
        self.fedsb_nola_alpha = nn.ParameterDict()
        self.fedsb_nola_beta = nn.ParameterDict()
        self.configs: dict[str, NolaConfig] = {}
        self.shared: dict[str, tuple[tuple[Combined, int], tuple[Combined, int]]] = {}
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: NolaConfig) -> None:
        """Add an adapter of zeros, which shares its matrices with no other layer until `share`."""
        device = self.base_layer.weight.device
        for coefficients in (self.fedsb_nola_alpha, self.fedsb_nola_beta):
            coefficients[adapter_name] = nn.Parameter(torch.zeros(config.bases, dtype=torch.float32, device=device))
        self.configs[adapter_name] = config
        self.share(adapter_name, {})
        self.set_adapter(self.active_adapters)

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's; what was made of it goes too."""
        super().delete_adapter(adapter_name)
        self.shared.pop(adapter_name, None)
        self.configs.pop(adapter_name, None)

    def sides(self, adapter: str) -> tuple[Side, Side]:
        """Where A and B come from."""
        config = self.configs[adapter]
        return Side("A", self.in_features, config.r, config.seed), Side("B", self.out_features, config.r, config.seed)

    def share(self, adapter: str, others: dict[Side, Combined]) -> None:
        """Let A and B be made with those of `others`, which this layer joins."""
        of_a, of_b = (others.setdefault(side, Combined(side)) for side in self.sides(adapter))
        self.shared[adapter] = (of_a, of_a.join(self, adapter)), (of_b, of_b.join(self, adapter))

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r), without α/r."""
        (of_a, i), (of_b, j) = self.shared[adapter]
        return of_a.of(i), of_b.of(j)

    def trained(self, adapter: str) -> dict[str, nn.Parameter]:
        """`alpha` and `beta`, (k,) each."""
        if adapter not in self.fedsb_nola_alpha:
            return {}
        found: Any = {"alpha": self.fedsb_nola_alpha[adapter], "beta": self.fedsb_nola_beta[adapter]}
        return dict(found)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """(α/r)·B·A (out, in), fp32."""
        a, b = self.factors(adapter)
        return self.configs[adapter].scale * (b @ a)

    def adapted(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """W0·x + (α/r)·B·A·x of each."""
        y: Tensor = self.base_layer(x)
        for name in names:
            a, b = (factor.to(x.dtype) for factor in self.factors(name))
            y = y + self.configs[name].scale * functional.linear(functional.linear(x, a), b)
        return y

    def mixed(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """One batch, an adapter per row: rows whose adapters have one rank go through theirs together."""
        rows_of: dict[int, list[int]] = {}
        for row, name in enumerate(names):
            if name != BASE and name in self.fedsb_nola_alpha:
                rows_of.setdefault(self.configs[name].r, []).append(row)
        y: Tensor = self.base_layer(x).clone()
        for rows in rows_of.values():
            index = torch.tensor(rows, device=x.device)
            pairs = [self.factors(names[row]) for row in rows]
            scales = [self.configs[names[row]].scale for row in rows]
            a = torch.stack([a for a, _ in pairs]).to(x.dtype)  # (n, r, in)
            b = torch.stack([scale * b for scale, (_, b) in zip(scales, pairs, strict=True)]).to(x.dtype)
            of_rows = x[index].flatten(1, -2) if x.ndim > 2 else x[index].unsqueeze(1)
            y[index] += (of_rows @ a.mT @ b.mT).view(y[index].shape)
        return y


class NolaModel(OwnTuner):
    """A transformers model whose target layers are `NolaLinear`. A file has all coefficients in one tensor."""

    prefix = "fedsb_nola_"
    tuner_layer_cls = NolaLinear
    called = "NOLA"

    def told(self, config: NolaConfig) -> tuple[NolaConfig]:
        """The configuration."""
        return (config,)

    def check(self, layers: dict[str, Any], config: NolaConfig, adapter_name: str) -> None:
        """Let layers with sides of one length make their factors together."""
        others: dict[Side, Combined] = {}
        for layer in layers.values():
            layer.share(adapter_name, others)

    @classmethod
    def _get_adapter_state_dict(  # type: ignore[override]
        cls,
        model: nn.Module,
        config: NolaConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        found: dict[str, Tensor] = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        held = {name: {part: p.detach() for part, p in parts.items()} for name, parts in _held(model, adapter_name).items()}
        rest = {key: tensor for key, tensor in found.items() if cls.prefix not in key}
        return rest | {f"{PREFIX}{name}.{adapter_name}": t for name, t in pack(rows_of(held), config.bits).items()}

    @classmethod
    def _remap_adapter_state_dict_for_load(  # type: ignore[override]
        cls, model: nn.Module, config: NolaConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Take the coefficients of all layers out of a file."""
        packed = {key.removeprefix(PREFIX): t for key, t in state_dict.items() if key.removeprefix(PREFIX) in (CODES, STEPS)}
        if CODES not in packed:
            raise AdapterError(f"this file has no {PREFIX}{CODES}, and so no NOLA; fetch the file again")
        held = _held(model, adapter_name)
        rows = unpack(packed, 2 * len(held), config.bases)
        layers = layers_of_rows(rows, list(held), ("alpha", "beta"))
        found = {f"{name}.{cls.prefix}{part}.{adapter_name}": t for name, parts in layers.items() for part, t in parts.items()}
        rest = {key: tensor for key, tensor in state_dict.items() if key.removeprefix(PREFIX) not in packed}
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, rest)
        return remapped | found


def _held(model: nn.Module, adapter: str) -> dict[str, dict[str, nn.Parameter]]:
    return {
        name: module.trained(adapter)
        for name, module in model.named_modules()
        if isinstance(module, NolaLinear) and module.trained(adapter)
    }


PREFIX = "base_model.model."
register_peft_method(name="fedsb_nola", config_cls=NolaConfig, model_cls=NolaModel, prefix="fedsb_nola_")


def expanded(layers: Mapping[str, Parts], shapes: Shapes, rank: int, seed: int) -> dict[str, Parts]:
    """Layer → A (r, in) and B (out, r), from layer → α and β (k,), in their dtype."""
    found: dict[str, dict[str, Tensor]] = {name: {} for name in layers}
    for side, part, at in (("A", "alpha", 1), ("B", "beta", 0)):
        for length in sorted({shapes[name][at] for name in layers}):
            names = [name for name in layers if shapes[name][at] == length]
            factors = combined(torch.stack([layers[name][part] for name in names]), Side(side, length, rank, seed))
            for name, factor in zip(names, factors, strict=True):
                found[name][side] = factor
    return {name: parts for name, parts in found.items()}


def _config(rank: int, alpha: float, told: dict[str, Any]) -> NolaConfig:
    return NolaConfig(r=rank, alpha=alpha, **told)


SAYS = (
    "Each layer computes `y = W0 x + (alpha/r) B A x`, where A and B are sums of random matrices that follow from a seed; the "
    "sites train the coefficients alone (NOLA), which are averaged apart."
)
NOLA = Method(
    _config,
    {"alpha": ("k",), "beta": ("k",)},
    (),
    lora_chain,
    exact=False,
    says=SAYS,
    rate=1e-2,  # untuned
    expand=expanded,
    settings=lambda run: {"seed": run.seed, "bases": run.base_count},
)
