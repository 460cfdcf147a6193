"""`fedsb report`: one page for a run or a comparison, whatever state it is in, that loads nothing and believes nobody's names."""

import json
import math
import shutil
import statistics
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsb.report.charts import Line, lines
from fedsb.report.cores import cores_of
from fedsb.report.run_page import run_page
from fedsb.report.units import human_bytes
from fedsb.store import adapters
from fedsb.store.adapters import CORE_FILE
from fedsb.store.files import read_events, read_json
from tests.cli.front_door import complaint, printed
from tests.federation.tiny import config_of, federate, save_model, save_task, table

RESULTS = Path(__file__).parents[2] / "benchmarks/results/compare-banking77"


class Seen(HTMLParser):
    """Tags, what they would load, and the text between them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags, self.loaded, self.text = list[str](), list[str](), ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Count it."""
        self.tags.append(tag)
        self.loaded += [str(value) for name, value in attrs if name in ("src", "href", "srcset", "data")]

    def handle_data(self, data: str) -> None:
        """Keep it."""
        self.text += f" {data}"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    source, task = save_model(folder / "model"), save_task(folder / "task")
    federate(config_of(table(source, task, train={"learning_rate": 0.05}, personal={"steps": 4})), folder / "run")
    return folder / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def page_of(path: Path, capsys: pytest.CaptureFixture[str]) -> Seen:
    """What the command wrote."""
    assert printed(capsys, "report", str(path)) == f"{path / 'report.html'}\n"
    return Seen((path / "report.html").read_text())


