"""What Flower's server says of nodes and runs, asked in the background: an answer takes seconds, on a busy machine many."""

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from fedsb.errors import DeployError

KEEP_SECONDS = 15.0  # how long an answer is taken for new
GOOD_SECONDS = 90.0  # how long the last answer stands while none comes
ASK_SECONDS = 60.0  # longest wait for a command of Flower's
WAIT_SECONDS = 3.0  # longest wait of who looks: Prometheus itself gives up after 10 s by default
FINISHED = "finished:"

Entries = dict[str, dict[str, Any]]


class Asked(Protocol):
    """Flower's server, as `fedsb/deploy/flower.py` reaches it."""

    def nodes(self) -> Entries: ...

    def runs(self) -> Entries: ...


@dataclass(frozen=True)
class Seen:
    """An answer: nodes and runs by their numbers, and when it came (monotonic seconds)."""

    nodes: Entries
    runs: Entries
    at: float


class Watch:
    """The server's last answer. It is asked only when somebody looks, by one thread at a time; one may look at a time.

    `say` gets one sentence when it stops answering.
    """

    def __init__(self, server: Asked, say: Callable[[str], None]) -> None:
        self._server, self._say = server, say
        self._asking = threading.Thread()
        self._seen: Seen | None = None
        self._away = False
        self._asked: float | None = None

    @property
    def asked(self) -> bool:
        """Whether there was an answer yet, or a failure to answer."""
        return self._asked is not None

    def look(self, numbers: Iterable[str]) -> Seen | None:
        """The last answer, with the runs of these numbers; None if the server does not answer."""
        if not self._asking.is_alive() and (self._asked is None or time.monotonic() - self._asked > KEEP_SECONDS):
            self._asking = threading.Thread(target=self._ask, args=[list(numbers)], daemon=True)
            self._asking.start()
        self._asking.join(WAIT_SECONDS)
        seen = self._seen
        return seen if seen and time.monotonic() - seen.at < GOOD_SECONDS else None

    def _ask(self, numbers: list[str]) -> None:
        runs = self._seen.runs if self._seen else {}
        try:
            nodes = self._server.nodes()
            if not all(str(runs.get(number, {}).get("status")).startswith(FINISHED) for number in numbers):
                runs = self._server.runs()
        except (DeployError, OSError) as error:
            self._seen = None
            if not self._away:
                self._say(str(error))
            self._away = True
        else:
            self._seen, self._away = Seen(nodes, runs, time.monotonic()), False
        self._asked = time.monotonic()
