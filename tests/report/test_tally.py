"""What a journal adds up to, read in pieces."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from fedsb.errors import StoreError
from fedsb.report.journal import Journal
from fedsb.report.screen import Silent
from fedsb.report.tally import LastRound, Tally

ROUND: dict[str, Any] = {"rounds": 9, "clients": 3, "loss": 0.5, "aggregation_error": 1e-8, "seconds": 2.5}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.jsonl"


def test_it_reads_on_from_where_it_stopped(path: Path) -> None:
    tally, journal = Tally(path), Journal(path, Silent())
    tally.update()
    assert (tally.started, tally.last, tally.refused, tally.silent) == (None, None, {}, 0)
    journal.tell("start", run="a")
    journal.tell("refused", round=1, client="x", reason="sent NaN")
    journal.tell("silent", round=1, client="y")
    journal.tell("round", round=1, **ROUND)
    tally.update()
    assert tally.started == json.loads(path.read_text().splitlines()[0])["time"]
    assert tally.last == LastRound(1, 9, 3, 0.5, 1e-8, 2.5) and (tally.refused, tally.silent) == ({"x": 1}, 1)
    with path.open("r+b") as file:  # what was read is not read again
        file.write(b"#" * 20)
    journal.tell("refused", round=2, client="x", reason="sent NaN")
    journal.tell("round", round=2, **ROUND | {"loss": math.nan})
    tally.update()
    tally.update()
    assert tally.refused == {"x": 2} and tally.last and tally.last.number == 2 and math.isnan(tally.last.loss)
    assert tally.spoilt == ""


def test_a_torn_line_waits_until_it_is_whole(path: Path) -> None:
    line = json.dumps({"time": 1.0, "event": "refused", "client": "x"}) + "\n"
    tally = Tally(path)
    path.write_text(line + line[:20])
    tally.update()
    assert tally.refused == {"x": 1} and tally.spoilt == ""
    path.write_text(line + line)
    tally.update()
    assert tally.refused == {"x": 2}
    with path.open("a") as file:
        file.write(line[:-5])
    tally.update()
    Journal(path, Silent()).tell("silent", round=1, client="y")  # cuts the torn line off
    tally.update()
    assert tally.refused == {"x": 2} and tally.silent == 1 and tally.spoilt == ""


@pytest.mark.parametrize(
    "line", ["{", "[]", '"text"', "null", '{"event": "round", "round": "one"}', '{"event": "refused"}', "\xff"]
)
def test_a_line_that_is_no_event_is_named_and_passed_over(path: Path, line: str) -> None:
    good = json.dumps({"time": 1.0, "event": "silent", "client": "x"})
    path.write_bytes(f"{good}\n{line}\n{good}\n".encode("latin-1"))
    tally = Tally(path)
    tally.update()
    assert tally.silent == 2 and tally.spoilt == f"{path}: line 2 is no event; remove that line"


def test_another_file_is_read_from_its_beginning(path: Path) -> None:
    line = json.dumps({"time": 1.0, "event": "silent", "client": "x"}) + "\n"
    path.write_text("spoilt\n" + line * 3)
    tally = Tally(path)
    tally.update()
    path.with_suffix(".new").write_text(line * 5)
    path.with_suffix(".new").replace(path)
    tally.update()
    assert tally.silent == 5 and tally.spoilt == ""
    path.write_text(line)
    tally.update()
    assert tally.silent == 1
    path.unlink()
    tally.update()
    assert tally.silent == 0


def test_a_file_that_cannot_be_read(path: Path) -> None:
    path.mkdir()
    with pytest.raises(StoreError, match=r"events.jsonl: cannot be read \(Is a directory\)"):
        Tally(path).update()
