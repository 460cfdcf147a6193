"""Trackers against their real local back ends: TensorBoard's event files, MLflow on SQLite, Weights & Biases offline."""

import json
import statistics
import struct
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from fedsb.errors import ConfigError
from fedsb.report import trackers
from fedsb.report.journal import Journal
from fedsb.report.screen import Lines, Silent
from fedsb.report.trackers import Tracking
from fedsb.store.files import read_events, read_json
from tests.federation.test_resume import killed
from tests.federation.tiny import config_of, events, federate, save_model, save_task, table

ALL = ("tensorboard", "mlflow", "wandb")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # within these packages
Figures = dict[str, dict[int, float]]  # name → step → figure


@pytest.fixture(autouse=True)
def _local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("WANDB_MODE", "offline")


def _told(name: str, folder: Path) -> Figures:
    return {"tensorboard": _in_tensorboard, "mlflow": _in_mlflow, "wandb": _in_wandb}[name](folder)


def _in_tensorboard(folder: Path) -> Figures:
    read = EventAccumulator(str(folder / "tensorboard"))
    read.Reload()
    return {name: {event.step: event.value for event in read.Scalars(name)} for name in read.Tags()["scalars"]}


def _mlflow_run(folder: Path) -> Run:
    return MlflowClient().get_run(read_json(folder / "trackers.json")["mlflow"])


def _in_mlflow(folder: Path) -> Figures:
    client, run = MlflowClient(), _mlflow_run(folder)
    return {name: {m.step: m.value for m in client.get_metric_history(run.info.run_id, name)} for name in run.data.metrics}


