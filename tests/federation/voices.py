"""A tiny random Whisper, and recordings in which every word is a tone of its own."""

import json
from pathlib import Path

import numpy as np
import soundfile
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperTokenizer

RATE = 16000
TONES = {"do": 220.0, "re": 440.0, "mi": 880.0, "fa": 1760.0}
LANGUAGES = ("en", "de", "zh")
SPECIAL = ["<|startoftranscript|>", *(f"<|{name}|>" for name in LANGUAGES), "<|transcribe|>", "<|notimestamps|>"]
SECONDS = 0.1  # of a word; the model hears a second


def save_whisper(folder: Path) -> str:
    """The model with its tokenizer (bytes, and words of two letters) and its feature extractor; returns the folder as text."""
    torch.manual_seed(0)
    vocabulary = {"<|endoftext|>": 0} | {sign: i for i, sign in enumerate(sorted(ByteLevel.alphabet()), 1)}
    merges = [(word[0], word[1]) for word in TONES]
    vocabulary |= {a + b: len(vocabulary) + i for i, (a, b) in enumerate(merges)}
    tokenizer = WhisperTokenizer(vocab=vocabulary, merges=merges)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.save_pretrained(folder)
    extractor = WhisperFeatureExtractor(feature_size=16, chunk_length=1, sampling_rate=RATE)
    extractor.save_pretrained(folder)
    config = WhisperConfig(
        vocab_size=len(tokenizer),
        num_mel_bins=16,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_source_positions=50,
        max_target_positions=24,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=vocabulary["<|endoftext|>"] + len(vocabulary),
        suppress_tokens=None,
        begin_suppress_tokens=None,
        init_std=0.2,
        apply_spec_augment=True,
    )
    WhisperForConditionalGeneration(config).save_pretrained(folder)
    return str(folder)


def sound(words: list[str], rate: int = RATE) -> np.ndarray:
    """A tone after another, (samples,)."""
    time = np.arange(round(SECONDS * rate)) / rate
    return np.concatenate([0.5 * np.sin(2 * np.pi * TONES[word] * time) for word in words]).astype(np.float32)


def sentences(count: int, shift: int = 0) -> list[list[str]]:
    """Two words each."""
    names = list(TONES)
    return [[names[(i + shift) % 4], names[(i // 4 + i + shift) % 4]] for i in range(count)]


def save_recordings(folder: Path, train: int = 12, test: int = 6, language: str | None = "en") -> str:
    """A `jsonl:` task of recordings; returns its source."""
    (folder / "clips").mkdir(parents=True)
    for split, count, shift in (("train", train, 0), ("test", test, 1)):
        rows = []
        for i, words in enumerate(sentences(count, shift)):
            name = f"clips/{split}-{i}.wav"
            soundfile.write(folder / name, sound(words), RATE)
            rows.append({"audio": name, "text": " ".join(words)} | ({"language": language} if language else {}))
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"jsonl:{folder}"
