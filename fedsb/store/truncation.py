"""An update that is no short product, as the plain LoRA that comes closest to it at some rank."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedsb.adapters.methods import METHODS
from fedsb.basis.spectral import leading_frames, seeded
from fedsb.errors import BasisError, StoreError
from fedsb.store.adapters import StoredAdapter


def truncated(
    stored: StoredAdapter, weights: Mapping[str, Tensor], rank: int | None, dtype: torch.dtype
) -> tuple[dict[str, tuple[Tensor, Tensor]], float]:
    """Layer → (lora_B (out, k), lora_A (k, in)) in `dtype`, and what is lost: ‖ΔW - B·A‖_F / ‖ΔW‖_F over all layers, of the
    matrices as they are stored, in fp64.

    The rank k is by default 2r: of Bone's update W·bone + bone, the second summand repeats one block and so has rank r; as many
    again are for the first, whose rank is full. Where a side of a layer is smaller than k, the rest of its LoRA is zero.

    Args:
        stored: an adapter of a method that `takes_weights`.
        weights: layer → W0 (out, in), those that the adapter was trained on.
        rank: k; at the most the smaller side of the largest layer, where nothing is lost.

    Raises BasisError without a layer's weights, AdapterError with those of another shape, StoreError for a rank that cannot be.
    """
    method = METHODS[stored.manifest.method]
    lacking = next((layer for layer in stored.layers if layer not in weights), None)
    if lacking is not None:
        raise BasisError(f"layer {lacking} is not in the base model; export with the model that the adapter was trained on")
    most = max(min(weights[layer].shape) for layer in stored.layers)
    k = min(2 * stored.manifest.rank, most) if rank is None else rank
    if not 0 < k <= most:
        raise StoreError(f"--rank {k}: an update of this model has at most rank {most}; take 1 to {most}")
    found, lost, whole = {}, 0.0, 0.0
    for layer, parts in stored.layers.items():
        wide = {part: tensor.double() for part, tensor in parts.items()}
        update = method.update(wide, None, None, stored.manifest.scale, weights[layer].detach())
        b, s, a = leading_frames(update, min(k, *update.shape), seeded(0, "export", layer))
        lora_b, lora_a = update.new_zeros(update.shape[0], k), update.new_zeros(k, update.shape[1])
        lora_b[:, : len(s)], lora_a[: len(s)] = b * s, a
        found[layer] = lora_b.to(dtype), lora_a.to(dtype)
        lost += float((update - found[layer][0].double() @ found[layer][1].double()).square().sum())
        whole += float(update.square().sum())
    return found, (lost / whole) ** 0.5 if whole else 0.0
