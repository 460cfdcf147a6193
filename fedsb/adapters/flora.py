"""FLoRA ("Fast LoRA"): what goes in and what comes out of W0 is multiplied, entry by entry.

    y = W0·x + (α/r)·Σ_j b_j∘(W0·(a_j∘x))          form "residual": W0∘(1 + (α/r)·B·A)
    y = Σ_j b_j∘(W0·(a_j∘x))                       form "ones":     W0∘(B·A)

j = 1…r, x (…, in), a_j the rows of A (r, in), b_j the columns of B (out, r), y (…, out); a bias is added once. Wen, Chaudhuri,
"Batched Low-Rank Adaptation of Foundation Models", arXiv 2312.05677, equations 4 to 6, where every row of a batch has an A and B
of its own; they are vectors, so rows of different adapters go through W0 in one product, r vectors wide for each token, and
W0∘(B·A) (out, in) is never formed.

The paper does not say how it starts, nor whether r is summed or averaged over ("such as torch.mean"); of W0∘(B·A) the exact one
is the sum. "residual" is HiRA's (Huang et al., ICLR 2025): B = 0 and A ~ N(0, 1), so that inputs are scaled by numbers of size 1;
the sum by default (α = r), and with α = 1 the mean. "ones" starts from b_1 = a_1 = 1, the other b_j = 0, and needs no product
with W0 besides: at rank 1 an adapted layer costs little more than the plain one.

Averaging A and B apart is not averaging B·A, as with LoRA.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from peft.utils.peft_types import register_peft_method
from torch import Tensor, nn
from torch.nn import functional

from fedsb.adapters.method import Method, Parts
from fedsb.adapters.own_layer import BASE, OwnLinear
from fedsb.adapters.own_tuner import OwnConfig, OwnTuner
from fedsb.adapters.peft_type import FEDSB_FLORA
from fedsb.errors import AdapterError

Form = Literal["residual", "ones"]


@dataclass
class FloraConfig(OwnConfig):
    """Configuration for `get_peft_model(model, FloraConfig(r=4))`; which layers, `OwnConfig` says.

    Attributes:
        r: how many pairs of vectors a layer has.
        alpha: of form "residual": updates are multiplied with alpha / r. None: r, which is the sum; 1 is the mean.
        form: "residual" or "ones".
    """

    r: int = 4
    alpha: float | None = None
    form: Form = "residual"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = FEDSB_FLORA
        if self.r < 1 or self.form not in ("residual", "ones"):
            raise AdapterError(
                f'r = {self.r} and form = "{self.form}" make no FLoRA; set r from 1 on, and form "residual" or "ones"'
            )
        if self.form == "ones" and self.alpha not in (None, self.r):
            raise AdapterError('alpha scales what form = "residual" adds, and form = "ones" adds nothing; leave it out')

    @property
    def scale(self) -> float:
        """α/r."""
        return 1.0 if self.alpha is None else self.alpha / self.r


class Inwards(nn.Module):
    """x (…, in) → a_j∘x (…, r, in). Owns A, so that Opacus finds gradients of single records (by functorch)."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        """Multiplied with each row of A."""
        return (x.unsqueeze(-2) * self.weight).to(x.dtype)  # in fp32: near 1, bf16 has no numbers for what is learnt


class Outwards(nn.Module):
    """z (…, r, out) → Σ_j b_j∘z_j (…, out). Owns B (out, r)."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, z: Tensor) -> Tensor:
        """Each z_j multiplied with its column of B, and summed."""
        return (z * self.weight.T).sum(-2).to(z.dtype)


