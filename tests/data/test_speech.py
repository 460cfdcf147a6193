"""Recordings as data: folders, Common Voice's tables, what a sound becomes, and what is refused."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from transformers import AutoFeatureExtractor, AutoTokenizer

from fedsb.data.batches import encode
from fedsb.data.examples import Example
from fedsb.data.speech import Recording, Speech, decoder_prompt
from fedsb.data.tasks import load_task
from fedsb.errors import DataError
from fedsb.sections import TaskSection
from tests.federation.voices import RATE, save_whisper, sound


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_whisper(tmp_path_factory.mktemp("whisper"))


@pytest.fixture(scope="module")
def extractor(whisper: str) -> Any:
    return AutoFeatureExtractor.from_pretrained(whisper)


def jsonl(folder: Path, *rows: dict[str, Any]) -> TaskSection:
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TaskSection(name="voices", source=f"jsonl:{folder}")


def release(folder: Path, rows: list[dict[str, str]], columns: list[str]) -> TaskSection:
    """A folder as Common Voice's archives have it."""
    (folder / "clips").mkdir(parents=True)
    for split in ("train", "test"):
        with (folder / f"{split}.tsv").open("w", newline="") as stream:
            writer = csv.DictWriter(stream, columns, delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None)
            writer.writeheader()
            writer.writerows(rows)
    return TaskSection(name="voices", source=f"commonvoice:{folder}")


COLUMNS = ["client_id", "path", "sentence", "up_votes", "down_votes", "age", "gender", "accents", "locale", "segment"]


def test_common_voice_rows(tmp_path: Path) -> None:
    rows = [
        {"path": "a.mp3", "sentence": 'Er sagte: "Ja."', "locale": "de"},
        {"path": "b.mp3", "sentence": "再见", "locale": "zh-TW"},
    ]
    folder = tmp_path / "de"
    assert load_task(release(folder, rows, COLUMNS), "test", 0) == [
        Example("voices", "clips/a.mp3", 'Er sagte: "Ja."', 'Er sagte: "Ja."', speech=Speech(folder / "clips/a.mp3", "de")),
        Example("voices", "clips/b.mp3", "再见", "再见", speech=Speech(folder / "clips/b.mp3", "zh")),
    ]


@pytest.mark.parametrize("column", ["path", "sentence", "locale"])
def test_a_table_without_a_column(column: str, tmp_path: Path) -> None:
    task = release(tmp_path / "x", [], [name for name in COLUMNS if name != column])
    with pytest.raises(DataError, match=f"train.tsv: has no column {column}; a Common Voice table has path, sentence, locale"):
        load_task(task, "train", 0)


def test_a_release_without_tables_or_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="train.tsv: is missing; a commonvoice: task is a folder"):
        load_task(TaskSection(name="x", source=f"commonvoice:{tmp_path}"), "train", 0)
    with pytest.raises(DataError, match="holds no rows"):
        load_task(release(tmp_path / "empty", [], COLUMNS), "train", 0)
    task = release(tmp_path / "torn", [], COLUMNS)
    with (tmp_path / "torn" / "train.tsv").open("a") as stream:
        stream.write("only\ttwo\n")
    with pytest.raises(DataError, match="train.tsv:2: has fewer columns"):
        load_task(task, "train", 0)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"audio": "a.wav"}, 'train.jsonl:1: has no "text"'),
        ({"audio": "", "text": "x"}, '"audio" is empty'),
        ({"audio": {"array": [0.0]}, "text": "x"}, '"audio" is of type dict and not text'),
        ({"audio": "../a.wav", "text": "x"}, r'"audio" is \.\./a.wav, which is not in .*; put it there'),
        ({"audio": "/etc/a.wav", "text": "x"}, '"audio" is /etc/a.wav, which is not in'),
        ({"audio": "a.wav", "text": "x", "language": 3}, '"language" is of type int and not text'),
    ],
)
def test_bad_rows(row: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said):
        load_task(jsonl(tmp_path, row), "train", 0)


def test_recordings_and_texts_do_not_mix(tmp_path: Path) -> None:
    rows = ({"audio": "a.wav", "text": "x"}, {"prompt": "a", "completion": "b"})
    with pytest.raises(DataError, match="train.jsonl:2: is of another form than the first row"):
        load_task(jsonl(tmp_path, *rows), "train", 0)


