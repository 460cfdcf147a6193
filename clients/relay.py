"""A trainer's figures, fetched over its Unix socket for a process that has a network: the trainer itself has none."""

import http.client
from collections.abc import Callable, Iterable
from pathlib import Path

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from clients.ask import UnixConnection

SECONDS = 5.0  # longest wait: Prometheus itself waits 10 s by default
UP = "fedsb_trainer_up"


class TrainerRelay(Collector):
    """Fetches what the trainer behind a socket tells of itself, at each scrape; `fedsb_trainer_up 0` if it does not answer."""

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self.path, self.say = path, say
        self._away = ""

    def collect(self) -> Iterable[Metric]:
        """What the trainer tells, and whether it does."""
        try:
            found, away = list(text_string_to_metric_families(self._fetch())), ""
        except (OSError, http.client.HTTPException, ValueError) as error:
            found, away = [], f"the trainer at {self.path} does not tell its figures ({error or type(error).__name__})"
        if away and not self._away:
            self.say(away)
        self._away = away
        return [GaugeMetricFamily(UP, "1 if the site's trainer answers, else 0.", value=not away), *found]

    def _fetch(self) -> str:
        connection = UnixConnection(self.path, SECONDS)
        try:
            connection.request("GET", "/metrics")
            response = connection.getresponse()
            text = response.read().decode()
        finally:
            connection.close()
        if response.status != http.client.OK:
            raise ValueError(f"it answered {response.status}")
        return text
