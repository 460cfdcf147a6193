"""The one tuner of this project: it makes `get_peft_model`, `save_pretrained`, `from_pretrained` and `adapter_names=` work."""

from typing import Any

import torch
from peft.utils.peft_types import register_peft_method
from torch import Tensor, nn

from fedsb.adapters.lora_fusion import Fusion, LoraFusionConfig, LoraFusionProductConfig
from fedsb.adapters.lora_sb import LoraSbConfig, LoraSbLinear
from fedsb.adapters.lora_xs import LoraXsConfig
from fedsb.adapters.nested_sb import NestedSbConfig
from fedsb.adapters.own_tuner import OwnTuner
from fedsb.adapters.ravan import Heads, RavanConfig
from fedsb.adapters.refreshed_sb import RefreshedSbConfig
from fedsb.basis.frames import DTYPES, Basis, fingerprint_of
from fedsb.basis.spectral import check_rank
from fedsb.errors import BasisError

__all__ = [
    "LoraFusionConfig",
    "LoraFusionProductConfig",
    "LoraSbConfig",
    "LoraSbModel",
    "LoraXsConfig",
    "NestedSbConfig",
    "RavanConfig",
    "RefreshedSbConfig",
    "adapted_layers",
    "basis_of",
    "set_basis",
]


def adapted_layers(model: nn.Module) -> dict[str, LoraSbLinear]:
    """Layer name (its path in the base model) → adapted layer, in the model's order."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraSbLinear)
    }


def set_basis(model: nn.Module, basis: Basis, adapter: str = "default") -> None:
    """Give every adapted layer its frames, and its core R0, or zero.

    Raises BasisError if the layers, shapes or rank of `basis` are not those of the model, before anything is changed.
    """
    layers = {name: layer for name, layer in adapted_layers(model).items() if adapter in layer.fedsb_core}
    if layers.keys() != basis.B.keys():
        odd = sorted(layers.keys() ^ basis.B.keys())[0]
        raise BasisError(f"layer {odd} is in only one of model and basis; use the basis that was built for this model")
    for name, layer in layers.items():
        rank = layer.core(adapter).in_features
        if basis.B[name].shape != (layer.out_features, rank) or basis.A[name].shape != (rank, layer.in_features):
            raise BasisError(f"layer {name}: the basis has another shape; use the basis that was built for this model")
    for name, layer in layers.items():
        layer.set_frames(adapter, basis.B[name], basis.A[name])
        with torch.no_grad():
            _start(layer.core(adapter), basis.R0.get(name))
    for config in [c for c in [getattr(model, "peft_config", {}).get(adapter)] if c is not None]:
        config.basis_fingerprint = basis.fingerprint


def basis_of(model: nn.Module, adapter: str = "default") -> Basis:
    """The basis of one adapter, in the dtype of its configuration, without R0."""
    config: LoraSbConfig = model.peft_config[adapter]  # type: ignore[union-attr,index,assignment]
    dtype = DTYPES[config.basis_dtype]
    layers = {name: layer for name, layer in adapted_layers(model).items() if adapter in layer.fedsb_core}
    return Basis(
        {name: layer.frames(adapter).B.to(dtype) for name, layer in layers.items()},
        {name: layer.frames(adapter).A.to(dtype) for name, layer in layers.items()},
        {},
    )


def _start(core: nn.Linear | Heads | Fusion, r0: Tensor | None) -> None:
    if isinstance(core, Heads | Fusion):
        core.start()
    elif r0 is None:
        core.weight.zero_()
    else:
        core.weight.copy_(r0)


class LoraSbModel(OwnTuner):
    """A transformers model whose target layers are `LoraSbLinear`, for LoRA-SB and RAVAN."""

    prefix = "fedsb_"
    tuner_layer_cls = LoraSbLinear

    called = "LoRA-SB"

    def told(self, config: LoraSbConfig) -> tuple[nn.Module, bool]:
        """A new core, and whether outputs have magnitudes."""
        return config.core(), getattr(config, "magnitudes", False)

    def check(self, layers: dict[str, Any], config: LoraSbConfig, adapter_name: str) -> None:
        """Hold the rank against all layers, so that the smallest is named, and build the basis that is asked for.

        On loading, `_remap_adapter_state_dict_for_load` has the last word on the basis.
        """
        if not isinstance(config, LoraFusionConfig):  # a pool's frames are not orthonormal, so they need no room
            check_rank({name: (layer.out_features, layer.in_features) for name, layer in layers.items()}, config.r)
        if config.basis != "later" and config.basis_fingerprint is None:  # else it comes later, or from a file
            _build(self.model, config, adapter_name)

    @classmethod
    def _get_adapter_state_dict(  # type: ignore[override]
        cls,
        model: nn.Module,
        config: LoraSbConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        found: dict[str, Tensor] = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        if config.save_basis:
            dtype = DTYPES[config.basis_dtype]
            for name, module in model.named_modules():
                if isinstance(module, LoraSbLinear) and adapter_name in module.fedsb_core:
                    frames = module.frames(adapter_name)
                    found[f"{name}.fedsb_B.{adapter_name}"] = frames.B.to(dtype)
                    found[f"{name}.fedsb_A.{adapter_name}"] = frames.A.to(dtype)
        return found

    @classmethod
    def _remap_adapter_state_dict_for_load(  # type: ignore[override]
        cls, model: nn.Module, config: LoraSbConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Take B and A out of a file, or build them anew, and refuse those of another fingerprint."""
        b = {key.removesuffix(".fedsb_B"): t for key, t in state_dict.items() if key.endswith(".fedsb_B")}
        a = {key.removesuffix(".fedsb_A"): t for key, t in state_dict.items() if key.endswith(".fedsb_A")}
        if b:
            strip = "base_model.model."
            b, a = ({k.removeprefix(strip): t for k, t in side.items()} for side in (b, a))
            whole = a.keys() == b.keys()
            if not whole or config.basis_fingerprint not in (None, fingerprint_of(b, a)):
                raise BasisError("the basis in this file is not the one its core was trained on; fetch the file again")
            set_basis(model, Basis(b, a, {}), adapter_name)
        elif config.basis_fingerprint is not None:
            if config.basis == "later":
                raise BasisError("this file holds no basis, and none can be rebuilt; save the adapter with save_basis=True")
            _build(model, config, adapter_name)
        rest = {key: t for key, t in state_dict.items() if not key.endswith((".fedsb_B", ".fedsb_A"))}
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, rest)
        return remapped


def _build(model: nn.Module, config: LoraSbConfig, adapter: str) -> None:
    """Build the basis that `config` describes and hold it against the fingerprint, if there is one."""
    layers = {name: layer for name, layer in adapted_layers(model).items() if adapter in layer.fedsb_core}
    basis = config.build(layers).to(DTYPES[config.basis_dtype])
    if config.basis_fingerprint not in (None, basis.fingerprint):
        raise BasisError(
            f'the basis rebuilt here from basis = "{config.basis}" and seed = {config.seed} is not the one this core was '
            "trained on; load an adapter that was saved with save_basis=True"
        )
    for name, layer in layers.items():
        layer.set_frames(adapter, basis.B[name], basis.A[name])
        if name in basis.R0:
            with torch.no_grad():
                layer.core(adapter).weight.copy_(basis.R0[name])
    config.basis_fingerprint = basis.fingerprint


register_peft_method(name="fedsb", config_cls=LoraSbConfig, model_cls=LoraSbModel, prefix="fedsb_")
