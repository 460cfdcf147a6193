"""What the layers of this project's own tuners have in common."""

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

BASE = "__base__"  # PEFT's name, in adapter_names, for a row without an adapter


class OwnLinear(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """One adapted linear layer. What is trained is an fp32 master, whatever the model computes in.

    Merged, the base layer's weight is W0 and the updates, which are all of W0; unmerging puts W0 back bit for bit, from a copy.
    """

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.kept: Tensor | None
        self.register_buffer("kept", None, persistent=False)  # W0 while adapters are merged
        self.merged_adapters: list[str] = []
        self._disable_adapters = False

    def trained(self, adapter: str) -> dict[str, nn.Parameter]:
        """Part of the method → trained parameter of an adapter; nothing if the layer does not have that adapter."""
        raise NotImplementedError

    def frozen(self, adapter: str) -> dict[str, Tensor]:
        """Part of the method → what is told of an adapter besides, and not trained."""
        return {}

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The update of the weight (out, in), of the unmerged W0, in fp32 or wider."""
        raise NotImplementedError

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """As PEFT's, but for the dtype: PEFT makes it the base layer's, which rounds the masters of a bf16 model."""
        target = self.base_layer.weight.device if device is None else device
        for items in (getattr(self, name) for name in self.adapter_layer_names + self.other_param_names):
            if not isinstance(items, nn.ModuleDict | nn.ParameterDict) or adapter_name not in items:
                continue
            tensors = [*items.parameters(), *items.buffers()]
            if not any(tensor.is_meta for tensor in tensors):
                items[adapter_name] = items[adapter_name].to(target)

    @property
    def unmerged(self) -> Tensor:
        """W0 (out, in), also while adapters are merged."""
        weight: Tensor = self.base_layer.weight if self.kept is None else self.kept
        return weight

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add updates to the base weight. Raises ValueError, and changes nothing, if `safe_merge` finds NaN or infinity."""
        for name in check_adapters_to_merge(self, adapter_names):
            if not self.trained(name):
                continue
            weight = self.base_layer.weight
            merged = (weight.data + self.get_delta_weight(name).data).to(weight.dtype)  # summed in the wider dtype
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            self.kept = weight.data if self.kept is None else self.kept
            weight.data = merged
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Put W0 back, bit for bit: it is kept, since what is merged need not tell it."""
        if self.kept is not None:
            self.base_layer.weight.data, self.kept = self.kept, None
            self.merged_adapters.clear()

    def plain(self, x: Any, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Tensor | None:
        """The base layer's output where no adapter is to be added to it: they are disabled, or merged.

        Raises ValueError if `adapter_names` says that rows differ, and adapters are merged.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.merged and adapter_names is not None:
            raise ValueError("adapter_names cannot be combined with merged adapters; call unmerge_adapter() first")
        return self.base_layer(x, *args, **kwargs) if self.disable_adapters or self.merged else None

    def __repr__(self) -> str:
        return "fedsb." + super().__repr__()
