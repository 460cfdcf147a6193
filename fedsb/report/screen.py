"""Progress on the screen: bars where there is a terminal, plain lines where there is none, JSON for programs."""

import json
import statistics
import sys
from collections import deque
from collections.abc import Callable
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from fedsb.report.journal import Screen
from fedsb.report.units import human_bytes, human_seconds


class Silent:
    """Shows nothing."""

    def show(self, event: dict[str, Any]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Lines:
    """One plain line for each event that matters, flushed at once."""

    def __init__(self, write: Callable[[str], None] = lambda text: print(text, flush=True)) -> None:
        self._write, self._pace = write, Pace()

    def show(self, event: dict[str, Any]) -> None:
        """Print an event."""
        text = sentence(event)
        if text:
            self._write(text + self._pace.left(event))

    def close(self) -> None:
        """Nothing to close."""


class JsonLines:
    """Each event as it stands in `events.jsonl`, flushed at once."""

    def show(self, event: dict[str, Any]) -> None:
        """Print an event."""
        print(json.dumps(event), flush=True)

    def close(self) -> None:
        """Nothing to close."""


class Pace:
    """How long the rounds that are to come will take, by the median of the last five."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=5)

    def left(self, event: dict[str, Any]) -> str:
        """What to add to the line of a finished round; "" for other events, and after the last round."""
        if event["event"] != "round":
            return ""
        self._seconds.append(event["seconds"])
        rounds = event["rounds"] - event["round"]
        return f", about {human_seconds(rounds * statistics.median(self._seconds))} left" if rounds else ""


class Bars:
    """A bar for each round and stage, filling with every reply, and the round's figures above it when it is done."""

    def __init__(self) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
            transient=True,
        )
        self._progress.start()
        self._task: TaskID | None = None
        self._pace = Pace()

    def show(self, event: dict[str, Any]) -> None:
        """Move the bar, or print what is done."""
        kind = event["event"]
        if kind == "stage":
            self._drop()
            self._task = self._progress.add_task(event["title"], total=event["clients"], note="")
        elif kind in ("reply", "personal", "scored", "prepared") and self._task is not None:
            note = f"{event['client']}: loss {event['loss']:.3f}" if event.get("loss") is not None else event["client"]
            self._progress.update(self._task, advance=1, note=note)
        elif text := sentence(event):
            self._drop()
            line = text + self._pace.left(event)
            self._progress.console.print(line, highlight=False, markup=False)  # a site may have written part of it

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._progress.stop()

    def _drop(self) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None


def sentence(event: dict[str, Any]) -> str:
    """One event as a line for people; "" for those that only a bar shows."""
    match event["event"]:
        case "start":
            clients = "the clients that join" if event["clients"] is None else f"{event['clients']} clients"
            return (
                f"{event['run']}: {clients}, {event['model']}, "
                f"{event['method']} rank {event['rank']}, {event['trainable']:,} trained parameters"
            )
        case "resumed":
            return f"resumed after round {event['round']}"
        case "basis" if event["source"] == "none":
            return "no basis: all that a layer adds is trained"
        case "basis":
            sent = f"{human_bytes(event['bytes'])} to every client" if event["sent"] else "rebuilt by every client, nothing sent"
            return f"basis {event['source']} {event['fingerprint'][:12]}: {sent} ({human_seconds(event['seconds'])})"
        case "round":
            loss = "" if event["loss"] is None else f"loss {event['loss']:.3f}  "  # with privacy nobody tells it
            error = "" if event["aggregation_error"] is None else f"aggregation error {event['aggregation_error']:.1e}  "
            moved = f"up {human_bytes(event['up'])}  down {human_bytes(event['down'])}"
            return f"round {event['round']}/{event['rounds']}  {loss}{moved}  {error}{human_seconds(event['seconds'])}"
        case "refused":
            return f"round {event['round']}: {event['client']} was left out: it {event['reason']}"
        case "left-out":
            return f"round {event['round']}: {event['client']} is asked no more, after {event['refused']} refused replies"
        case "late":
            return f"round {event['round']}: {event['client']} was cut off: enough others had answered"
        case "silent":
            return f"round {event['round']}: {event['client']} did not answer in time"
        case "untracked":
            return f"{event['tracker']} is told no more of this run: {event['reason']}"
        case "kept":
            return f"{event['client']} keeps its personal adapter to itself"
        case "personalised":
            return (
                f"personal adapters: {event['clients']} clients, "
                f"up {human_bytes(event['up'])} ({human_seconds(event['seconds'])})"
            )
        case _:
            return ""


def screen(kind: Literal["auto", "bars", "lines", "json", "none"]) -> Screen:
    """The screen that a configuration asks for; `auto` looks whether there is a terminal."""
    if kind == "auto":
        kind = "bars" if sys.stderr.isatty() else "lines"
    kinds: dict[str, Callable[[], Screen]] = {"bars": Bars, "lines": Lines, "json": JsonLines, "none": Silent}
    return kinds[kind]()
