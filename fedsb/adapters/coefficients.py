"""NOLA's coefficients in a file: all of them in one tensor, in 32, 16, 8 or 4 bits each."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedsb.errors import AdapterError

BITS = (32, 16, 8, 4)
CODES, STEPS = "fedsb_nola_coefficients", "fedsb_nola_steps"


def pack(rows: Tensor, bits: int) -> dict[str, Tensor]:
    """Rows (n, k), fp32 → what a file holds: codes, and below 16 bits the step of each row (n,), bf16.

    32 are fp32, 16 fp16. With 8 and 4 a row is rounded to multiples of a step, of which there are as many on either side of 0 as
    the bits have room for, ±127 or ±7, and the largest number of the row takes the last. Two of 4 bits share a byte.
    """
    if bits == 32:
        return {CODES: rows.float().contiguous()}
    if bits == 16:
        return {CODES: rows.half().contiguous()}
    most = 2 ** (bits - 1) - 1
    steps = (rows.abs().amax(1) / most).bfloat16()
    wide = torch.where(steps == 0, 1.0, steps.float())[:, None]
    codes = (rows / wide).round().clamp(-most, most).to(torch.int8)
    if bits == 8:
        return {CODES: codes, STEPS: steps}
    flat = (codes.flatten() + most + 1).to(torch.uint8)  # 1 … 15
    flat = torch.cat([flat, flat.new_zeros(len(flat) % 2)])
    return {CODES: flat[::2] | flat[1::2] << 4, STEPS: steps}


def unpack(tensors: Mapping[str, Tensor], count: int, width: int) -> Tensor:
    """The rows (count, width) fp32 that `pack` was given, or what rounding left of them.

    Raises AdapterError if a file does not hold as many.
    """
    codes, steps = tensors[CODES], tensors.get(STEPS)
    rows = codes.float()
    if codes.dtype == torch.uint8 and codes.numel() == -(-count * width // 2):
        rows = (torch.stack([codes & 15, codes >> 4], 1).flatten()[: count * width].float() - 8).view(-1, width)
    if rows.shape != (count, width) or (steps is not None and steps.shape != (count,)):
        raise AdapterError(
            f"this file holds other coefficients than {count} times {width}; use the model and settings that it was saved with"
        )
    return rows if steps is None else rows * steps.float()[:, None]


def rows_of(layers: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
    """Layer → part → coefficients (k,) as rows (layers · parts, k), in order of name."""
    return torch.stack([parts[part] for _, parts in sorted(layers.items()) for part in sorted(parts)])


def layers_of_rows(rows: Tensor, layers: Sequence[str], parts: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """What `rows_of` was given."""
    each = iter(rows)
    return {layer: {part: next(each) for part in sorted(parts)} for layer in sorted(layers)}
