"""What a trainer counts of its own work, for Prometheus."""

import contextlib
import time
from collections.abc import Collection, Iterator

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from fedsb.errors import FedsbError

OTHER = "other"  # whatever is asked that is none of the known kinds: anybody's words are no label
ANSWERED, REFUSED, FAILED, DROPPED = "answered", "refused", "failed", "dropped"
BUCKETS = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000)  # seconds
CONTENT_TYPE = CONTENT_TYPE_LATEST


class Figures:
    """The counts of one trainer. `kinds`: the questions that it knows."""

    def __init__(self, kinds: Collection[str]) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a series for each counter that says when it began
        self.kinds = kinds
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._jobs = Counter(
            "fedsb_trainer_jobs", "Jobs done, by kind and outcome.", ["kind", "outcome"], registry=self._registry
        )
        self._seconds = Histogram(
            "fedsb_trainer_job_seconds", "Time a job took once begun.", ["kind"], buckets=BUCKETS, registry=self._registry
        )
        self._waiting = Gauge("fedsb_trainer_jobs_waiting", "Jobs that wait for their turn.", registry=self._registry)
        self._running = Gauge("fedsb_trainer_jobs_running", "Jobs at work: 0 or 1.", registry=self._registry)
        for kind in (*kinds, OTHER):  # from the start, so that the first of each is seen as a rise
            self._seconds.labels(kind)
            for outcome in (ANSWERED, REFUSED, FAILED, DROPPED):
                self._jobs.labels(kind, outcome)

    def asked(self) -> None:
        """A job has come, and waits."""
        self._waiting.inc()

    def dropped(self, kind: str) -> None:
        """A job that waited is not done, since nobody waits for its answer any more."""
        self._waiting.dec()
        self._jobs.labels(kind if kind in self.kinds else OTHER, DROPPED).inc()

    @contextlib.contextmanager
    def job(self, kind: str) -> Iterator[None]:
        """Around a job: how long it takes and how it ends. A FedsbError is a refusal, anything else raised a failure."""
        kind, outcome, started = kind if kind in self.kinds else OTHER, FAILED, time.monotonic()
        self._waiting.dec()
        self._running.inc()
        try:
            yield
            outcome = ANSWERED
        except FedsbError:
            outcome = REFUSED
            raise
        finally:
            self._running.dec()
            self._jobs.labels(kind, outcome).inc()
            self._seconds.labels(kind).observe(time.monotonic() - started)

    def text(self) -> bytes:
        """All of it in Prometheus's text format (`CONTENT_TYPE`)."""
        return generate_latest(self._registry)
