"""`fedsb compare` on a tiny federation: two methods and two seeds, stopped, gone on with, tuned, and asked for the impossible."""

import csv
import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clients import session
from fedsb.cli import compare, compare_plan, compare_run
from fedsb.cli.compare_run import run_apart, run_here
from fedsb.config import RunConfig
from fedsb.data import sites
from fedsb.data.sites import client_data
from fedsb.errors import FederationError
from fedsb.report.comparison import pooled
from fedsb.store.files import read_events, read_json
from server.run_folder import load_run
from tests.cli.front_door import call
from tests.federation.tiny import equal, events, final_state

Capture = pytest.CaptureFixture[str]
FILES = {"accuracy-by-bytes.png", "accuracy-by-bytes.svg", "loss-by-round.png", "loss-by-round.svg"} | {
    "compare.toml", "results.jsonl", "table.csv", "table.json", "runs",
}  # fmt: skip
MOVED = {"seconds", "peak_memory"}  # what differs between two runs of the same


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture(scope="module")
def finished(comparison: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished comparison; tests that change it copy it first."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "run_apart", lambda config, run, hear: (run_here(config, run), read_json(run / "summary.json"))[1])
        assert call("compare", str(comparison), "--out", str(folder)) == 0
    return folder


def lasting(folder: Path) -> list[dict[str, Any]]:
    """The rows of a table without what differs between two runs of the same."""
    return [{k: v for k, v in row.items() if k not in MOVED} for row in read_json(folder / "table.json")["rows"]]


def test_a_table_is_what_the_runs_say(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == FILES
    rows = {row["name"]: row for row in read_json(finished / "table.json")["rows"]}
    assert list(rows) == ["lora-sb", "lora"]
    for name, row in rows.items():
        runs = [run for run in (finished / "runs").iterdir() if load_run(run).adapter.method == name]
        assert sorted(load_run(run).seed for run in runs) == [0, 1]
        summaries = [read_json(run / "summary.json") for run in runs]
        for kind in ("basis", "up", "down"):
            moved = [s["bytes"]["basis"] if kind == "basis" else sum(entry[kind] for entry in s["history"]) for s in summaries]
            assert row[f"bytes_{kind}"] == sum(moved) / 2
        for which, prefix in (("global", ""), ("personal", "personal_")):
            losses = [float(pooled(summary["evaluation"][which])["loss"] or 0) for summary in summaries]
            assert row[f"{prefix}loss"] == pytest.approx(sum(losses) / 2)
            assert row[f"{prefix}loss_sd"] == pytest.approx(abs(losses[0] - losses[1]) / 2**0.5)
        errors = [max(entry["aggregation_error"] for entry in summary["history"]) for summary in summaries]
        assert row["aggregation_error"] == pytest.approx(sum(errors) / 2)
        assert row["trainable_parameters"] == summaries[0]["trainable_parameters"]
        assert row["peak_memory"] == max(summary["peak_memory"] for summary in summaries) > 1e7
    assert rows["lora-sb"]["aggregation_error"] < 1e-6 < rows["lora"]["aggregation_error"]


def test_a_run_is_the_one_that_simulate_makes(finished: Path, tmp_path: Path) -> None:
    (run,) = (run for run in (finished / "runs").iterdir() if run.name.startswith("lora-1-"))
    assert call("simulate", str(run / "config.toml"), "--out", str(tmp_path / "run")) == 0
    assert equal(final_state(run), final_state(tmp_path / "run"))
    assert read_json(run / "summary.json")["evaluation"] == read_json(tmp_path / "run" / "summary.json")["evaluation"]


def test_csv_json_and_screen_agree(comparison: Path, finished: Path, ran: list[RunConfig], capsys: Capture) -> None:
    before = (finished / "table.csv").read_bytes()
    assert call("compare", str(comparison), "--out", str(finished)) == 0
    assert ran == [] and (finished / "table.csv").read_bytes() == before, "all is on disk"
    printed = {
        cells[0]: cells
        for line in capsys.readouterr().out.splitlines()
        if len(cells := [c.strip() for c in line.split("│")[1:]]) > 9
    }
    rows = read_json(finished / "table.json")["rows"]
    for row, text in zip(rows, csv.DictReader((finished / "table.csv").read_text().splitlines()), strict=True):
        assert {key: text[key] for key in row} == {key: "" if value is None else str(value) for key, value in row.items()}
        cells = printed[f"{row['name']} *" if row["front"] else row["name"]]
        assert f"{row['loss']:.3f} ± {row['loss_sd']:.3f}" in cells and f"{row['trainable_parameters']:,}" in cells
        assert f"{row['exact_match']:.3f} ± {row['exact_match_sd']:.3f}" in cells and f"{row['aggregation_error']:.1e}" in cells
    assert any(row["front"] for row in rows)


def test_programs_get_a_line_for_each_run_and_the_table_last(
    comparison: Path, finished: Path, out: Path, ran: list[RunConfig], capsys: Capture
) -> None:
    command = ("compare", str(comparison), "--out", str(out), "--methods", "lora", "--seeds", "0,1")
    assert call(*command, "--json") == 0
    *told, last = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [{k: v for k, v in line.items() if k not in ("event", "number", "of")} for line in told] == read_events(
        out / "results.jsonl"
    )
    assert [(line["event"], line["number"], line["of"]) for line in told] == [("run", 1, 2), ("run", 2, 2)]
    assert last == {"event": "table", "folder": str(out), "rows": read_json(out / "table.json")["rows"]}
    assert call(*command, "--quiet") == 0
    assert "lora" in (printed := capsys.readouterr().out) and "[1/2]" not in printed


def test_a_result_says_what_it_came_out_of(finished: Path) -> None:
    lines = read_events(finished / "results.jsonl")
    assert len(lines) == 4 and len({line["key"] for line in lines}) == 4
    for line in lines:
        summary, config = (finished / "runs" / line["run"] / "summary.json"), load_run(finished / "runs" / line["run"])
        told = read_json(summary)
        assert line["fingerprints"] == {
            "config": config.digest(), "model": told["model"]["sha256"], "data": told["data"]["sha256"],
        }  # fmt: skip
        for source in (line, told):
            assert len(source["code"]["sha256"]) == 64 and source["code"]["version"]
            assert {"torch", "peft", "flwr", "python"} <= set(source["versions"])
            assert set(source["machine"]) == {"cpu", "cores", "threads", "memory_bytes", "device", "gpu", "system"}
    data = {(line["seed"], line["fingerprints"]["data"]) for line in lines}
    assert len(data) == 2, "all methods have the same data"


@pytest.mark.parametrize("place", ["between rounds", "after the first run", "before its line is written"])
def test_stopped_and_gone_on_with_it_is_the_same_and_nothing_is_run_again(
    comparison: Path, finished: Path, out: Path, ran: list[RunConfig], capsys: Capture, place: str
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    places: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
        "between rounds": lambda p: p.setattr("server.federation.Federation.announce", _second(interrupt)),
        "after the first run": lambda p: p.setattr(compare, "run_apart", _second_run(interrupt)),
        "before its line is written": lambda p: p.setattr(compare, "append_line", interrupt),
    }
    with pytest.MonkeyPatch.context() as patch:
        places[place](patch)
        assert call("compare", str(comparison), "--out", str(out), "--set", "runtime.threads=1") == 130
    command = f"fedsb compare {comparison} --out {out} --set runtime.threads=1"
    assert capsys.readouterr().err.splitlines()[-1] == f"fedsb: stopped; go on with `{command}`"
    before = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/checkpoints/*/round.json")}
    assert bool(before) and not (out / "table.csv").exists()
    ran.clear()
    with pytest.MonkeyPatch.context() as patch:
        if place == "before its line is written":  # its summary is there: nothing of it is run, whatever process would do it
            patch.setattr(compare, "run_apart", lambda config, folder, hear: _unless_there(ran, config, folder))
        assert call("compare", str(comparison), "--out", str(out), "--set", "runtime.threads=1") == 0
    assert len(ran) == (4 if place == "between rounds" else 3)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert lasting(out) == lasting(finished)
    if place == "between rounds":
        (run,) = out.glob("runs/lora-sb-0-*")
        assert [event["round"] for event in events(run, "resumed")] == [1]


def _second(then: Callable[..., None]) -> Callable[..., None]:
    calls: list[object] = []

    def announce(self: object, server_round: int, clients: int) -> None:
        calls.append(self)
        if len(calls) == 2:
            then()

    return announce


def _second_run(then: Callable[..., None]) -> Callable[..., Any]:
    runs: list[Path] = []

    def run(config: RunConfig, folder: Path, hear: Callable[[str], None]) -> dict[str, Any]:
        runs.append(folder)
        if len(runs) == 2:
            then()
        run_here(config, folder)
        return read_json(folder / "summary.json")

    return run


def _unless_there(ran: list[RunConfig], config: RunConfig, folder: Path) -> dict[str, Any]:
    """`run_apart`, whose process is this one."""
    with pytest.MonkeyPatch.context() as patch:

        class Here:
            returncode = 0

            def __init__(self, *_: object, **__: object) -> None:
                ran.append(config)

                self.stdin, self.stdout = io.StringIO(), io.StringIO()

            def wait(self) -> None:
                run_here(config, folder)

        patch.setattr(compare_run.subprocess, "Popen", Here)
        return run_apart(config, folder)


def test_more_methods_and_seeds_extend_what_is_there(comparison: Path, finished: Path, out: Path, ran: list[RunConfig]) -> None:
    shutil.copytree(finished, out)
    assert call("compare", str(comparison), "--out", str(out), "--methods", "lora,from-w0", "--seeds", "1,2") == 0
    assert [(run.adapter.method, run.basis.source, run.seed) for run in ran] == [
        ("lora-sb", "weights", 1), ("lora", "random", 2), ("lora-sb", "weights", 2),
    ]  # fmt: skip
    assert [row["name"] for row in read_json(out / "table.json")["rows"]] == ["lora", "from-w0"]
    assert len(read_events(out / "results.jsonl")) == 7


def test_other_data_or_another_model_is_another_run(comparison: Path, finished: Path, out: Path, ran: list[RunConfig]) -> None:
    shutil.copytree(finished, out)
    folder = comparison.parent / "words"
    rows = (folder / "train.jsonl").read_text()
    try:
        (folder / "train.jsonl").write_text(rows + json.dumps({"prompt": "red red red", "completion": "up"}) + "\n")
        forget_data()
        assert call("compare", str(comparison), "--out", str(out), "--methods", "lora-sb", "--seeds", "0") == 0
    finally:
        (folder / "train.jsonl").write_text(rows)
        forget_data()
    assert len(ran) == 1 and len(read_events(out / "results.jsonl")) == 5


def forget_data() -> None:
    """As another process does."""
    compare_plan.fingerprint_of_data.cache_clear()
    sites._train.cache_clear()
    sites._scored.cache_clear()


TUNED = ("--set", "compare.rates=[1e-6, 1.0]", "--set", "compare.validation=0.2", "--seeds", "0")


def test_rates_are_tried_on_validation_and_the_best_one_runs(
    comparison: Path, out: Path, ran: list[RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def watched(config: RunConfig, name: str, index: int, split: Any) -> Any:
        read.append(f"{config.evaluation.split}: {split}")
        return client_data(config, name, index, split)

    monkeypatch.setattr(session, "client_data", watched)
    assert call("compare", str(comparison), "--out", str(out), *TUNED) == 0
    assert set(read) == {"validation: train", "validation: validation", "test: train", "test: test"}
    tried, final = ran[:4], ran[4:]
    assert [(run.evaluation.split, run.data.validation, run.seed) for run in tried] == [("validation", 0.2, 100)] * 4
    assert [(run.evaluation.split, run.data.validation, run.seed) for run in final] == [("test", 0.0, 0)] * 2
    lines = read_events(out / "tuning.jsonl")
    assert [(line["name"], line["factor"], line["split"]) for line in lines] == [
        (name, factor, "validation") for name in ("lora-sb", "lora") for factor in (1e-6, 1.0)
    ]
    for idle, trained in (lines[:2], lines[2:]):
        assert trained["scores"]["global"]["loss"] < idle["scores"]["global"]["loss"], "the better rate"
    assert all(run.train.learning_rate == "auto" for run in final), "a factor of 1 is the method's own"
    assert [row["factor"] for row in read_json(out / "table.json")["rows"]] == [1.0, 1.0]
    ran.clear()
    assert call("compare", str(comparison), "--out", str(out), *TUNED) == 0
    assert ran == []


def test_a_rate_that_fails_is_not_chosen_and_not_tried_again(
    comparison: Path, out: Path, ran: list[RunConfig], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    here = compare.run_apart

    def fails(config: RunConfig, folder: Path, hear: Callable[[str], None]) -> dict[str, Any]:
        if config.train.learning_rate == "auto":
            raise FederationError("round 1: too few usable replies")
        return here(config, folder, hear)

    monkeypatch.setattr(compare, "run_apart", fails)
    command = ("compare", str(comparison), "--out", str(out), "--methods", "lora", "--seeds", "0")
    assert call(*command, "--set", "compare.rates=[1.0, 0.5]") == 0
    assert [line.get("failed") for line in read_events(out / "tuning.jsonl")] == ["round 1: too few usable replies", None]
    (row,) = read_json(out / "table.json")["rows"]
    assert row["factor"] == 0.5 and row["learning_rate"] == 1e-3
    capsys.readouterr()
    assert call(*command) == 2
    assert "fedsb: lora, seed 0: round 1: too few usable replies" in capsys.readouterr().err


def test_one_rate_is_taken_untried(comparison: Path, out: Path, ran: list[RunConfig]) -> None:
    command = ("compare", str(comparison), "--out", str(out), "--methods", "lora", "--seeds", "0", "--set", "compare.rates=[2]")
    assert call(*command, "--set", "personal.steps=0") == 0
    (run,) = ran
    assert run.train.learning_rate == 4e-3 and not (out / "tuning.jsonl").exists()
    (row,) = read_json(out / "table.json")["rows"]
    assert row["personal_loss"] is None


def test_without_matplotlib_there_is_a_table_and_one_sentence(
    comparison: Path, finished: Path, out: Path, ran: list[RunConfig], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished, out)
    for path in out.glob("*-by-*"):
        path.unlink()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert call("compare", str(comparison), "--out", str(out)) == 0
    printed = capsys.readouterr()
    assert printed.err.splitlines() == [
        "fedsb: plots need matplotlib; pip install 'fedsb[plots]', and the same command draws them"
    ]
    assert "lora-sb" in printed.out and not list(out.glob("*-by-*"))
