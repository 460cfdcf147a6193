"""Soft prompts that a client sends along (LoPA, arXiv 2405.15282): embeddings that go before the embedded tokens of a text, so
that a server needs nothing of the adapter that made them. On the wire a safetensors file with one tensor, `prompt`, in base64."""

import base64
import binascii
from collections.abc import Sequence

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from fedsb.errors import RequestError

TENSOR = "prompt"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def encoded(prompt: Tensor) -> str:
    """Z (m, d), as `LopaModel.prompts` makes it for one text → the `prompt_embeds` of a request."""
    return base64.b64encode(save({TENSOR: prompt.detach().cpu().contiguous()})).decode()


def decoded(text: str, width: int) -> Tensor:
    """`prompt_embeds` → (m, width). Raises RequestError with what is wrong."""
    try:
        tensors = load(base64.b64decode(text, validate=True))
    except (binascii.Error, ValueError, SafetensorError, KeyError):
        raise RequestError("prompt_embeds: is no safetensors file in base64; send one with a tensor `prompt`") from None
    if tensors.keys() != {TENSOR}:
        raise RequestError("prompt_embeds: holds other tensors than one `prompt`; send that alone")
    prompt = tensors[TENSOR]
    if prompt.ndim != 2 or not len(prompt) or prompt.shape[1] != width or prompt.dtype not in DTYPES:
        kind = f"{tuple(prompt.shape)} in {str(prompt.dtype).removeprefix('torch.')}"
        raise RequestError(f"prompt_embeds: is {kind}, and this model takes (tokens, {width}) in fp32, fp16 or bf16")
    if not bool(prompt.isfinite().all()):
        raise RequestError("prompt_embeds: holds NaN or infinity; send finite numbers")
    return prompt


class SoftEmbedding(nn.Module):
    """A model's input embedding, some of whose outputs are replaced. rows: where in a packed batch, and by what (k, d)."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.rows: Sequence[tuple[int, Tensor]] = ()

    def forward(self, ids: Tensor) -> Tensor:
        """ids (1, T) → (1, T, d)."""
        found: Tensor = self.base(ids)
        for at, values in self.rows:
            found[0, at : at + len(values)] = values.to(found)
        return found
