"""Recordings of speech as tasks: where they lie, and what a Whisper-type model makes of one.

A recording stays a file until a batch needs it: its features are a megabyte (30 s of Whisper), a hundred times the file.
"""

import csv
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fedsb.errors import DataError

START, TRANSCRIBE, PLAIN = (
    "<|startoftranscript|>",
    "<|transcribe|>",
    "<|notimestamps|>",
)  # of Whisper, arXiv 2212.04356
COLUMNS = ("path", "sentence", "locale")  # of Common Voice


@dataclass(frozen=True, slots=True)
class Speech:
    """A sound file, and the language that is spoken in it (`de`), if that was said."""

    path: Path
    language: str | None

    def sha256(self) -> str:
        """Of the file. Raises DataError if it cannot be read."""
        try:
            with self.path.open("rb") as stream:
                return hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise self.wrong(f"cannot be read ({error.strerror}); mend the file or drop its row") from None

    def seconds(self) -> float:
        """How long it lasts. Raises DataError if it is no sound that can be read."""
        sound = _library()
        try:
            return float(sound.info(self.path).duration)
        except (OSError, sound.LibsndfileError) as error:
            raise self.wrong(f"is no sound file that can be read ({error}); mend the file or drop its row") from None

    def wrong(self, what: str) -> DataError:
        """What is wrong with it; the file's name, which may be a person's, stays at the site."""
        return DataError(f"{self.path}: {what}", quoted=str(self.path))


@dataclass(frozen=True, slots=True)
class Recording:
    """What a model hears of a sound file: called, it gives the features (mels, frames) fp32."""

    speech: Speech
    extractor: Any  # transformers' feature extractor of the model

    def __call__(self) -> Tensor:
        """Read, mix to one channel, resample, and let the model's own feature extractor see it. Raises DataError."""
        sound, rate = _library(), self.extractor.sampling_rate
        import soxr

        try:
            wave, had = sound.read(self.speech.path, dtype="float32", always_2d=True)  # (samples, channels)
        except (OSError, sound.LibsndfileError) as error:
            raise self.speech.wrong(f"is no sound file that can be read ({error}); mend the file or drop its row") from None
        mono = np.ascontiguousarray(wave.mean(1))
        heard = mono if had == rate else soxr.resample(mono, had, rate)
        features = self.extractor(heard, sampling_rate=rate, return_tensors="np")["input_features"][0]
        return torch.from_numpy(np.asarray(features, dtype=np.float32))


def common_voice(folder: Path, split: Literal["train", "test"]) -> list[tuple[str, dict[str, str]]]:
    """(place, row) of FOLDER/SPLIT.tsv of a Common Voice release; the sound files lie in FOLDER/clips.

    Raises DataError for a missing file or column.
    """
    path = folder / f"{split}.tsv"
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            reader = csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise DataError(f"{path}: has no column {missing[0]}; a Common Voice table has {', '.join(COLUMNS)} and more")
            rows = [(f"{path}:{number}", row) for number, row in enumerate(reader, 2)]
    except FileNotFoundError:
        raise DataError(f"{path}: is missing; a commonvoice: task is a folder with train.tsv, test.tsv and clips") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({error}); unpack the release again") from None
    if not rows:
        raise DataError(f"{path}: holds no rows; unpack the release again")
    return [(place, _clip(row, place)) for place, row in rows]


def decoder_prompt(tokenizer: Any, speech: Speech) -> list[int]:
    """The tokens with which a transcript begins: start, language, task, no timestamps; without a language, as models of one
    language have it, start and no timestamps. Raises DataError for a language that the model does not know."""
    words = [START, f"<|{speech.language}|>", TRANSCRIBE, PLAIN] if speech.language else [START, PLAIN]
    known = tokenizer.get_vocab()
    if unknown := [word for word in words if word not in known]:
        raise speech.wrong(f"the model's tokenizer has no {unknown[0]}; take a Whisper-type model that knows it")
    return [known[word] for word in words]


def heard(model: Any) -> tuple[int, int]:
    """(mels, frames) of the features of a recording, whatever it lasts. model: a Whisper-type model."""
    strides = model.get_encoder().conv1.stride[0] * model.get_encoder().conv2.stride[0]
    return model.config.num_mel_bins, model.config.max_source_positions * strides


def longest(extractor: Any) -> float:
    """Seconds that a model hears of a recording at the most."""
    return float(extractor.n_samples / extractor.sampling_rate)


def _clip(row: dict[str, str], place: str) -> dict[str, str]:
    if any(row[name] is None for name in COLUMNS):
        raise DataError(f"{place}: has fewer columns than the table's first line; unpack the release again")
    return {"audio": f"clips/{row['path']}", "text": row["sentence"], "language": row["locale"].partition("-")[0]}


def _library() -> Any:
    try:
        import soundfile
        import soxr  # noqa: F401
    except ImportError:
        raise DataError("recordings need the packages soundfile and soxr; pip install 'fedsb[speech]'") from None
    return soundfile
