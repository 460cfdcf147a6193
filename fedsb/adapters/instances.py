"""What an instance (one prompt) is like: the embedding of its text by a frozen sentence encoder."""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModel

from fedsb.models import Source, load_tokenizer, locate

AT_ONCE = 64  # texts
LONGEST = 256  # tokens of a text; of a longer one its end is taken, where a prompt asks


class Encoder:
    """A sentence encoder: mean of the last hidden states over the tokens, of length 1. Frozen, fp32, on the CPU.

    Args:
        name: as of `model.source`; such as `minilm-l6-v2`.

    Raises ModelError if there is no such model.
    """

    def __init__(self, name: str) -> None:
        self.source: Source = locate(name)
        self._tokenizer = load_tokenizer(self.source)
        self._tokenizer.truncation_side = "left"
        self._model = AutoModel.from_pretrained(self.source.folder, dtype=torch.float32).requires_grad_(False).eval()

    @cached_property
    def width(self) -> int:
        """h, numbers of an embedding."""
        return int(self._model.config.hidden_size)

    @cached_property
    def numbers(self) -> int:
        """How many numbers the encoder has, none of which is trained, and all of which each user needs."""
        return sum(parameter.numel() for parameter in self._model.parameters())

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
