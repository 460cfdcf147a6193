"""What is folded into a base model's weights, and taken out of them again."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedsb.basis.frames import Fold


def fold_into(layers: Mapping[str, Any], folds: Sequence[Fold], pristine: dict[str, Tensor]) -> None:
    """Set the weight of every adapted layer to W0 + Σ U·V, or to W0 bit for bit where nothing is folded in.

    Args:
        layers: layer name → adapted layer.
        folds: oldest first.
        pristine: layer name → W0, of every layer that was ever changed; copies are added here before the first change.
    """
    for name, layer in layers.items():
        weight, pairs = layer.get_base_layer().weight, [fold[name] for fold in folds if name in fold]
        if pairs and name not in pristine:
            pristine[name] = weight.detach().clone()
        if name in pristine:
            with torch.no_grad():
                weight.copy_(pristine[name])
                for u, v in pairs:
                    weight.addmm_(u.to(weight.device), v.to(weight.device))
