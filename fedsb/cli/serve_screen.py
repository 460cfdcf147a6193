"""What `fedsb serve` shows: what it loads, where it listens, and then what it has to do. Only the address is on standard output,
unless a program listens."""

import logging
import sys
import time
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.status import Status

from fedsb.cli.options import say
from fedsb.serving.http.service import Service

LIVE, SELDOM = 1, 60  # seconds from one look to the next, on a terminal and elsewhere


@dataclass(frozen=True)
class Work:
    """What a server has done since the last look: requests answered and tokens of answers, each a second; requests at work or
    waiting now, and adapters in memory."""

    requests: float
    tokens: float
    running: int
    adapters: int

    @property
    def line(self) -> str:
        """For people."""
        return (
            f"{self.running} requests at work or waiting, {self.requests:.1f} answered and {self.tokens:.0f} tokens a second, "
            f"{self.adapters} adapters in memory"
        )


class ServeScreen:
    """A live line on a terminal; elsewhere a line a minute if there was work; JSON objects; or nothing but the address."""

    def __init__(self, *, json_: bool, quiet: bool) -> None:
        self._json, self._quiet = json_, quiet
        self._console = Console(stderr=True)
        self._live = Status("", console=self._console) if sys.stderr.isatty() and not (json_ or quiet) else None
        self.seconds = LIVE if self._live else SELDOM
        self._before = (time.monotonic(), 0.0, 0.0)
        handler = RichHandler(console=self._console, show_path=False) if self._live else logging.StreamHandler()
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", handlers=[handler])
        for library in ("httpx", "ContinuousBatchingLogger"):
            logging.getLogger(library).setLevel(logging.WARNING)

    def loading(self, what: str) -> None:
        """Something that takes seconds begins; without a terminal or a program nobody waits for it."""
        if self._live:
            self._live.start()
            self._live.update(f"loading {what}")
        elif self._json and not self._quiet:
            say("loading", {"what": what})

    def ready(self, model: str, tenants: int, url: str) -> None:
        """It listens."""
        if self._live:
            self._live.stop()
        if self._json:
            say("serving", {"model": model, "tenants": tenants, "url": url})
        else:
            print(f"serving {model} and {tenants} tenants on {url}", flush=True)
        if self._live:
            self._live.update("nobody has asked yet")
            self._live.start()

    def look(self, service: Service) -> None:
        """Show what there was to do since the last look."""
        work = self._since(service)
        if self._live:
            self._live.update(work.line)
        elif self._quiet or not (work.requests or work.running):
            return
        elif self._json:
            say("work", vars(work))
        else:
            print(work.line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._live:
            self._live.stop()

    def _since(self, service: Service) -> Work:
        figures, (then, requests, tokens) = service.figures, self._before
        now = time.monotonic()
        self._before = (now, _total(figures.requests), _total(figures.tokens.labels("answer")))
        seconds = max(1e-3, now - then)
        answered, told = self._before[1] - requests, self._before[2] - tokens
        return Work(answered / seconds, told / seconds, service.engine.running, service.tenants.loaded)


def _total(counter: Any) -> float:
    """The sum over a counter's labels."""
    return sum(float(sample.value) for metric in counter.collect() for sample in metric.samples if sample.name.endswith("_total"))
