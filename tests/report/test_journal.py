import json
import math
from pathlib import Path
from typing import Any

import pytest

from fedsb.errors import DiskError
from fedsb.report.journal import Journal
from fedsb.store.files import read_events


class Recorder:
    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def show(self, event: dict[str, Any]) -> None:
        self.seen.append(event)

    def close(self) -> None: ...


def test_an_event_is_one_line_and_one_showing(tmp_path: Path) -> None:
    screen = Recorder()
    journal = Journal(tmp_path / "events.jsonl", screen)
    journal.tell("round", round=1, loss=0.5, client="Ä")
    journal.tell("end", reason="two lines")
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert len(lines) == 2 and [json.loads(line) for line in lines] == screen.seen
    assert [event["event"] for event in screen.seen] == ["round", "end"]
    assert abs(screen.seen[0]["time"] - (tmp_path / "events.jsonl").stat().st_mtime) < 5


def test_an_earlier_journal_is_gone_on_with_even_if_torn(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"event": "a"}\n{"event": "b", "tor')
    Journal(path, Recorder()).tell("c")
    assert [event["event"] for event in read_events(path)] == ["a", "c"]


def test_a_number_that_json_lacks_is_null(tmp_path: Path) -> None:
    """A diverged model's loss, say; the file stays readable for every program."""
    screen = Recorder()
    Journal(tmp_path / "events.jsonl", screen).tell("scored", loss=math.nan, other=[math.inf, 1.0])
    text = (tmp_path / "events.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["loss"] is None
    assert screen.seen[0]["loss"] is None


def test_what_a_site_wrote_is_one_short_line(tmp_path: Path) -> None:
    screen = Recorder()
    journal = Journal(tmp_path / "events.jsonl", screen)
    journal.tell("refused", reason="failed: \x1b[2J two\nlines \u202e ")
    journal.tell("refused", reason="x" * 10_000)
    reasons = [event["reason"] for event in screen.seen]
    assert reasons == ["failed: \ufffd[2J two lines \ufffd", "x" * 499 + "…"]
    assert read_events(tmp_path / "events.jsonl") == screen.seen


def test_what_cannot_be_written_is_an_error_not_a_silence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError):
        Journal(tmp_path / "file" / "events.jsonl", Recorder()).tell("start")
