"""What `fedsb compare` shows of its runs: a bar on a terminal, plain lines elsewhere, JSON for programs, or nothing."""

import statistics
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fedsb.cli.options import say
from fedsb.report.comparison import sentence_of
from fedsb.report.units import human_seconds


class Silence:
    """Shows nothing; the base of the others."""

    def __init__(self, runs: int) -> None:
        self.runs = runs
        self._seconds: list[float] = []

    def begin(self, number: int, title: str) -> None:
        """A run begins, the `number`-th of all, those that are on disk already counted."""

    def hear(self, line: str) -> None:
        """A line that a run has printed."""

    def done(self, number: int, title: str, line: Mapping[str, Any]) -> None:
        """A run has ended; `line` is its result, with `failed` if it has none."""

    def close(self) -> None:
        """All runs have ended."""

    def _left(self, number: int, line: Mapping[str, Any]) -> str:
        """By the mean of the runs so far; some of those to come may be on disk already."""
        self._seconds += [line["seconds"]] if "seconds" in line else []
        rest = self.runs - number
        if not (rest and self._seconds):
            return ""
        return f", at the most about {human_seconds(rest * statistics.fmean(self._seconds))} left"

    def _result(self, number: int, title: str, line: Mapping[str, Any]) -> str:
        said = f"failed: {line['failed']}" if "failed" in line else sentence_of(line)
        return f"[{number}/{self.runs}] {title}: {said}{self._left(number, line)}"


class Lines(Silence):
    """A line when a run begins and when it has ended, and between them its own."""

    def begin(self, number: int, title: str) -> None:
        """Print what begins."""
        print(f"[{number}/{self.runs}] {title}", flush=True)

    def hear(self, line: str) -> None:
        """Pass it on."""
        print(line, flush=True)

    def done(self, number: int, title: str, line: Mapping[str, Any]) -> None:
        """Print the result."""
        print(self._result(number, title, line), flush=True)


class Bar(Silence):
    """A bar of all runs with what the present one said last, and results above it."""

    def __init__(self, runs: int) -> None:
        super().__init__(runs)
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._progress.add_task("", total=runs)
        self._title = ""
        self._progress.start()

    def begin(self, number: int, title: str) -> None:
        """Show what begins."""
        self._title = title
        self._progress.update(self._task, completed=number - 1, description=title)

    def hear(self, line: str) -> None:
        """Show it beside the bar."""
        self._progress.update(self._task, description=f"{self._title}: {line}")

    def done(self, number: int, title: str, line: Mapping[str, Any]) -> None:
        """Print the result above the bar."""
        self._progress.console.print(self._result(number, title, line), highlight=False, markup=False)
        self._progress.update(self._task, completed=number)

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._progress.stop()


class JsonLines(Silence):
    """The result of each run as one JSON object, as `results.jsonl` and `tuning.jsonl` have it."""

    def done(self, number: int, title: str, line: Mapping[str, Any]) -> None:
        """Print the result."""
        say("run", {"number": number, "of": self.runs, **line})


def compare_screen(runs: int, *, json_: bool, quiet: bool) -> Silence:
    """The screen that options and terminal call for."""
    if quiet:
        return Silence(runs)
    kind = JsonLines if json_ else Bar if sys.stderr.isatty() else Lines
    return kind(runs)