class FloraLinear(OwnLinear):
    """One adapted linear layer."""

    adapter_layer_names = ("fedsb_flora_a", "fedsb_flora_b")
    other_param_names = ("scales", "forms")

    def __init__(self, base_layer: nn.Linear, adapter_name: str, config: FloraConfig) -> None:
        super().__init__(base_layer)
        self.fedsb_flora_a = nn.ModuleDict()
        self.fedsb_flora_b = nn.ModuleDict()
        self.scales: dict[str, float] = {}
        self.forms: dict[str, Form] = {}
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: FloraConfig) -> None:
        """Add an adapter that changes nothing."""
        ones, device = config.form == "ones", self.base_layer.weight.device
        a = start_of_a((config.r, self.in_features), None, ones)
        b = start_of_b((self.out_features, config.r), None, ones)
        self.fedsb_flora_a[adapter_name] = Inwards(a.to(device))
        self.fedsb_flora_b[adapter_name] = Outwards(b.to(device))
        self.scales[adapter_name], self.forms[adapter_name] = config.scale, config.form
        self.set_adapter(self.active_adapters)

    def trained(self, adapter: str) -> dict[str, nn.Parameter]:
        """`a` (r, in) and `b` (out, r); of the form "ones" `a_ones` and `b_ones`, which are something else."""
        if adapter not in self.fedsb_flora_a:
            return {}
        a, b = NAMES[self.forms[adapter]]
        found: Any = {a: self.fedsb_flora_a[adapter].weight, b: self.fedsb_flora_b[adapter].weight}
        return dict(found)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """W0∘(what the method's chain says) (out, in) in fp32 or wider."""
        left, right = _chain(self.forms[adapter], dict(self.trained(adapter)), None, None, self.scales[adapter])
        return self.unmerged.to(left.dtype) * (left @ right)

    def adapted(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """What each makes of W0·x, together."""
        of_w0 = 1 - sum(self.forms[name] == "ones" for name in names)  # W0 as often as it is not in what is added
        y = of_w0 * self._times_w0(x) if of_w0 else 0.0
        for name in names:
            added = self.fedsb_flora_b[name](self._times_w0(self.fedsb_flora_a[name](x)))
            y = y + (added if self.scales[name] == 1 else self.scales[name] * added)
        bias = self.base_layer.bias
        found: Tensor = y if bias is None else y + bias
        return found

    def _times_w0(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.base_layer.weight)

    def mixed(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """One batch, an adapter per row, by one product with W0 of as many vectors a token as the largest rank in the batch.

        A row of smaller rank is filled up with b_j = 0. W0·x itself is one more vector, of which a row takes 1, or 0 if its form
        is "ones"; where all are, it is left out.
        """
        each = list(dict.fromkeys(names))
        held = [name for name in each if name != BASE and name in self.fedsb_flora_a]
        ones = [name in held and self.forms[name] == "ones" for name in each]
        ranks = [self.trained(name)[NAMES[self.forms[name]][0]].shape[0] for name in held]
        width = max(ranks, default=0) + (not all(ones))
        a, b = (torch.zeros(len(each), width, size, device=x.device) for size in (self.in_features, self.out_features))
        for at, name in enumerate(each):
            if not ones[at]:
                a[at, -1], b[at, -1] = 1, 1
            if name in held:
                rows, columns = self.trained(name).values()
                a[at, : len(rows)], b[at, : len(rows)] = rows, self.scales[name] * columns.T
        index = torch.tensor([each.index(name) for name in names], device=x.device)
        y = batched(x, partial(functional.linear, weight=self.base_layer.weight), a[index], b[index])
        return y if self.base_layer.bias is None else y + self.base_layer.bias


def batched(x: Tensor, through: Callable[[Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    """Σ_j b_j∘(W0·(a_j∘x)) with vectors of its own for each row of a batch, by one product with W0.

    Args:
        x: (n, …, in).
        through: W0·h for h (…, in) → (…, out), without a bias.
        a: (n, r, in), of each row.
        b: (n, r, out), of each row.

    Returns (n, …, out).
    """
    shape = (len(x), *[1] * (x.ndim - 2), a.shape[1])
    z = through((x.unsqueeze(-2) * a.view(*shape, -1)).to(x.dtype))  # (n, …, r, out)
    return (z * b.view(*shape, -1)).sum(-2).to(x.dtype)


class FloraModel(OwnTuner):
    """A transformers model whose target layers are `FloraLinear`."""

    prefix = "fedsb_flora_"
    tuner_layer_cls = FloraLinear
    called = "FLoRA"
    unpacked = True

    def told(self, config: FloraConfig) -> tuple[FloraConfig]:
        """The configuration."""
        return (config,)


register_peft_method(name="fedsb_flora", config_cls=FloraConfig, model_cls=FloraModel, prefix="fedsb_flora_")

NAMES: dict[Form, tuple[str, str]] = {"residual": ("a", "b"), "ones": ("a_ones", "b_ones")}


def start_of_a(shape: tuple[int, ...], generator: torch.Generator | None, ones: bool = False) -> Tensor:
    """A (r, in) at the start, fp32: N(0, 1), or with `ones` the first row 1."""
    a = torch.randn(shape, generator=generator)
    if ones:
        a[0] = 1
    return a


def start_of_b(shape: tuple[int, ...], generator: torch.Generator | None, ones: bool = False) -> Tensor:
    """B (out, r) at the start, fp32: 0, or with `ones` the first column 1."""
    b = torch.zeros(shape)
    if ones:
        b[:, 0] = 1
    return b


def _config(form: Form, rank: int, alpha: float, told: dict[str, Any]) -> FloraConfig:
    return FloraConfig(r=rank, alpha=alpha if form == "residual" else None, form=form, **told)


def _chain(form: Form, parts: Parts, b: Tensor | None, a: Tensor | None, scale: float) -> tuple[Tensor, ...]:
    """What W0 is multiplied with, less one: of the form "ones" [B, -1]·[A; 1]."""
    inner, outer = (parts[part] for part in NAMES[form])
    if form == "residual":
        return scale * outer, inner
    return torch.cat([outer, -torch.ones_like(outer[:, :1])], 1), torch.cat([inner, torch.ones_like(inner[:1])])


SAYS = "Each layer multiplies its weight, entry by entry: `W = W0 * ({}B A)`; the sites train A and B, which are averaged apart."


def _method(form: Form) -> Method:
    a, b = NAMES[form]
    ones = form == "ones"
    return Method(
        partial(_config, form),
        {a: ("r", "in"), b: ("out", "r")},
        (),
        partial(_chain, form),
        exact=False,
        says=SAYS.format("" if ones else "1 + (alpha/r) "),
        rate=RATE,
        multiplies=True,
        draws={a: partial(start_of_a, ones=ones)} | ({b: partial(start_of_b, ones=True)} if ones else {}),
    )


RATE = 5e-3  # untuned: the paper's 8e-3 is of another start
FLORA = _method("residual")
FLORA_ONES = _method("ones")
