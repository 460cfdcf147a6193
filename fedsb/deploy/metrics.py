"""The figures of a federation for Prometheus, read from its folder at each scrape, so that they outlive every run's process."""

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fedsb.deploy.certs import load_certificate
from fedsb.deploy.home import Admitted, Home
from fedsb.deploy.watch import FINISHED, Asked, Seen, Watch
from fedsb.errors import FedsbError
from fedsb.report.tally import Tally, counting
from fedsb.store.files import read_json

RUNS = 20  # the runs started last are told of; a federation that lives for years has hundreds
REFUSED_CLIENTS = 50  # a run's refused replies are told by client for as many clients
STATES = ("pending", "starting", "running", "completed", "stopped", "failed")  # of a run, as Flower says them
STATUSES = ("online", "offline", "registered", "unknown")  # of a site; registered: it was never here
UNREADABLE = (FedsbError, OSError, ValueError, LookupError, TypeError, OverflowError, AssertionError)  # what damage ends in

Say = Callable[[str], None]
Sample = tuple[str, list[str], float]  # name, values of the labels, value
Kind = type[CounterMetricFamily] | type[GaugeMetricFamily]
GAUGE, COUNTER = GaugeMetricFamily, CounterMetricFamily
FAMILIES: dict[str, tuple[Kind, str, tuple[str, ...]]] = {
    "fedsb_superlink_up": (GAUGE, "1 if Flower's server answers its operator, else 0.", ()),
    "fedsb_sites": (GAUGE, "Admitted sites by status; none are told while the server does not answer.", ("status",)),
    "fedsb_site_online": (GAUGE, "1 if the site is connected, else 0.", ("site",)),
    "fedsb_run_state": (GAUGE, "1 for the state that the run is in, 0 for the others.", ("run", "state")),
    "fedsb_run_start_time_seconds": (GAUGE, "When the run was last started or resumed, since the epoch.", ("run",)),
    "fedsb_run_round": (GAUGE, "The round that finished last.", ("run",)),
    "fedsb_run_rounds": (GAUGE, "Rounds that the run has; known from its first finished round on.", ("run",)),
    "fedsb_round_clients": (GAUGE, "Clients whose replies counted in the last round.", ("run",)),
    "fedsb_round_seconds": (GAUGE, "How long the last round took.", ("run",)),
    "fedsb_round_loss": (GAUGE, "Mean training loss of the last round, in nats.", ("run",)),
    "fedsb_aggregation_error": (GAUGE, "Relative aggregation error of the last round.", ("run",)),
    "fedsb_bytes_total": (
        COUNTER,
        "Bytes moved up to the last checkpoint, or the run's end; up: to the server. Without the basis.",
        ("run", "direction"),
    ),
    "fedsb_basis_bytes_total": (COUNTER, "Bytes of the basis sent to clients that could not build it.", ("run",)),
    "fedsb_refused_replies_total": (COUNTER, "Replies that were refused and left out.", ("run",)),
    "fedsb_client_refused_replies_total": (
        COUNTER,
        f"Refused replies by client, for the first {REFUSED_CLIENTS} clients of a run that had any.",
        ("run", "client"),
    ),
    "fedsb_silent_clients_total": (COUNTER, "Times that a client did not answer in time.", ("run",)),
    "fedsb_checkpoint_age_seconds": (GAUGE, "Time since the last checkpoint was written.", ("run",)),
    "fedsb_certificate_expiry_timestamp_seconds": (GAUGE, "When the certificate expires, since the epoch.", ("certificate",)),
    "fedsb_unreadable_files": (GAUGE, "Files of the federation that could not be read, or not wholly.", ()),
}