def rewrite(run: Path, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
    """Another course of events."""
    events = change(read_events(run / "events.jsonl"))
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def test_a_run_says_how_it_went_and_loads_nothing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = page_of(run, capsys)
    assert not page.loaded and not {"script", "link", "img", "iframe"} & set(page.tags) and "@import" not in page.text
    events = read_events(run / "events.jsonl")
    last = [event for event in events if event["event"] == "round"][-1]
    assert f"{last['loss']:.3f}" in page.text
    for client in adapters.clients(run / "adapters"):
        assert adapters.load(run / "adapters", client).manifest.sha256[:12] in page.text
    for title in (
        "Training loss",
        "Bytes",
        "Singular values of the cores",
        "How alike the adapters are",
        "Norms of what was trained",
    ):
        assert title in page.text


def test_bytes_are_those_of_the_summary_and_before_it_those_of_the_last_checkpoint(run: Path) -> None:
    def told() -> dict[str, str]:
        return {name: value for name, value in run_page(run).facts if name in ("up", "down", "for the basis")}

    def named(moved: dict[str, int]) -> dict[str, str]:
        return {name: human_bytes(moved[key]) for name, key in (("up", "up"), ("down", "down"), ("for the basis", "basis"))}

    whole = read_json(run / "summary.json")["bytes"]
    assert told() == named(whole)
    (run / "summary.json").unlink()
    last = read_json(run / "checkpoints/round-0003/round.json")["progress"]["bytes"]
    assert told() == named(last) and last["down"] < whole["down"]
    shutil.rmtree(run / "checkpoints")
    assert told() == {}


def test_what_records_have_cost_is_what_the_ledgers_of_a_simulation_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, task = save_model(tmp_path / "model"), save_task(tmp_path / "task")
    private = {"unit": "record", "epsilon": 20.0, "clip_norm": 0.5}
    config = config_of(
        table(source, task, privacy=private, federation={"weighting": "uniform", "rounds": 2}, data={"partition": "iid"})
    )
    federate(config, tmp_path / "run")
    (part,) = [part for part in run_page(tmp_path / "run").parts if part.title == "Privacy spent"]
    told = json.loads(printed(capsys, "privacy", "ledger", str(tmp_path / "run"), "--json"))
    for client in told["clients"]:
        assert client["client"] in part.body and f"{client['epsilon']:.4g}" in part.body
    for path in (tmp_path / "run").glob("sites/*/ledger.jsonl"):  # as after a run on real sites
        path.unlink()
    assert "Privacy spent" not in [part.title for part in run_page(tmp_path / "run").parts]


def test_likeness_and_spectrum_are_those_of_the_adapters(run: Path) -> None:
    found = cores_of(run / "adapters")
    first, second, *_ = [each.numbers for each in found.stored.values()]
    assert found.alike[0][1] == pytest.approx(float(torch.cosine_similarity(first, second, dim=0)), abs=1e-5)
    name, stored = next(iter(found.stored.items()))
    cores = [parts["core"] for parts in stored.layers.values()]
    assert found.spectrum[name][0] == pytest.approx(sum(float(torch.linalg.matrix_norm(core, 2)) for core in cores) / len(cores))
    assert found.spectrum[name] == sorted(found.spectrum[name], reverse=True)


@pytest.mark.parametrize(
    ("change", "state", "told"),
    [
        (lambda events: events, None, "."),
        (lambda events: [e for e in events if e["event"] != "end"], "fair", "3 of 3 rounds are done."),
        (
            lambda events: [e | {"loss": 1.0 + e["round"]} if e["event"] == "round" else e for e in events],
            "bad",
            "It did not learn.",
        ),
        (lambda events: [e | {"loss": None} if e.get("round") == 3 else e for e in events], "bad", "It diverged."),
        (lambda events: [], "fair", "0 of 3 rounds are done."),
    ],
)
def test_the_verdict_follows_from_what_happened(run: Path, change: Any, state: str | None, told: str) -> None:
    rewrite(run, change)
    page = run_page(run)
    assert state in (None, page.state) and page.verdict.endswith(told)


def test_refusals_are_named_and_nothing_in_them_is_markup(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = {"time": 0.0, "event": "refused", "round": 1, "client": "<b>x</b>", "reason": "<script>alert(1)</script>"}
    rewrite(run, lambda events: [bad, *events])
    page = page_of(run, capsys)
    assert "script" not in page.tags and "<script>alert(1)</script>" in page.text and "<b>x</b>" in page.text
    assert "1 replies were refused" in page.text


def test_an_adapter_that_cannot_be_read_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    client = adapters.clients(run / "adapters")[0]
    (run / "adapters" / client / "v0001" / CORE_FILE).write_bytes(b"torn")
    page = page_of(run, capsys)
    assert f"adapters of {client} cannot be read" in page.text.lower() and "is not what was published" in page.text


@pytest.mark.parametrize("method", ["lora", "dylora", "nested-sb", "bone", "ravan"])
def test_whatever_the_method(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, task = save_model(tmp_path / "model"), save_task(tmp_path / "task")
    federate(config_of(table(source, task, adapter={"method": method})), tmp_path / "run")
    assert "Adapters" in page_of(tmp_path / "run", capsys).text


def test_a_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(RESULTS, tmp_path / "compared")
    page = page_of(tmp_path / "compared", capsys)
    rows = {json.loads(line)["name"] for line in (RESULTS / "results.jsonl").read_text().splitlines()}
    assert not page.loaded and all(name in page.text for name in rows)
    best = max(rows, key=lambda name: statistics.fmean(matches_of(name)))
    assert f"{best} is the most accurate." in page.text


def matches_of(name: str) -> list[float]:
    """Exact match of a method's runs."""
    lines = [json.loads(line) for line in (RESULTS / "results.jsonl").read_text().splitlines()]
    return [line["scores"]["global"]["exact_match"] for line in lines if line["name"] == name]


def test_what_is_no_run_is_said(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "results.jsonl").touch()
    assert "there is no such folder" in complaint(capsys, "report", str(tmp_path / "none"))
    assert "is not a run folder" in complaint(capsys, "report", str(tmp_path / "empty"))
    assert "no run of this comparison is finished" in complaint(capsys, "report", str(tmp_path / "begun"))
    assert "is a folder; name a file" in complaint(capsys, "report", str(run), "--out", str(tmp_path))
    assert not list(tmp_path.rglob("*.html"))


@pytest.mark.parametrize("log", [False, True])
def test_charts_bear_any_numbers(log: bool) -> None:
    """None, one, equal, huge, tiny, negative, not finite."""
    for values in ([], [1.0], [2.0, 2.0], [1e-300, 1e300], [-1.0, 0.0], [math.nan, math.inf, 1.0]):
        found = lines([Line("a", list(enumerate(values)), band=[(0, 1.0, 2.0)])], "x", "y", log_y=log)
        assert "nan" not in found and "inf" not in found
