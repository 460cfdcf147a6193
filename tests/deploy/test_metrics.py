"""The figures of a federation's folder: exactly what its files and its server say, whatever is damaged or away."""

import json
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from clients.answers import ANSWERS
from clients.figures import Figures
from clients.relay import UP
from fedsb.deploy import metrics, watch
from fedsb.deploy.certs import load_certificate, make_authority
from fedsb.deploy.home import Admitted, Home
from fedsb.deploy.metrics import FAMILIES, FederationCollector
from fedsb.errors import DeployError
from fedsb.report.journal import Journal
from fedsb.report.screen import Silent
from fedsb.store.files import write_json

GRAFANA = Path(__file__).parents[2] / "docs" / "grafana"
ROUND: dict[str, Any] = {"rounds": 9, "clients": 3, "aggregation_error": 1e-8}
Samples = dict[tuple[str, ...], float]


class Server:
    """Answers as Flower's server; `away` is what it fails with."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.away: Exception | None = None
        self.state = "running"

    def nodes(self) -> dict[str, dict[str, Any]]:
        self.asked.append("nodes")
        if self.away:
            raise self.away
        return {"1": {"status": "online"}, "2": {"status": "offline"}, "9": {"status": "online"}}

    def runs(self) -> dict[str, dict[str, Any]]:
        self.asked.append("runs")
        return {"77": {"status": self.state}}


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """Three sites, the third of them unknown to the server, and a run that has finished two rounds."""
    place = Home(tmp_path)
    since = "2026-11-22T00:00:00+00:00"
    place.write_admitted(
        {name: Admitted(node=node, key_sha256="0", since=since) for name, node in (("a", "1"), ("b", "2"), ("c", "3"))}
    )
    place.write_started({"mine": "77"})
    journal = Journal(place.runs / "mine" / "events.jsonl", Silent())
    journal.tell("start", run="mine", clients=3)
    for number in (1, 2):
        journal.tell("refused", round=number, client="b", reason="sent NaN")
        journal.tell("silent", round=number, client="c")
        journal.tell("round", round=number, loss=0.25 * number, seconds=float(number), **ROUND)
        path = place.runs / "mine" / "checkpoints" / f"round-{number:04d}" / "round.json"
        write_json(path, {"progress": {"bytes": {"up": 10 * number, "down": 20 * number, "basis": 5}, "history": []}})
        os.utime(path, (time.time() - 100, time.time() - 100 * (3 - number)))
    return place


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def collector(home: Home, server: Server, said: list[str], monkeypatch: pytest.MonkeyPatch) -> FederationCollector:
    monkeypatch.setattr(watch, "KEEP_SECONDS", 0.0)
    return FederationCollector(home, server, said.append)


def scrape(collector: FederationCollector) -> Samples:
    """What Prometheus would read: (name, values of the labels in their names' order) → value."""
    registry = CollectorRegistry()
    registry.register(collector)
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def test_every_figure_is_what_the_files_say(collector: FederationCollector, home: Home, said: list[str]) -> None:
    found = scrape(collector)
    age, started = found.pop(("fedsb_checkpoint_age_seconds", "mine")), found.pop(("fedsb_run_start_time_seconds", "mine"))
    assert 100 <= age < 130 and time.time() - 30 < started <= time.time()
    states = {("fedsb_run_state", "mine", state): float(state == "running") for state in metrics.STATES}
    assert found == states | {
        ("fedsb_superlink_up",): 1,
        ("fedsb_sites", "online"): 1,
        ("fedsb_sites", "offline"): 1,
        ("fedsb_sites", "registered"): 0,
        ("fedsb_sites", "unknown"): 1,
        ("fedsb_site_online", "a"): 1,
        ("fedsb_site_online", "b"): 0,
        ("fedsb_site_online", "c"): 0,
        ("fedsb_run_round", "mine"): 2,
        ("fedsb_run_rounds", "mine"): 9,
        ("fedsb_round_clients", "mine"): 3,
        ("fedsb_round_seconds", "mine"): 2,
        ("fedsb_round_loss", "mine"): 0.5,
        ("fedsb_aggregation_error", "mine"): 1e-8,
        ("fedsb_bytes_total", "up", "mine"): 20,
        ("fedsb_bytes_total", "down", "mine"): 40,
        ("fedsb_basis_bytes_total", "mine"): 5,
        ("fedsb_refused_replies_total", "mine"): 2,
        ("fedsb_client_refused_replies_total", "b", "mine"): 2,
        ("fedsb_silent_clients_total", "mine"): 2,
        ("fedsb_unreadable_files",): 0,
    }
    assert said == []


def test_a_run_that_ended_counts_what_its_summary_counts(collector: FederationCollector, home: Home, server: Server) -> None:
    server.state = "finished:completed"
    write_json(home.runs / "mine" / "summary.json", {"bytes": {"up": 33, "down": 66, "basis": 5, "up_per_client_round": 3}})
    found = scrape(collector)
    assert (found["fedsb_bytes_total", "up", "mine"], found["fedsb_bytes_total", "down", "mine"]) == (33, 66)
    assert found["fedsb_run_state", "mine", "completed"] == 1 and found["fedsb_run_state", "mine", "running"] == 0
    scrape(collector)
    assert server.asked == ["nodes", "runs", "nodes"]  # its state is not asked for again


def test_a_round_more_is_seen(collector: FederationCollector, home: Home) -> None:
    scrape(collector)
    Journal(home.runs / "mine" / "events.jsonl", Silent()).tell("round", round=3, loss=None, seconds=1.5, **ROUND)
    for number in (9999, 10000):  # the later one has the lower name
        path = home.runs / "mine" / "checkpoints" / f"round-{number}" / "round.json"
        write_json(path, {"progress": {"bytes": {"up": number, "down": 91, "basis": 6}}})
    found = scrape(collector)
    assert found["fedsb_run_round", "mine"] == 3 and found["fedsb_bytes_total", "up", "mine"] == 10000
    assert found["fedsb_checkpoint_age_seconds", "mine"] < 30 and str(found["fedsb_round_loss", "mine"]) == "nan"


def test_a_server_that_is_away_is_said_once_and_the_rest_is_told(
    collector: FederationCollector, server: Server, said: list[str]
) -> None:
    server.away = DeployError("the server refused `flwr supernode list` (connection refused)")
    for _ in range(2):
        found = scrape(collector)
        assert found["fedsb_superlink_up",] == 0 and found["fedsb_run_round", "mine"] == 2
        assert not {name for name, *_ in found} & {"fedsb_sites", "fedsb_site_online", "fedsb_run_state"}
    assert said == [str(server.away)]
    server.away = None
    assert scrape(collector)["fedsb_superlink_up",] == 1
    server.away = FileNotFoundError("flwr")
    assert scrape(collector)["fedsb_superlink_up",] == 0
    assert len(said) == 2


def test_a_server_that_hangs_does_not_hold_up_a_scrape(
    home: Home, server: Server, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until its last answer is too old to be true, that answer stands."""
    for name, value in (("KEEP_SECONDS", 0.0), ("WAIT_SECONDS", 0.01), ("GOOD_SECONDS", 1000.0)):
        monkeypatch.setattr(watch, name, value)
    released, answer = threading.Event(), server.nodes

    def hang() -> dict[str, dict[str, Any]]:
        released.wait(60)
        return answer()

    server.nodes = hang  # type: ignore[method-assign]
    collector = FederationCollector(home, server, said.append)
    found = scrape(collector)
    assert ("fedsb_superlink_up",) not in found and found["fedsb_run_round", "mine"] == 2  # nothing is known yet
    released.set()
    collector._watch._asking.join()
    released.clear()
    assert scrape(collector)["fedsb_superlink_up",] == 1
    monkeypatch.setattr(watch, "GOOD_SECONDS", 0.0)
    assert scrape(collector)["fedsb_superlink_up",] == 0
    released.set()
    collector._watch._asking.join()
    assert server.asked.count("nodes") == 2


def test_the_server_is_asked_seldom(home: Home, server: Server, said: list[str]) -> None:
    collector = FederationCollector(home, server, said.append)
    for _ in range(3):
        scrape(collector)
    assert server.asked == ["nodes", "runs"]


@pytest.mark.parametrize(
    ("file", "text", "gone"),
    [
        ("started.json", "{", "fedsb_run_round"),
        ("started.json", '{"runs": [1]}', "fedsb_run_round"),
        ("started.json", '{"runs": 1}', "fedsb_run_round"),
        ("admitted.json", "[]", "fedsb_site_online"),
        ("admitted.json", '{"a": {"node": 1}}', "fedsb_site_online"),
        ("runs/mine/checkpoints/round-0002/round.json", '{"progress"', "fedsb_bytes_total"),
        ("runs/mine/checkpoints/round-0002/round.json", '{"progress": {}}', "fedsb_bytes_total"),
        ("runs/mine/summary.json", '{"bytes": {"up": "many"}}', "fedsb_bytes_total"),
        ("tls/server.pem", "no certificate", "fedsb_certificate_expiry_timestamp_seconds"),
    ],
)
def test_a_damaged_file_is_counted_named_once_and_left_out(
    collector: FederationCollector, home: Home, said: list[str], file: str, text: str, gone: str
) -> None:
    (home.folder / file).parent.mkdir(exist_ok=True)
    (home.folder / file).write_text(text)
    for _ in range(2):
        found = scrape(collector)
        assert found["fedsb_unreadable_files",] == 1 and found["fedsb_superlink_up",] == 1
        assert gone not in {name for name, *_ in found}
    assert len(said) == 1 and said[0].startswith(f"{home.folder / file}: ") and "\n" not in said[0]
    (home.folder / file).unlink()
    assert scrape(collector)["fedsb_unreadable_files",] == 0


def test_of_a_journal_only_the_damaged_line_is_lost(collector: FederationCollector, home: Home, said: list[str]) -> None:
    path = home.runs / "mine" / "events.jsonl"
    refused = json.dumps({"time": 1.0, "event": "refused", "client": "b"})
    with path.open("a") as file:
        file.write(f"spoilt\n{refused}\n" + refused[:12])
    for _ in range(2):
        found = scrape(collector)
        assert found["fedsb_refused_replies_total", "mine"] == 3 and found["fedsb_unreadable_files",] == 1
    assert said == [f"{path}: line 8 is no event; remove that line"]


def test_certificates(collector: FederationCollector, home: Home) -> None:
    assert "fedsb_certificate_expiry_timestamp_seconds" not in {name for name, *_ in scrape(collector)}
    make_authority(home.tls.folder)
    found = scrape(collector)
    for name, path, days in (("server", home.tls.server, 397), ("authority", home.tls.ca, 3650)):
        expiry = found["fedsb_certificate_expiry_timestamp_seconds", name]
        assert expiry == load_certificate(path).not_valid_after_utc.timestamp()
        assert abs(expiry - time.time() - days * 86400) < 60
    home.tls.ca.unlink()  # in a container there may be only the server's
    assert ("fedsb_certificate_expiry_timestamp_seconds", "authority") not in scrape(collector)


def test_however_many_runs_and_clients_there_are_the_series_stay_few(collector: FederationCollector, home: Home) -> None:
    journal = Journal(home.runs / "mine" / "events.jsonl", Silent())
    for number in range(metrics.REFUSED_CLIENTS + 20):
        journal.tell("refused", round=1, client=f"node {number}", reason="failed")
    home.write_started({f"old-{number}": str(number) for number in range(300)} | {"mine": "77"})
    names = [name for name, *_ in scrape(collector)]
    assert names.count("fedsb_client_refused_replies_total") == metrics.REFUSED_CLIENTS
    assert names.count("fedsb_run_round") == metrics.RUNS


def test_an_empty_folder_has_nothing_to_tell(tmp_path: Path, server: Server, said: list[str]) -> None:
    found = scrape(FederationCollector(Home(tmp_path), server, said.append))
    assert {name for name, *_ in found} == {"fedsb_superlink_up", "fedsb_sites", "fedsb_unreadable_files"}
    assert found["fedsb_unreadable_files",] == 0 and said == [] and not list(tmp_path.iterdir())


def _exposed() -> set[str]:
    trainer = {
        family.name + "_total" * (family.type == "counter")
        for family in text_string_to_metric_families(Figures(ANSWERS).text().decode())
    }
    return FAMILIES.keys() | {UP} | {name for name in trainer if name.startswith("fedsb_")}


def _named(expressions: Iterator[str]) -> set[str]:
    return {name.removesuffix("_bucket") for each in expressions for name in re.findall(r"\bfedsb_\w+", each)}


def _dashboard() -> Iterator[str]:
    board = json.loads((GRAFANA / "fedsb.json").read_text())
    for panel in board["panels"]:
        yield from (target["expr"] for target in panel.get("targets", []))
    yield from (variable["definition"] for variable in board["templating"]["list"])


def test_the_dashboard_shows_every_figure_and_no_other() -> None:
    assert _named(_dashboard()) == _exposed()
    assert any("process_resident_memory_bytes" in each for each in _dashboard())
    assert b"process_resident_memory_bytes" in Figures(ANSWERS).text()


def test_the_dashboard_can_be_imported_for_any_prometheus() -> None:
    board = json.loads((GRAFANA / "fedsb.json").read_text())
    assert [(each["name"], each["type"]) for each in board["__inputs"]] == [("DS_PROMETHEUS", "datasource")]
    asking = [panel for panel in board["panels"] if panel["type"] != "row"]
    sources = [*asking, *board["templating"]["list"], *(target for panel in asking for target in panel["targets"])]
    assert {each["datasource"]["uid"] for each in sources} == {"${DS_PROMETHEUS}"}
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_the_alerts_are_about_figures_that_there_are() -> None:
    rules = [rule for group in yaml.safe_load((GRAFANA / "alerts.yml").read_text())["groups"] for rule in group["rules"]]
    named = _named(rule["expr"] for rule in rules)
    assert named <= _exposed()
    wanted = {
        "fedsb_superlink_up",
        "fedsb_checkpoint_age_seconds",
        "fedsb_refused_replies_total",
        "fedsb_certificate_expiry_timestamp_seconds",
    }
    assert wanted <= named
    assert all(rule["annotations"].keys() == {"summary", "description"} for rule in rules)