def _in_wandb(folder: Path) -> Figures:
    figures: Figures = {}
    for path in sorted((folder / "wandb").glob("offline-run-*/*.wandb")):
        for data in _logged(path.read_bytes()):
            record = Record.FromString(data)
            items = {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            for name, value in items.items():
                if not name.startswith("_"):
                    figures.setdefault(name, {})[items["_step"]] = value
    return figures


def _logged(content: bytes) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format, which begins with seven bytes of its own."""
    at, record = 7, b""
    while at + 7 <= len(content):
        _, length, kind = struct.unpack_from("<IHB", content, at)
        record = (record if kind in (3, 4) else b"") + content[at + 7 : at + 7 + length]
        if kind in (1, 4):  # whole, or the last part
            yield record
        at += 7 + length
        left = 32768 - at % 32768
        at += left if left < 7 else 0


def _config(folder: Path, *to: str) -> Any:
    return config_of(table(save_model(folder / "model"), save_task(folder / "words"), track={"to": to}))


def test_each_tracker_gets_what_the_summary_says(tmp_path: Path) -> None:
    summary = federate(_config(tmp_path, *ALL), tmp_path / "run")
    for name in ALL:
        told = _told(name, tmp_path / "run")
        for entry in summary["history"]:
            for figure in ("loss", "aggregation_error", "clients"):
                assert told[f"round/{figure}"][entry["round"]] == pytest.approx(entry[figure]), name
            assert told["bytes/up"][entry["round"]] == entry["up"] and told["bytes/down"][entry["round"]] == entry["down"]
        for reply in events(tmp_path / "run", "reply"):
            assert told[f"clients/{reply['client']}/loss"][reply["round"]] == pytest.approx(reply["loss"])
        for which, scores in summary["evaluation"].items():
            for client, score in scores.items():
                assert told[f"clients/{client}/{which}/loss"] == {3: pytest.approx(score["loss"])}
            mean = statistics.fmean(score["exact_match"] for score in scores.values())
            assert told[f"scores/{which}/exact_match"] == {3: pytest.approx(mean)}
    run = _mlflow_run(tmp_path / "run")
    assert run.info.status == "FINISHED" and run.info.run_name == "tiny" and run.data.params["adapter.rank"] == "4"
    assert MlflowClient().get_experiment(run.info.experiment_id).name == "fedsb"


def test_a_resumed_run_goes_on_where_its_trackers_know_it(tmp_path: Path) -> None:
    config, out = _config(tmp_path, *ALL), tmp_path / "run"
    killed(config, out, "writing a checkpoint")
    assert _mlflow_run(out).info.status == "KILLED"
    kept = read_json(out / "trackers.json")
    summary = federate(config, out, resume=True)
    assert read_json(out / "trackers.json") == kept and _mlflow_run(out).info.status == "FINISHED"
    for name in ALL:
        told = _told(name, out)["round/loss"]
        assert told == {entry["round"]: pytest.approx(entry["loss"]) for entry in summary["history"]}, name


def test_without_trackers_none_leaves_anything(tmp_path: Path) -> None:
    federate(_config(tmp_path), tmp_path / "run")
    assert not (tmp_path / "run" / "trackers.json").exists() and not (tmp_path / "mlflow.db").exists()


@pytest.mark.parametrize("name", ALL)
def test_a_tracker_that_is_not_installed_is_named_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    config = _config(tmp_path, name)
    monkeypatch.setitem(sys.modules, {"tensorboard": "torch.utils.tensorboard"}.get(name, name), None)
    with pytest.raises(ConfigError, match=rf"track\.to: {name} is not installed; pip install 'fedsb\[{name}\]'"):
        federate(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_does_not_begin_is_named_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # where nobody listens
    with pytest.raises(ConfigError, match=r"track\.to: mlflow does not begin \(.*\); mend it, or leave it out"):
        federate(_config(tmp_path, "tensorboard", "mlflow"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


class _Sink:
    def __init__(self, *, fails: bool = False, waits: threading.Event | None = None) -> None:
        self.fails, self.waits = fails, waits
        self.got: list[tuple[dict[str, float], int]] = []

    def log(self, figures: Mapping[str, float], step: int) -> None:
        if self.waits:
            self.waits.wait()
        if self.fails:
            raise ConnectionError("no route\nto host")
        self.got.append((dict(figures), step))

    def close(self, *, finished: bool) -> None:
        pass


def _round(number: int) -> dict[str, Any]:
    return {"round": number, "loss": 1.0, "aggregation_error": None, "clients": 2, "up": 1, "down": 2, "seconds": 0.1}


def test_one_that_fails_is_named_once_and_the_run_goes_on(tmp_path: Path) -> None:
    lines: list[str] = []
    broken, sound = Tracking("mlflow", _Sink(fails=True)), Tracking("wandb", sink := _Sink())
    journal = Journal(tmp_path / "events.jsonl", Lines(lines.append), [broken, sound])
    journal.tell("round", rounds=2, **_round(1))
    for _ in range(100):
        if broken.failed:
            break
        time.sleep(0.02)
    journal.tell("round", rounds=2, **_round(2))
    journal.close()
    told = [event for event in read_events(tmp_path / "events.jsonl") if event["event"] == "untracked"]
    assert [(event["tracker"], event["reason"]) for event in told] == [("mlflow", "ConnectionError: no route to host")]
    shown = "mlflow is told no more of this run: ConnectionError: no route to host"
    assert [line for line in lines if "mlflow" in line] == [shown]
    assert [step for _, step in sink.got] == [1, 2] and "round/aggregation_error" not in sink.got[0][0]


def test_a_slow_one_holds_up_neither_a_round_nor_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "PATIENCE", 0.1)
    free = threading.Event()
    journal = Journal(tmp_path / "events.jsonl", Silent(), [Tracking("mlflow", _Sink(waits=free))])
    begun = time.monotonic()
    for number in range(1, 50):
        journal.tell("round", rounds=50, **_round(number))
    journal.close()
    assert time.monotonic() - begun < 5
    free.set()
    assert [event["event"] for event in read_events(tmp_path / "events.jsonl")][-1] == "untracked"
