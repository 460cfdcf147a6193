"""Base models with fewer bits: which of torchao's and bitsandbytes' ways a name stands for. Weights are quantised while they are
loaded, so the whole model is never in memory; embeddings and the output head stay as they are."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias, get_args

import torch
from transformers import BitsAndBytesConfig, TorchAoConfig

from fedsb.errors import ConfigError

Quantised: TypeAlias = Literal["int8", "int4", "nf4"]
KINDS: tuple[Quantised, ...] = get_args(Quantised)
NF4_BLOCK = 64  # bitsandbytes' own
GROUP = 32  # weights that share one scale, of int4; the least that its kernels take


def quantisation(kind: Quantised, dtype: torch.dtype, device: torch.device) -> Any:
    """What transformers is told to load weights so.

        int8    torchao, one scale for each row, products in `dtype`
        int4    torchao, one scale and zero for each 32 weights of a row; products in bf16
        nf4     bitsandbytes (QLoRA's NormalFloat, arXiv 2305.14314), one scale for each 64; products in `dtype`

    Raises ConfigError if the library is missing, or cannot do it in this dtype.
    """
    if kind == "int4" and dtype != torch.bfloat16:
        raise ConfigError("int4 multiplies in bf16 alone; choose --dtype bf16, or int8 or nf4")
    try:
        with _quiet():
            if kind == "nf4":
                import bitsandbytes  # noqa: F401

                return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
            import torchao.quantization as torchao

            if kind == "int8":
                return TorchAoConfig(torchao.Int8WeightOnlyConfig())
            if device.type == "cpu":  # torchao keeps its kernels for CPUs there
                from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig

                return TorchAoConfig(PrototypeInt4WeightOnlyConfig(group_size=GROUP))
            return TorchAoConfig(torchao.Int4WeightOnlyConfig(group_size=GROUP))
    except ImportError:
        needed = "bitsandbytes" if kind == "nf4" else "torchao"
        raise ConfigError(f"{kind} needs {needed}, which is not installed; pip install 'fedsb[quantised]'") from None


def require_fitting(model: Any, kind: Quantised) -> None:
    """Raise ConfigError for a layer that the library cannot multiply with here, since it would say so at the first question."""
    if kind != "nf4" or model.device.type != "cpu":
        return
    for name, layer in model.named_modules():
        if hasattr(layer, "quant_state") and layer.in_features % NF4_BLOCK:
            raise ConfigError(
                f"{name} of {type(model).__name__} has {layer.in_features} inputs, and nf4 takes multiples of {NF4_BLOCK} on a "
                "CPU; choose int8"
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """torchao tells at its import of every kernel that is for another machine."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(before)
