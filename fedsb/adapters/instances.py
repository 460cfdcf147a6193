"""What an instance (one prompt) is like: the embedding of its text by a frozen sentence encoder."""

import hashlib
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, AutoModel

from fedsb.abilities import PROMPTING
from fedsb.config import RunConfig
from fedsb.models import Source, load_encoder, load_tokenizer, locate

AT_ONCE = 64  # texts
LONGEST = 256  # tokens of a text; of a longer one its end is taken, where a prompt asks


def encoder_of(config: RunConfig) -> Source | None:
    """The encoder that a run asks, if its method has one. Raises ModelError if it is not there."""
    return locate(config.adapter.encoder, "adapter.encoder") if config.adapter.method in PROMPTING else None


def identity_of(model: Source, encoder: Source | None) -> str:
    """SHA-256 of all that is frozen and must be the same everywhere: the base model, and the encoder if there is one."""
    return hashlib.sha256((model.sha256 + encoder.sha256).encode()).hexdigest() if encoder else model.sha256


def size_of(encoder: Source) -> int:
    """How many numbers an encoder has, without loading them."""
    with torch.device("meta"):
        return AutoModel.from_config(AutoConfig.from_pretrained(encoder.folder)).num_parameters()  # type: ignore[no-any-return]


@lru_cache(maxsize=8)
def width_of(name: str) -> int:
    """h, numbers of an encoder's embeddings, without loading its weights. Raises ModelError if there is no such model."""
    return int(AutoConfig.from_pretrained(locate(name, "adapter.encoder").folder).hidden_size)


class Encoder:
    """A sentence encoder: mean of the last hidden states over the tokens, of length 1. Frozen, fp32, on the CPU."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._tokenizer = load_tokenizer(self.source)
        self._tokenizer.truncation_side = "left"
        self._model: Any = load_encoder(self.source)

    @cached_property
    def width(self) -> int:
        """h, numbers of an embedding."""
        return int(self._model.config.hidden_size)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """(n, h) fp32."""
        found = []
        for start in range(0, len(texts), AT_ONCE):
            some = list(texts[start : start + AT_ONCE])
            batch = self._tokenizer(some, padding=True, truncation=True, max_length=LONGEST, return_tensors="pt")
            mask = batch["attention_mask"]
            states = self._model(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
            mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)
            found.append(functional.normalize(mean, dim=1))
        return torch.cat(found) if found else torch.zeros(0, self.width)