@pytest.mark.parametrize(
    ("rate", "channels", "ending"), [(16000, 2, "wav"), (44100, 1, "flac"), (22050, 2, "ogg"), (48000, 1, "mp3")]
)
def test_what_is_heard_does_not_depend_on_how_it_was_stored(
    rate: int, channels: int, ending: str, extractor: Any, tmp_path: Path
) -> None:
    words = ["re", "do", "mi"]
    soundfile.write(tmp_path / "plain.wav", sound(words), RATE)
    soundfile.write(tmp_path / f"other.{ending}", np.stack([sound(words, rate)] * channels, 1), rate)
    plain, other = (Recording(Speech(tmp_path / name, None), extractor)() for name in ("plain.wav", f"other.{ending}"))
    assert plain.shape == other.shape == (16, 100) and plain.dtype == torch.float32
    loud = plain[:, :28] > plain.max() - 0.75  # log10 of power over four: the tones, and not what lies far below them
    assert loud.any() and (plain[:, :28] - other[:, :28])[loud].abs().mean() < 0.05


def test_a_file_that_is_no_sound(extractor: Any, tmp_path: Path) -> None:
    (tmp_path / "a.mp3").write_text("no sound")
    for name in ("a.mp3", "missing.mp3"):
        speech = Speech(tmp_path / name, None)
        for ask in (speech.seconds, Recording(speech, extractor)):
            with pytest.raises(DataError, match=f"{name}: is no sound file that can be read .*; mend the file") as raised:
                ask()
            assert name not in raised.value.outside  # a file may bear a patient's name
    with pytest.raises(DataError, match="missing.mp3: cannot be read"):
        Speech(tmp_path / "missing.mp3", None).sha256()


def examples(folder: Path, *made: tuple[int, str, str | None]) -> list[Example]:
    """Recordings of some words each, transcripts and languages."""
    found = []
    for i, (length, text, language) in enumerate(made):
        soundfile.write(folder / f"{i}.wav", sound(["do"] * length), RATE)
        found.append(Example("t", f"{i}.wav", text, text, speech=Speech(folder / f"{i}.wav", language)))
    return found


def test_rows_begin_as_whisper_does_and_end(whisper: str, extractor: Any, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(whisper)
    spoken = examples(tmp_path, (1, "do", "de"), (2, "do re", "en"))
    one, two = encode(spoken, tokenizer, 24, None, "speech", extractor)
    assert tokenizer.convert_ids_to_tokens(one.prompt) == [
        "<|startoftranscript|>",
        "<|de|>",
        "<|transcribe|>",
        "<|notimestamps|>",
    ]
    assert tokenizer.convert_ids_to_tokens(two.prompt)[1] == "<|en|>"
    assert tokenizer.decode(two.completion) == "do re<|endoftext|>"
    (plain,) = encode(examples(tmp_path, (1, "do", None)), tokenizer, 24, None, "speech", extractor)
    assert tokenizer.convert_ids_to_tokens(plain.prompt) == ["<|startoftranscript|>", "<|notimestamps|>"]


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (((1, "do", "fi"),), r"the model's tokenizer has no <\|fi\|>"),
        (((11, "do", "en"),), "lasts 1.1 s, and the model hears 1 s; cut it in two"),
        (((1, "do " * 30, "en"),), "tokens of transcript do not fit into 24; raise data.max_length or drop it"),
        (((1, "do", "en"), (1, "do", None)), "example 1 .* has a language where others have none"),
    ],
)
def test_what_cannot_be_trained_on(made: Any, said: str, whisper: str, extractor: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said):
        encode(examples(tmp_path, *made), AutoTokenizer.from_pretrained(whisper), 24, None, "speech", extractor)


def test_a_tokenizer_without_whispers_beginning(tmp_path: Path) -> None:
    class Plain:
        def get_vocab(self) -> dict[str, int]:
            return {"a": 0}

    with pytest.raises(DataError, match=r"has no <\|startoftranscript\|>"):
        decoder_prompt(Plain(), Speech(tmp_path, None))
