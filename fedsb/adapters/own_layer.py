"""What the layers of this project's own tuners have in common."""

from abc import abstractmethod
from collections.abc import Sequence

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

    @abstractmethod
    def trained(self, adapter: str) -> dict[str, nn.Parameter]:
        """Part of the method → trained parameter of an adapter; nothing if the layer does not have that adapter."""

    def frozen(self, adapter: str) -> dict[str, Tensor]:
        """Part of the method → what is told of an adapter besides, and not trained."""
        return {}

    @abstractmethod
    def get_delta_weight(self, adapter: str) -> Tensor:
        """The update of the weight (out, in), of the unmerged W0, in fp32 or wider."""

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

    def forward(self, x: Tensor, adapter_names: Sequence[str] | None = None) -> Tensor:
        """x (…, in) → (…, out): the active adapters, or with `adapter_names` adapter_names[i] for row i of a batch.

        Raises ValueError if there is not a name for each row, or adapters are merged, which are the same for all rows.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.merged and adapter_names is not None:
            raise ValueError("adapter_names cannot be combined with merged adapters; call unmerge_adapter() first")
        if self.disable_adapters or self.merged:
            plain: Tensor = self.base_layer(x)
            return plain
        if adapter_names is None:
            held = getattr(self, self.adapter_layer_names[0])
            return self.adapted(x, [name for name in self.active_adapters if name in held])
        if len(adapter_names) != len(x):
            raise ValueError(
                f"adapter_names has {len(adapter_names)} names for a batch of {len(x)} rows; give one for each row "
                "(generate: beams as num_beams=, and num_return_sequences=1)"
            )
        return self.mixed(x, adapter_names)

    @abstractmethod
    def adapted(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """The output with these adapters, which the layer has, for all rows."""

    def mixed(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """The output with a name for each row: of an adapter, of one that this layer does not have, or `BASE`."""
        raise ValueError(f"{type(self).__name__} has one adapter for all rows; use set_adapter")

    def __repr__(self) -> str:
        return "fedsb." + super().__repr__()
