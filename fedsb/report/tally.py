"""What the `events.jsonl` of a run adds up to, kept up to date by reading only what was appended since."""

import json
import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsb.errors import StoreError


@dataclass(frozen=True)
class LastRound:
    """The figures of a finished round; NaN where the run wrote none.

    Attributes:
        number: of the round, from 1.
        rounds: how many the run has.
        clients: whose replies counted.
        loss: mean training loss in nats.
        aggregation_error: relative, as `fedsb/aggregation/error.py` measures it.
        seconds: from the round's beginning to its checkpoint.
    """

    number: int
    rounds: int
    clients: int
    loss: float
    aggregation_error: float
    seconds: float


def counting(folder: Path) -> list[Path]:
    """The files of a run that count what it has moved (`bytes`, of a checkpoint within `progress`), newest first: its
    summary.json, which need not be there yet, and its checkpoints'."""
    rounds = sorted(folder.glob("checkpoints/round-*/round.json"), key=lambda path: (len(path.parent.name), path.parent.name))
    return [folder / "summary.json", *reversed(rounds)]


class Tally:
    """The sums over a run's events.

    Attributes:
        started: when the run was last started or resumed, in seconds since the epoch; None before it has begun.
        last: the round that finished last; None before the first.
        refused: client → how many of its replies were refused, in the order of their first.
        silent: how often a client did not answer in time.
        spoilt: what is wrong with the file, in one sentence; "" if nothing is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines: int
        self._forget(inode=None)

    def update(self) -> None:
        """Read what was appended; a file that was replaced is read from its beginning. No file is no events.

        A torn last line waits for the next time, and any other line that is no event is passed over and named in
        `spoilt`. Raises StoreError if the file cannot be read.
        """
        try:
            with self.path.open("rb") as file:
                found = os.fstat(file.fileno())
                if found.st_ino != self._inode or found.st_size < self._offset:
                    self._forget(found.st_ino)
                file.seek(self._offset)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self._offset += len(line)
                    self._lines += 1
                    self._count(line)
        except FileNotFoundError:
            self._forget(inode=None)
        except OSError as error:
            raise StoreError(f"{self.path}: cannot be read ({error.strerror or error}); mend that") from error

    def _count(self, line: bytes) -> None:
        try:
            self._take(json.loads(line))
        except (ValueError, LookupError, TypeError, OverflowError):
            self.spoilt = f"{self.path}: line {self._lines} is no event; remove that line"

    def _forget(self, inode: int | None) -> None:
        self.started: float | None = None
        self.last: LastRound | None = None
        self.refused: Counter[str] = Counter()
        self.silent = 0
        self.spoilt = ""
        self._inode: int | None = inode
        self._offset, self._lines = 0, 0

    def _take(self, event: dict[str, Any]) -> None:
        match event["event"]:
            case "start":
                self.started = float(event["time"])
            case "round":
                self.last = LastRound(
                    number=int(event["round"]),
                    rounds=int(event["rounds"]),
                    clients=int(event["clients"]),
                    loss=_number(event["loss"]),
                    aggregation_error=_number(event["aggregation_error"]),
                    seconds=_number(event["seconds"]),
                )
            case "refused":
                self.refused[str(event["client"])] += 1
            case "silent":
                self.silent += 1


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
