"""Bone: every r x r block of W0 is multiplied with a small trained matrix, which is added besides.

    W'_ab = W_ab + W_ab·bone_a + bone_a         form "column": bone (out/r, r, r), a block for each r rows of W0
    W'_ab = W_ab + W_ab·bone_b + bone_b         form "row": bone (in/r, r, r), a block for each r columns

W_ab (r, r) is block (a, b) of W0 (out, in). Kang, "Bone" (Block Affine Transformation), arXiv 2409.15371 before November 2024;
since then the column form is called "Bat", and what that paper is about is `miss.py`. Both start from zero and have no scale.
The update has full rank in general, takes W0 to compute, and is linear in bone: so the mean of the clients' bones has the mean of
their updates, since W0 is the same for everybody.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import gcd
from typing import Any, Literal

import torch
from peft.utils.peft_types import register_peft_method
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from fedsb.adapters.method import Method, Parts
from fedsb.adapters.own_layer import OwnLinear
from fedsb.adapters.own_tuner import OwnConfig, OwnTuner
from fedsb.adapters.peft_type import FEDSB_BONE
from fedsb.errors import AdapterError

Form = Literal["column", "row"]


def update_of(weight: Tensor, bone: Tensor, form: Form) -> Tensor:
    """W' - W0 (out, in), in bone's dtype. Raises AdapterError if bone is not of a layer of this shape."""
    r = bone.shape[-1]
    if len(bone) * r != weight.shape[0 if form == "column" else 1]:  # a single block would be used for all
        raise AdapterError(f"{len(bone)} bones of rank {r} are not of a layer of {tuple(weight.shape)}; use those of this model")
    blocks = weight.to(bone.dtype).unflatten(1, (-1, r)).unflatten(0, (-1, r))  # (out/r, r, in/r, r)
    if form == "column":
        update = torch.einsum("aibk,akj->aibj", blocks, bone) + bone.unsqueeze(2)
    else:
        update = torch.einsum("aibk,bkj->aibj", blocks, bone) + bone.transpose(0, 1)
    return update.reshape(weight.shape)


def check_blocks(shapes: Mapping[str, tuple[int, int]], rank: int) -> None:
    """Raise AdapterError unless `rank` divides both sides of every layer (out, in)."""
    odd = next((name for name, shape in shapes.items() if any(side % rank for side in shape)), None)
    if odd is not None:
        common = gcd(*(side for shape in shapes.values() for side in shape))
        best = max(n for n in range(1, min(rank, common) + 1) if common % n == 0)
        raise AdapterError(
            f"adapter.rank = {rank} does not divide both sides of layer {odd} ({shapes[odd][0]} x {shapes[odd][1]}), as Bone "
            f"needs; set it to {best}, which divides those of all layers, or leave that layer out of adapter.target_modules"
        )


@dataclass
class BoneConfig(OwnConfig):
    """Configuration for `get_peft_model(model, BoneConfig(r=64))`; which layers, `OwnConfig` says.

    Attributes:
        r: side of a block; must divide both sides of every adapted layer.
        form: "column" (a matrix for each r outputs) or "row" (for each r inputs).
    """

    r: int = 64
    form: Form = "column"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = FEDSB_BONE
        if self.r < 1 or self.form not in ("column", "row"):
            raise AdapterError(f'r = {self.r} and form = "{self.form}" make no Bone; set r from 1 on, and form "column" or "row"')


class BoneLinear(OwnLinear):
    """One adapted linear layer."""

    adapter_layer_names = ("fedsb_bone_blocks",)
    other_param_names = ("fedsb_bone_form",)

    def __init__(self, base_layer: nn.Linear, adapter_name: str, r: int, form: Form) -> None:
        super().__init__(base_layer)
        self.fedsb_bone_blocks = nn.ParameterDict()
        self.fedsb_bone_form: dict[str, Form] = {}
        self.update_layer(adapter_name, r, form)

    def update_layer(self, adapter_name: str, r: int, form: Form) -> None:
        """Add an adapter of zeros."""
        count = (self.out_features if form == "column" else self.in_features) // r
        device = self.base_layer.weight.device
        self.fedsb_bone_blocks[adapter_name] = nn.Parameter(torch.zeros(count, r, r, dtype=torch.float32, device=device))
        self.fedsb_bone_form[adapter_name] = form
        self.set_adapter(self.active_adapters)

    def bone(self, adapter_name: str) -> nn.Parameter:
        """The trained blocks of one adapter."""
        bone = self.fedsb_bone_blocks[adapter_name]
        assert isinstance(bone, nn.Parameter)
        return bone

    def trained(self, adapter: str) -> dict[str, nn.Parameter]:
        """`bone`, or of the other form `bone_row`."""
        if adapter not in self.fedsb_bone_blocks:
            return {}
        return {"bone" if self.fedsb_bone_form[adapter] == "column" else "bone_row": self.bone(adapter)}

    def get_delta_weight(self, adapter: str) -> Tensor:
        """W' - W0 (out, in) in the bone's dtype, from the unmerged W0."""
        return update_of(self.unmerged, self.bone(adapter), self.fedsb_bone_form[adapter])

    def adapted(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """W0·x and what each adds."""
        y: Tensor = self.base_layer(x)
        for name in names:
            add = _add_row if self.fedsb_bone_form[name] == "row" else _add_column
            y = y + add(x, self.base_layer.weight, self.bone(name))
        return y


def _add_row(x: Tensor, weight: Tensor, bone: Tensor) -> Tensor:
    """(W' - W0)·x without W': with z_b = bone_b·x_b it is W0·z, and the sum of the z_b under every block of rows."""
    dtype, r = torch.promote_types(x.dtype, bone.dtype), bone.shape[-1]
    pieces = x.to(dtype).unflatten(-1, (len(bone), r))  # (…, in/r, r)
    z = torch.einsum("...bj,bij->...bi", pieces, bone.to(dtype))
    tiled = z.sum(-2).unsqueeze(-2).expand(*z.shape[:-2], weight.shape[0] // r, r).flatten(-2)
    return functional.linear(z.flatten(-2).to(x.dtype), weight) + tiled.to(x.dtype)


def _add_column(x: Tensor, weight: Tensor, bone: Tensor) -> Tensor:
    """(W' - W0)·x with W' - W0 made for the whole batch: that is out·in·r products, as many as those of r tokens.

    It is made again in the backward pass instead of being kept, which would take the memory of another model.
    """

    def add(x: Tensor, bone: Tensor) -> Tensor:
        return functional.linear(x, update_of(weight, bone, "column").to(x.dtype))

    added: Tensor = checkpoint(add, x, bone, use_reentrant=False, preserve_rng_state=False)
    return added


class BoneModel(OwnTuner):
    """A transformers model whose target layers are `BoneLinear`."""

    prefix = "fedsb_bone_"
    tuner_layer_cls = BoneLinear
    called = "Bone"
    unpacked = True
    mixes = "each adapter has weights W' of its own"

    def told(self, config: BoneConfig) -> tuple[int, Form]:
        """Side of a block, and form."""
        return config.r, config.form

    def check(self, layers: dict[str, Any], config: BoneConfig, adapter_name: str) -> None:
        """Raise AdapterError unless the rank divides both sides of every layer."""
        check_blocks({name: (layer.out_features, layer.in_features) for name, layer in layers.items()}, config.r)


register_peft_method(name="fedsb_bone", config_cls=BoneConfig, model_cls=BoneModel, prefix="fedsb_bone_")


def _config(form: Form, rank: int, alpha: float, told: dict[str, Any]) -> BoneConfig:
    return BoneConfig(r=rank, form=form, **told)


def _dense(part: str, form: Form, parts: Parts, weight: Tensor) -> Tensor:
    return update_of(weight, parts[part], form)


def _method(part: str, form: Form, side: str) -> Method:
    return Method(
        partial(_config, form),
        {part: (f"{side}/r", "r", "r")},
        (),
        None,
        exact=True,
        says=f"Each r x r block W of a layer's weight becomes `W + W bone + bone`; the sites train a bone for each r {side}puts "
        f"(Bone, {form} form).",
        rate=RATE,
        dense=partial(_dense, part, form),
    )


# bone alone is added to a weight as in MiSS, and W_ab·bone is of its size or smaller where weights are about 1/√in
RATE = 4e-4  # untuned
BONE = _method("bone", "column", "out")
BONE_ROW = _method("bone_row", "row", "in")
