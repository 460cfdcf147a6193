"""Rows of a folder with `train.jsonl` and `test.jsonl`."""

import json
from pathlib import Path
from typing import Literal

from fedsb.data.rows import FORMS, Row, checked_row
from fedsb.errors import DataError


def read_jsonl(folder: Path, split: Literal["train", "test"]) -> list[Row]:
    """All rows of FOLDER/SPLIT.jsonl in the order of the file; UTF-8, one JSON object a line, blank lines skipped.

    Raises DataError for a missing folder or file, and for the first bad row with file and line.
    """
    path = folder / f"{split}.jsonl"
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder; a jsonl: task is a folder with train.jsonl and test.jsonl")
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except FileNotFoundError:
        raise DataError(f"{path}: is missing; a jsonl: task is a folder with train.jsonl and test.jsonl") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); make it a readable file") from None
    rows = [_row(line, f"{path}:{number}", folder) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise DataError(f"{path}: holds no rows; {FORMS}")
    return rows


def _row(line: bytes, place: str, folder: Path) -> Row:
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError:
        raise DataError(f"{place}: is not UTF-8; save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: is not JSON ({error}); {FORMS}") from None
    return checked_row(value, place, folder)
