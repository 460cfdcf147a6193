import io
import json
from typing import Any

import pytest
from rich.console import Console

from fedsb.report import screen as screens
from fedsb.report.screen import Bars, Lines, Pace, Silent, screen, sentence

EVENTS: list[dict[str, Any]] = [
    {"event": "start", "run": "quick", "clients": 4, "model": "smol", "method": "lora-sb", "rank": 64, "trainable": 860160},
    {"event": "basis", "source": "public", "fingerprint": "ab" * 32, "bytes": 12_300_000, "sent": True, "seconds": 3.21},
    {"event": "stage", "title": "preparing clients", "clients": 2},
    {"event": "prepared", "client": "a"},
    {"event": "start", "run": "own", "clients": None, "model": "smol", "method": "lora-sb", "rank": 4, "trainable": 16},
    {"event": "refused", "round": 0, "client": "node 7", "reason": "failed: out of memory"},
    {"event": "resumed", "round": 1},
    {"event": "stage", "title": "round 2/5", "clients": 2},
    {"event": "reply", "round": 2, "client": "a", "loss": 1.25, "seconds": 2.0},
    {"event": "silent", "round": 2, "client": "b"},
    {"event": "late", "round": 2, "client": "c"},
    {"event": "left-out", "round": 2, "client": "d", "refused": 3},
    {
        "event": "round",
        "rounds": 5,
        "round": 2,
        "loss": 1.25,
        "aggregation_error": 2.5e-8,
        "clients": 1,
        "up": 1_700_000,
        "down": 3_400_000,
        "seconds": 125.0,
    },
    {"event": "stage", "title": "personalising", "clients": 2},
    {"event": "personal", "round": 5, "client": "a", "seconds": 1.0, "up": 10, "down": 20},
    {"event": "personalised", "clients": 2, "up": 999, "down": 3, "seconds": 7.0},
    {"event": "stage", "title": "scoring base", "clients": 2},
    {"event": "scored", "which": "base", "client": "a", "loss": 2.0, "exact_match": 0.0, "n": 3, "task": "t"},
    {"event": "end", "seconds": 9.0},
]
LINES = [
    "quick: 4 clients, smol, lora-sb rank 64, 860,160 trained parameters",
    "basis public abababababab: 12.3 MB to every client (3.2 s)",
    "own: the clients that join, smol, lora-sb rank 4, 16 trained parameters",
    "round 0: node 7 was left out: it failed: out of memory",
    "resumed after round 1",
    "round 2: b did not answer in time",
    "round 2: c was cut off: enough others had answered",
    "round 2: d is asked no more, after 3 refused replies",
    "round 2/5  loss 1.250  up 1.7 MB  down 3.4 MB  aggregation error 2.5e-08  2 min 05 s, about 6 min 15 s left",
    "personal adapters: 2 clients, up 999 B (7.0 s)",
]


def test_lines_for_a_log_file() -> None:
    written: list[str] = []
    lines = Lines(written.append)
    for event in EVENTS:
        lines.show(event)
    lines.close()
    assert written == LINES


def test_what_is_left_follows_the_median_of_the_last_five_rounds() -> None:
    pace = Pace()
    told = [
        pace.left({"event": "round", "round": n, "rounds": 9, "seconds": s})
        for n, s in enumerate([90, 10, 10, 30, 20, 40, 50], 1)
    ]
    assert told[0] == ", about 12 min 00 s left" and told[4] == ", about 80.0 s left" and told[6] == ", about 60.0 s left"
    assert pace.left({"event": "round", "round": 9, "rounds": 9, "seconds": 1}) == ""
    assert pace.left({"event": "reply", "round": 3, "seconds": 9}) == ""


def test_json_lines_are_the_events_themselves(capsys: pytest.CaptureFixture[str]) -> None:
    shown = screen("json")
    for event in EVENTS:
        shown.show(event)
    shown.close()
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == EVENTS


def test_a_basis_that_is_not_sent_says_so() -> None:
    event = {"event": "basis", "source": "random", "fingerprint": "cd" * 32, "bytes": 5, "sent": False, "seconds": 0.0}
    assert sentence(event) == "basis random cdcdcdcdcdcd: rebuilt by every client, nothing sent (0.0 s)"
    assert sentence({"event": "of a later version"}) == ""


def test_bars_show_the_same_and_leave_the_terminal_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()

    def console(**_: object) -> Console:
        return Console(file=terminal, force_terminal=True, width=200, color_system=None)

    monkeypatch.setattr(screens, "Console", console)
    bars = Bars()
    for event in EVENTS:
        bars.show(event)
    assert bars._task is not None
    (task,) = bars._progress.tasks
    assert (task.description, task.completed, task.total) == ("scoring base", 1, 2)
    assert task.fields["note"] == "a: loss 2.000"
    bars.close()
    printed = terminal.getvalue()
    for line in LINES:
        assert line in printed
    assert printed.count("\x1b[?25h") == printed.count("\x1b[?25l") == 1  # the cursor is back


def test_auto_is_bars_on_a_terminal_and_lines_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(screen("none"), Silent) and isinstance(screen("lines"), Lines)
    for tty, kind in ((False, Lines), (True, Bars)):
        monkeypatch.setattr("sys.stderr.isatty", lambda tty=tty: tty, raising=False)
        chosen = screen("auto")
        chosen.close()
        assert isinstance(chosen, kind)
