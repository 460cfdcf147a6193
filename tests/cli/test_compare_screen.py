"""What a comparison shows, on a terminal and elsewhere."""

import io
from typing import Any

import pytest
from rich.console import Console

from fedsb.cli import compare_screen as screens
from fedsb.cli.compare_screen import Bar, JsonLines, Lines, Silence, compare_screen

Capture = pytest.CaptureFixture[str]
SCORE = {"exact_match": 0.5, "loss": 1.25, "n": 4}
LINE: dict[str, Any] = {"seconds": 100.0, "scores": {"global": SCORE}}


def _through(screen: Silence) -> None:
    screen.begin(1, "lora, seed 0")
    screen.hear("round 1/2")
    screen.done(1, "lora, seed 0", LINE)
    screen.begin(2, "lora, seed 1")
    screen.done(2, "lora, seed 1", {"failed": "no replies"})
    screen.begin(3, "lora, seed 2")
    screen.done(3, "lora, seed 2", {**LINE, "seconds": 50.0})
    screen.close()


def test_lines_say_what_came_out_and_how_long_it_may_last(capsys: Capture) -> None:
    _through(Lines(3))
    assert capsys.readouterr().out.splitlines() == [
        "[1/3] lora, seed 0",
        "round 1/2",
        "[1/3] lora, seed 0: exact match 0.500, loss 1.250, 100.0 s, at the most about 3 min 20 s left",
        "[2/3] lora, seed 1",
        "[2/3] lora, seed 1: failed: no replies, at the most about 100.0 s left",
        "[3/3] lora, seed 2",
        "[3/3] lora, seed 2: exact match 0.500, loss 1.250, 50.0 s",
    ]


def test_a_bar_keeps_the_results_and_what_is_said_last(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    console = Console(file=terminal, force_terminal=True, width=200, color_system=None)
    monkeypatch.setattr(screens, "Console", lambda **_: console)
    _through(bar := Bar(3))
    (task,) = bar._progress.tasks
    assert (task.completed, task.total, task.description) == (3, 3, "lora, seed 2")
    assert "[2/3] lora, seed 1: failed: no replies" in (printed := terminal.getvalue())
    assert printed.count("\x1b[?25h") == printed.count("\x1b[?25l") == 1  # the cursor is back


def test_which_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for terminal in (True, False):
        monkeypatch.setattr("sys.stderr.isatty", lambda terminal=terminal: terminal, raising=False)
        shown = compare_screen(1, json_=False, quiet=False)
        shown.close()
        assert type(shown) is (Bar if terminal else Lines)
        assert type(compare_screen(1, json_=True, quiet=False)) is JsonLines
        assert type(compare_screen(1, json_=True, quiet=True)) is Silence