class FederationCollector(Collector):
    """Reads a federation's folder and asks its server, at each scrape.

    Whatever is missing or damaged is left out; what is damaged is counted, and said once by `say`. A server that does not
    answer is `fedsb_superlink_up 0`.
    """

    def __init__(self, home: Home, server: Asked, say: Say) -> None:
        self.home, self.say = home, say
        self._watch = Watch(server, say)
        self._lock = threading.Lock()  # the HTTP server has a thread for each scrape
        self._tallies: dict[str, Tally] = {}
        self._moved: dict[str, tuple[tuple[Path, int], dict[str, int]]] = {}
        self._damaged: dict[Path, str] = {}

    def collect(self) -> Iterable[Metric]:
        """Every family of `FAMILIES`, with the samples there are."""
        with self._lock:
            families = {name: kind(name, about, labels=labels) for name, (kind, about, labels) in FAMILIES.items()}
            said, self._damaged = self._damaged, {}
            for name, labels, value in self._samples():
                families[name].add_metric(labels, value)
            for path, sentence in self._damaged.items():
                if said.get(path) != sentence:
                    self.say(sentence)
            families["fedsb_unreadable_files"].add_metric([], len(self._damaged))
            return list(families.values())

    def _samples(self) -> Iterator[Sample]:
        started: dict[str, str] = {}
        with self._reading(self.home.folder / "started.json"):
            started = dict(list(self.home.started().items())[-RUNS:])
        seen = self._watch.look(started.values())
        if self._watch.asked:
            yield "fedsb_superlink_up", [], seen is not None
        yield from self._of_sites(seen)
        self._tallies = {name: self._tallies.get(name) or Tally(self.home.runs / name / "events.jsonl") for name in started}
        for name, number in started.items():
            yield from self._of_run(name, seen.runs.get(number) if seen else None)
        for name, path in (("authority", self.home.tls.ca), ("server", self.home.tls.server)):
            with self._reading(path):
                if path.exists():
                    yield (
                        "fedsb_certificate_expiry_timestamp_seconds",
                        [name],
                        load_certificate(path).not_valid_after_utc.timestamp(),
                    )

    def _of_sites(self, seen: Seen | None) -> Iterator[Sample]:
        sites: dict[str, Admitted] = {}
        with self._reading(self.home.folder / "admitted.json"):
            sites = self.home.admitted()
        if seen is None:
            return
        status = {name: str(seen.nodes.get(site.node, {}).get("status", "unknown")) for name, site in sites.items()}
        counts = Counter(status.values())
        for each in dict.fromkeys([*STATUSES, *counts]):
            yield "fedsb_sites", [each], counts[each]
        for name, each in status.items():
            yield "fedsb_site_online", [name], each == "online"

    def _of_run(self, name: str, entry: dict[str, Any] | None) -> Iterator[Sample]:
        if entry:
            state = str(entry["status"]).removeprefix(FINISHED)
            for each in STATES:
                yield "fedsb_run_state", [name, each], each == state
        tally = self._tallies[name]
        with self._reading(tally.path):
            tally.update()
            if tally.spoilt:
                self._damaged[tally.path] = tally.spoilt
        if tally.started is not None:
            yield "fedsb_run_start_time_seconds", [name], tally.started
        yield "fedsb_run_round", [name], tally.last.number if tally.last else 0
        if tally.last:
            yield "fedsb_run_rounds", [name], tally.last.rounds
            yield "fedsb_round_clients", [name], tally.last.clients
            yield "fedsb_round_seconds", [name], tally.last.seconds
            yield "fedsb_round_loss", [name], tally.last.loss
            yield "fedsb_aggregation_error", [name], tally.last.aggregation_error
        yield "fedsb_refused_replies_total", [name], tally.refused.total()
        for client, count in list(tally.refused.items())[:REFUSED_CLIENTS]:
            yield "fedsb_client_refused_replies_total", [name, client], count
        yield "fedsb_silent_clients_total", [name], tally.silent
        yield from self._of_files(name)

    def _of_files(self, name: str) -> Iterator[Sample]:
        folder = self.home.runs / name
        for path in counting(folder)[1:2]:
            with self._reading(path):
                yield "fedsb_checkpoint_age_seconds", [name], time.time() - path.stat().st_mtime
        for path in counting(folder):
            with self._reading(path):
                if not path.exists():  # of a run that has not ended
                    continue
                moved = self._bytes_in(name, path)
                yield "fedsb_bytes_total", [name, "up"], moved["up"]
                yield "fedsb_bytes_total", [name, "down"], moved["down"]
                yield "fedsb_basis_bytes_total", [name], moved["basis"]
            break  # a damaged file is not replaced by an older one: a counter must not fall

    def _bytes_in(self, name: str, path: Path) -> dict[str, int]:
        """`bytes` of a run's `round.json` or `summary.json`; a file is read once."""
        version = path, path.stat().st_mtime_ns
        if name not in self._moved or self._moved[name][0] != version:
            content = read_json(path)
            counted = content.get("progress", content)["bytes"]
            self._moved[name] = version, {key: int(counted[key]) for key in ("up", "down", "basis")}
        return self._moved[name][1]

    @contextlib.contextmanager
    def _reading(self, path: Path) -> Iterator[None]:
        """Write a file that is damaged down, and go on without it."""
        try:
            yield
        except UNREADABLE as error:
            told = isinstance(error, FedsbError | OSError)
            self._damaged[path] = str(error) if told else f"{path}: is not what was written there; restore it from your backup"
