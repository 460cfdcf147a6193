"""What happens in a run: one JSON line an event in `events.jsonl`, a line or bar on the screen, and figures for trackers."""

import json
import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from fedsb.report.units import one_line
from fedsb.store.files import append_line


class Screen(Protocol):
    """Shows events to a person."""

    def show(self, event: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class Hearer(Protocol):
    """A tracker as the journal sees it: it never raises, and says in `failed` why it is to be told no more."""

    name: str
    failed: str

    def show(self, event: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class Journal:
    """Appends each event, with the time in seconds since the epoch, to a file and hands it to the screen and to trackers."""

    def __init__(self, path: Path, screen: Screen, trackers: Iterable[Hearer] = ()) -> None:
        self.path, self.screen, self._trackers = path, screen, list(trackers)

    def tell(self, event: str, **fields: Any) -> None:
        """Write an event down; texts, which a site may have written, on one line each. Raises DiskError."""
        texts = {key: one_line(value) if isinstance(value, str) else value for key, value in fields.items()}
        entry = _writable({"time": round(time.time(), 3), "event": event, **texts})
        append_line(self.path, json.dumps(entry))
        self.screen.show(entry)
        for tracker in self._trackers:
            tracker.show(entry)
        self._drop_failed()

    def close(self) -> None:
        """Close the trackers, and tell which of them missed something. Raises DiskError."""
        for tracker in self._trackers:
            tracker.close()
        self._drop_failed()

    def _drop_failed(self) -> None:
        failed = [tracker for tracker in self._trackers if tracker.failed]
        self._trackers = [tracker for tracker in self._trackers if tracker not in failed]
        for tracker in failed:
            self.tell("untracked", tracker=tracker.name, reason=tracker.failed)


def _writable(value: Any) -> Any:
    """NaN and infinity, which JSON does not know, become null."""
    if isinstance(value, dict):
        return {key: _writable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_writable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
