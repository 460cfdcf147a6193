"""LoRA-SB: a trained r x r core between two frozen orthonormal frames.

    y = W0·x + B·R·A·x          x (…, in), A (r, in), R (r, r), B (out, r), y (…, out)

Ponkshe et al., "Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank
Fine-Tuning", arXiv 2411.19557, equations 1 to 3; Fed-SB, arXiv 2502.15436, section 3, for the federated use: since B and A
are the same for everybody, the mean of the B·R·A is B·(mean of R)·A. There is no scaling factor: with orthonormal frames
the update does not depend on one (theorem 5).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedsb.adapters.method import Masks, Method, Parts, learning_only
from fedsb.adapters.own_layer import BASE, OwnLinear
from fedsb.adapters.own_tuner import OwnConfig
from fedsb.adapters.peft_type import FEDSB
from fedsb.basis.frames import Basis
from fedsb.basis.spectral import random_basis, weights_basis
from fedsb.errors import AdapterError


@dataclass
class LoraSbConfig(OwnConfig):
    """Configuration for `get_peft_model(model, LoraSbConfig(r=64))`; which layers, `OwnConfig` says.

    Attributes:
        r: rank; a core has r x r numbers.
        basis: "random" (orthonormal from `seed`), "weights" (leading singular vectors of W0), or "later" (zero frames
            that `set_basis` replaces).
        seed: seed of the basis.
        basis_dtype: "fp32" or "bf16", the dtype to which B and A are rounded.
        basis_fingerprint: SHA-256 of B and A; filled in, and checked when an adapter is loaded.
        save_basis: whether `save_pretrained` writes B and A too. Without them loading builds the basis anew from
            `basis` and `seed` and refuses one of another fingerprint.
    """

    kinds: ClassVar[dict[str, type["LoraSbConfig"]]] = {}  # method → the configuration of another core, of the same PEFT type

    method: str = "lora-sb"
    r: int = 64
    basis: Literal["random", "weights", "later"] = "random"
    seed: int = 0
    basis_dtype: Literal["fp32", "bf16"] = "fp32"
    basis_fingerprint: str | None = None
    save_basis: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = FEDSB

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.kinds[cls.method] = cls

    def __new__(cls, *args: Any, **kwargs: Any) -> "LoraSbConfig":
        """PEFT knows one configuration for our type; which of ours a file describes, `method` says.

        Raises AdapterError for a method that this version does not have.
        """
        method = kwargs.get("method", cls.method)
        if method == cls.method:
            return super().__new__(cls)
        if method not in cls.kinds:
            raise AdapterError(f"this adapter is of the method {method!r}, which this version does not have; update fedsb")
        return super().__new__(cls.kinds[method])

    def core(self) -> nn.Module:
        """A new core, zero: z (…, r) → (…, r)."""
        core = nn.Linear(self.r, self.r, bias=False, dtype=torch.float32)
        nn.init.zeros_(core.weight)
        return core

    def build(self, layers: Mapping[str, "LoraSbLinear"]) -> Basis:
        """The basis that is asked for, fp32."""
        if self.basis == "random":
            return random_basis({n: (layer.out_features, layer.in_features) for n, layer in layers.items()}, self.r, self.seed)
        return weights_basis({n: layer.get_base_layer() for n, layer in layers.items()}, self.r, self.seed)


class Frames(nn.Module):
    """B (out, r) and A (r, in) of one layer; the same object serves every adapter on that basis, so it is held once.

    Not persistent: `LoraSbModel` says when B and A go into a file.
    """

    B: Tensor
    A: Tensor

    def __init__(self, b: Tensor, a: Tensor) -> None:
        super().__init__()
        self.register_buffer("B", b, persistent=False)
        self.register_buffer("A", a, persistent=False)

    def equals(self, b: Tensor, a: Tensor) -> bool:
        """Whether these are the same frames, bit for bit."""
        return torch.equal(self.B, b.to(self.B)) and torch.equal(self.A, a.to(self.A))


class LoraSbLinear(OwnLinear):
    """One adapted linear layer. Cores are modules, since Opacus sees only those: `nn.Linear(r, r, bias=False)`, or another with
    such a `weight`, `in_features` and forward pass (`LoraSbConfig.core`)."""

    adapter_layer_names = ("fedsb_core", "fedsb_magnitude")
    other_param_names = ("fedsb_basis",)

    def __init__(self, base_layer: nn.Linear, adapter_name: str, core: nn.Module, magnitudes: bool = False) -> None:
        super().__init__(base_layer)
        self.fedsb_core = nn.ModuleDict()
        self.fedsb_basis = nn.ModuleDict()
        self.fedsb_magnitude = nn.ParameterDict()  # (out,), of adapters that have one
        self.cut: int | None = None  # of cores: in the forward pass only their leading block of this size is used
        self.update_layer(adapter_name, core, magnitudes)

    def update_layer(self, adapter_name: str, core: nn.Module, magnitudes: bool = False) -> None:
        """Add an adapter with that core, and zero frames until `set_frames`."""
        weight, r = self.base_layer.weight, int(core.in_features)  # type: ignore[arg-type]
        self.fedsb_core[adapter_name] = core
        self.fedsb_basis[adapter_name] = Frames(
            torch.zeros(self.out_features, r, device=weight.device),
            torch.zeros(r, self.in_features, device=weight.device),
        )
        if magnitudes:
            self.fedsb_magnitude[adapter_name] = nn.Parameter(torch.ones(self.out_features, dtype=torch.float32))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def set_frames(self, adapter_name: str, b: Tensor, a: Tensor) -> None:
        """Give an adapter its B (out, r) and A (r, in); shared with any adapter that already has the same.

        They are held in the base weight's dtype if that is wider than theirs, which loses nothing and saves a cast; and
        row by row, as files hold them: another order in memory would round products differently.
        """
        weight = self.base_layer.weight
        dtype = torch.promote_types(b.dtype, weight.dtype) if weight.dtype.is_floating_point else b.dtype
        b, a = (t.to(weight.device, dtype).contiguous() for t in (b, a))
        others = (frames for name, frames in self.fedsb_basis.items() if name != adapter_name)
        same = (f for f in others if isinstance(f, Frames) and f.B.dtype == dtype and f.B.shape == b.shape and f.equals(b, a))
        self.fedsb_basis[adapter_name] = next(same, None) or Frames(b, a)

    def frames(self, adapter_name: str) -> Frames:
        """The frames of one adapter."""
        frames = self.fedsb_basis[adapter_name]
        assert isinstance(frames, Frames)
        return frames

    def core(self, adapter_name: str) -> Any:
        """The core of one adapter."""
        return self.fedsb_core[adapter_name]

    def trained(self, adapter: str) -> dict[str, nn.Parameter]:
        """`core`; of RAVAN `heads` and `scales`, of LoRAFusion `fusion` and `magnitude`."""
        if adapter not in self.fedsb_core:
            return {}
        parameters: dict[str, nn.Parameter] = dict(self.core(adapter).named_parameters())
        found = {"core" if name == "weight" else name: parameter for name, parameter in parameters.items()}
        if adapter in self.fedsb_magnitude:
            found["magnitude"] = self.fedsb_magnitude[adapter]  # type: ignore[assignment]
        return found

    def get_delta_weight(self, adapter: str) -> Tensor:
        """B·R·A (out, in) in fp32; with magnitudes m∘(W0 + B·R·A) - W0."""
        frames, core = self.frames(adapter), self.core(adapter)
        delta: Tensor = frames.B.float() @ (core.weight.float() @ frames.A.float())
        if adapter not in self.fedsb_magnitude:
            return delta
        weight = self.unmerged.float()
        scaled: Tensor = self.fedsb_magnitude[adapter][:, None] * (weight + delta)
        return scaled - weight

    def adapted(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """y + B·R·A·x of each."""
        y: Tensor = self.base_layer(x)
        base = y
        for name in names:
            frames, core = self.frames(name), self.core(name)
            if name in self.fedsb_magnitude:
                y = y + self._scaled(self._add(x, base, frames, core, self.cut), [name]) - base
            else:
                y = self._add(x, y, frames, core, self.cut)
        return y

    def _scaled(self, y: Tensor, names: Sequence[str]) -> Tensor:
        """y (n, …, out) times the magnitudes of each row's adapter, or of all rows', but for the bias."""
        one = torch.ones(self.out_features, device=y.device)
        m = torch.stack([self.fedsb_magnitude.get(name, one) for name in names]).to(y.dtype)
        m = m.view(len(names), *[1] * (y.ndim - 2), -1) if len(names) > 1 else m[0]
        bias = self.base_layer.bias
        return m * y if bias is None else m * (y - bias) + bias

    @staticmethod
    def _add(x: Tensor, y: Tensor, frames: Frames, core: nn.Module, cut: int | None) -> Tensor:
        dtype = torch.promote_types(x.dtype, frames.A.dtype)
        b, a = frames.B[:, :cut].to(dtype), frames.A[:cut].to(dtype)
        h = functional.linear(x.to(dtype), a)  # (…, r)
        if cut is not None:  # the core is a module, so it takes all of its inputs; those beyond the block are zero
            h = functional.pad(h, (0, frames.A.shape[0] - cut))
        wide = next(core.parameters()).dtype  # the core is the fp32 master, whatever the model computes in
        h = core(h.to(wide)).to(dtype)[..., :cut]
        if dtype != y.dtype:
            return y + functional.linear(h, b).to(y.dtype)
        rows, h = y.reshape(-1, y.shape[-1]), h.reshape(-1, h.shape[-1])
        flat = torch.addmm(rows, h, b.T)  # y + B·R·A·x in one pass
        return flat.view(y.shape)

    def mixed(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """One batch, a core per row: rows that share a basis go through it together."""
        rows_of: dict[int, list[int]] = {}
        for row, name in enumerate(names):
            if name != BASE and name in self.fedsb_core:
                rows_of.setdefault(id(self.frames(name)), []).append(row)
        y: Tensor = self.base_layer(x).clone()
        for rows in rows_of.values():
            frames = self.frames(names[rows[0]])
            index = torch.tensor(rows, device=x.device)
            cores = torch.stack([self.core(names[row]).weight for row in rows])  # (n, r, r)
            dtype = torch.promote_types(x.dtype, frames.A.dtype)
            h = functional.linear(x[index].to(dtype), frames.A.to(dtype))  # (n, …, r)
            mixed = torch.bmm(h.to(cores.dtype).flatten(1, -2) if h.ndim > 2 else h.to(cores.dtype).unsqueeze(1), cores.mT)
            y[index] += functional.linear(mixed.view(h.shape).to(dtype), frames.B.to(dtype)).to(y.dtype)
        return self._scaled(y, names) if any(name in self.fedsb_magnitude for name in names) else y


@contextmanager
def block_of(layers: Sequence[LoraSbLinear], width: int, masks: Masks) -> Iterator[None]:
    """While open, only the leading block of that width of each core is used; on leaving, only what `masks` name has changed."""
    for layer in layers:
        layer.cut = width
    try:
        with learning_only(masks):
            yield
    finally:
        for layer in layers:
            layer.cut = None


def _config(rank: int, alpha: float, told: dict[str, Any]) -> LoraSbConfig:
    return LoraSbConfig(r=rank, basis="later", **told)


def _chain(parts: Parts, b: Tensor | None, a: Tensor | None, scale: float) -> tuple[Tensor, ...]:
    assert b is not None and a is not None
    return b, parts["core"], a


SAYS = "The sites share a frozen basis (B, A); each layer computes `y = W0 x + B R A x`, and only the r x r core R is trained."
LORA_SB = Method(
    _config, {"core": ("r", "r")}, ("B", "A"), _chain, exact=True, says=SAYS, native=lambda parts: {"weight": parts["core"]}
)
