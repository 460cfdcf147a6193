"""What happens in a run, told twice: one JSON line an event in `events.jsonl`, and a line or bar on the screen."""

import json
import math
import time
from pathlib import Path
from typing import Any, Protocol

from fedsb.report.units import one_line
from fedsb.store.files import append_line


class Screen(Protocol):
    """Shows events to a person."""

    def show(self, event: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class Journal:
    """Appends each event, with the time in seconds since the epoch, to a file and hands it to the screen."""

    def __init__(self, path: Path, screen: Screen) -> None:
        self.path, self.screen = path, screen

    def tell(self, event: str, **fields: Any) -> None:
        """Write an event down; texts, which a site may have written, on one line each. Raises DiskError."""
        texts = {key: one_line(value) if isinstance(value, str) else value for key, value in fields.items()}
        entry = {"time": round(time.time(), 3), "event": event, **texts}
        append_line(self.path, json.dumps(_writable(entry)))
        self.screen.show(entry)


def _writable(value: Any) -> Any:
    """NaN and infinity, which JSON does not know, become null."""
    if isinstance(value, dict):
        return {key: _writable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_writable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
