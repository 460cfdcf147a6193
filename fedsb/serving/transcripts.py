"""What a Whisper-type model writes down of recordings, and how many words of it are wrong."""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.models.whisper.english_normalizer import BasicTextNormalizer

from fedsb.errors import DataError

UNSPACED = ("zh", "ja", "th", "lo", "my", "yue")  # no spaces between words, so each character counts as one (arXiv 2212.04356, C)


@torch.no_grad()
def transcribe(model: Any, features: Tensor, begun: Tensor, tokenizer: Any, max_new_tokens: int) -> list[str]:
    """Greedy transcripts (B) of features (B, mels, frames), after the decoder's own beginnings `begun` (B, t).

    Whisper's own `generate` would besides split recordings, guess languages and try again at other temperatures; that is not what
    is trained here, so transformers' general one is called.
    """
    tokens = GenerationMixin.generate(
        model,
        features.to(model.dtype),
        attention_mask=features.new_ones(len(features), features.shape[-1], dtype=torch.int64),  # all of it counts, silence too
        decoder_input_ids=begun,
        do_sample=False,
        num_beams=1,
        max_new_tokens=min(max_new_tokens, model.config.max_target_positions - begun.shape[1]),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    texts: list[str] = tokenizer.batch_decode(tokens[:, begun.shape[1] :], skip_special_tokens=True)
    return texts


def word_errors(said: str, heard: str, language: str | None) -> tuple[int, int]:
    """(words replaced, left out or put in, words said), without case, punctuation and what stands in brackets.

    Raises DataError if the package that counts them is not installed.
    """
    try:
        import jiwer
    except ImportError:
        raise DataError("word error rates need the package jiwer; pip install 'fedsb[speech]'") from None
    plain = BasicTextNormalizer(split_letters=language in UNSPACED)
    found = jiwer.process_words(plain(said).strip(), plain(heard).strip())
    words = found.hits + found.substitutions + found.deletions
    return found.substitutions + found.deletions + found.insertions, words
