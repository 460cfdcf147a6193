"""One row of a data set that somebody else wrote, checked: what comes out of here can be trained on."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from fedsb.data.code import Code
from fedsb.data.speech import Speech
from fedsb.errors import DataError

FORMS = (
    'a row is {"prompt": text, "completion": text, "answer": text (may be left out)}, {"text": text, "label": text or integer}, '
    '{"audio": file beside it, "text": text, "language": text (may be left out)} '
    'or {"prompt": text, "tests": text, "language": text, "stop_tokens": texts, "completion": text (may be left out)}'
)


@dataclass(frozen=True, slots=True)
class Row:
    """A checked row. `place` is where it stands (`file:line`); `label` is None in a generation row; `code` asks for a program;
    `speech` is a recording, with its file as prompt and its transcript as completion."""

    place: str
    prompt: str
    completion: str
    answer: str
    label: str | None
    code: Code | None = None
    speech: Speech | None = None


def checked_row(value: object, place: str, folder: Path | None = None) -> Row:
    """Check one row, as JSON or a data set gives it. A prompt, text or label must not be empty; a completion may.

    folder: where recordings lie; without it there can be none.

    Raises DataError naming the place, the field and what is expected.
    """
    if not isinstance(value, Mapping):
        raise DataError(f"{place}: is not an object; {FORMS}")
    if "audio" in value:
        return _spoken(value, place, folder)
    if "tests" in value:
        reference = "" if value.get("completion") is None else _text(value, "completion", place)
        code = Code(_filled(value, "language", place), _filled(value, "tests", place), _stops(value, place))
        return Row(place, _filled(value, "prompt", place), reference, "", None, code)
    if "prompt" in value or "completion" in value:
        prompt, completion = _filled(value, "prompt", place), _text(value, "completion", place)
        answer = completion if value.get("answer") is None else _text(value, "answer", place)
        return Row(place, prompt, completion, answer, None)
    return Row(place, _filled(value, "text", place), "", "", _label(value, place))


def _text(row: Mapping[str, object], field: str, place: str) -> str:
    if field not in row:
        raise DataError(f'{place}: has no "{field}"; {FORMS}')
    text = row[field]
    if not isinstance(text, str):
        raise DataError(f'{place}: "{field}" is {_kind(text)} and not text; {FORMS}')
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f'{place}: "{field}" holds half a surrogate pair, which is not Unicode; mend the row') from None
    return text


def _filled(row: Mapping[str, object], field: str, place: str) -> str:
    text = _text(row, field, place)
    if not text.strip():
        raise DataError(f'{place}: "{field}" is empty; fill it in or drop the row')
    return text


def _spoken(row: Mapping[str, object], place: str, folder: Path | None) -> Row:
    name, transcript = _filled(row, "audio", place), _filled(row, "text", place)
    path = PurePosixPath(name)
    if folder is None:
        raise DataError(f"{place}: has a recording, which only jsonl: and commonvoice: can have; save the data as such a folder")
    if path.is_absolute() or ".." in path.parts:
        raise DataError(f'{place}: "audio" is {name}, which is not in {folder}; put it there and name it from there', quoted=name)
    language = None if row.get("language") is None else _filled(row, "language", place)
    return Row(place, name, transcript, transcript, None, speech=Speech(folder / name, language))


def _stops(row: Mapping[str, object], place: str) -> tuple[str, ...]:
    stops = row.get("stop_tokens", [])
    if not isinstance(stops, list | tuple) or not all(isinstance(stop, str) and stop for stop in stops):
        raise DataError(f'{place}: "stop_tokens" is no list of texts; {FORMS}')
    return tuple(stops)


def _label(row: Mapping[str, object], place: str) -> str:
    label = row.get("label")
    if isinstance(label, int) and not isinstance(label, bool):
        return str(label)
    if "label" in row and not isinstance(label, str):
        raise DataError(f'{place}: "label" is {_kind(label)} and neither text nor an integer; {FORMS}')
    return _filled(row, "label", place)


def _kind(value: object) -> str:
    return "null" if value is None else f"of type {type(value).__name__}"
