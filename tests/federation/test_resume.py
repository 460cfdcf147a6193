"""Killed anywhere and resumed, a run ends as if nothing had happened: state, personal adapters, scores and bytes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from clients import session
from clients.session import Session
from fedsb.cli.evaluate import evaluate_run
from fedsb.config import RunConfig
from fedsb.errors import BasisError, CheckpointError, StoreError
from fedsb.models import _digest
from fedsb.report.journal import Journal
from server.run_folder import run_folder
from tests.federation.tiny import (
    assert_same_result,
    assert_same_run,
    classification,
    config_of,
    events,
    federate,
    table,
)

ROOT = Path(__file__).parents[2]


class Killed(BaseException):
    """Stands for kill -9: nothing that handles errors of this project handles it."""


def _at(count: int, original: Callable[..., Any]) -> Callable[..., Any]:
    """`original`, but killed when it is called for the `count`-th time."""
    calls = 0

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            raise Killed
        return original(*args, **kwargs)

    return wrapper


def _writing(patch: pytest.MonkeyPatch, name: str) -> None:
    """Killed when a file or folder of that name is about to be put in place."""
    original = os.replace

    def replace(source: Any, target: Any) -> None:
        if str(target).endswith(name):
            raise Killed
        original(source, target)

    patch.setattr(os, "replace", replace)


def _telling(patch: pytest.MonkeyPatch, event: str, number: int) -> None:
    """Killed when that event is told for the `number`-th time, before it is written down."""
    original = Journal.tell
    seen = 0

    def tell(self: Journal, name: str, **fields: Any) -> None:
        nonlocal seen
        seen += name == event
        if seen == number:
            raise Killed
        original(self, name, **fields)

    patch.setattr(Journal, "tell", tell)


STEPS = 2 * 3  # optimiser steps of three clients in one round
PLACES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "writing the configuration": lambda p: _writing(p, "config.toml"),
    "writing the basis": lambda p: _writing(p, ".safetensors"),
    "preparing clients": lambda p: _telling(p, "prepared", 2),
    "in the middle of the first round": lambda p: _telling(p, "reply", 2),
    "writing the first checkpoint": lambda p: _writing(p, "round-0001"),
    "between rounds": lambda p: _telling(p, "round", 2),
    "in the middle of a client's training": lambda p: p.setattr(
        torch.optim.AdamW, "step", _at(STEPS + 4, torch.optim.AdamW.step)
    ),
    "writing a checkpoint": lambda p: _writing(p, "round-0002"),
    "in the middle of personalisation": lambda p: p.setattr(
        torch.optim.AdamW, "step", _at(3 * STEPS + 3, torch.optim.AdamW.step)
    ),
    "before a personal adapter is published": lambda p: _writing(p, "client-1/v0001"),
    "in the middle of publishing": lambda p: _writing(p, "client-1/current"),
    "after personalisation": lambda p: _telling(p, "personalised", 1),
    "in the middle of evaluation": lambda p: p.setattr(Session, "score", _at(5, Session.score)),
    "writing the summary": lambda p: _writing(p, "summary.json"),
}

ALREADY_SENT = ("preparing clients", "in the middle of the first round", "writing the first checkpoint")  # B and A


@pytest.fixture(scope="module")
def public(words: str) -> dict[str, Any]:
    """A basis that is sent, so that its bytes could be counted twice."""
    return {"source": "public", "public": {"name": "open", "source": words}, "examples": 4}


@pytest.fixture(scope="module")
def config(llama: str, words: str, public: dict[str, Any]) -> RunConfig:
    return config_of(table(llama, words, basis=public, federation={"rounds": 3}))


@pytest.fixture(scope="module")
def whole(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    federate(config, folder)
    return folder


def killed(config: RunConfig, folder: Path, place: str, *, resume: bool = False) -> None:
    """A run in a process of its own, so to speak, killed at a place."""
    session.open_session.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        PLACES[place](patch)
        with pytest.raises(Killed):
            federate(config, folder, resume=resume)
    session.open_session.cache_clear()
    assert not (folder / "summary.json").exists()


@pytest.mark.parametrize("place", PLACES)
def test_a_run_killed_and_resumed_is_as_if_uninterrupted(config: RunConfig, whole: Path, out: Path, place: str) -> None:
    killed(config, out, place)
    federate(config, out, resume=True)
    assert_same_run(whole, out, same_bytes=place not in ALREADY_SENT)
    assert not [path for path in out.rglob("*") if path.name.endswith((".tmp", ".old"))]


def test_killed_again_and_again(config: RunConfig, whole: Path, out: Path) -> None:
    killed(config, out, "in the middle of the first round")
    for place in (
        "writing the first checkpoint",
        "between rounds",
        "in the middle of publishing",
        "writing the summary",
    ):
        killed(config, out, place, resume=True)
    federate(config, out, resume=True)
    assert_same_run(whole, out, same_bytes=False)


def test_finished_rounds_and_adapters_are_not_done_again(config: RunConfig, out: Path) -> None:
    killed(config, out, "in the middle of publishing")
    done = len(events(out, "reply"))
    before = {path: path.stat().st_mtime_ns for path in out.glob("checkpoints/*/state.safetensors")}
    federate(config, out, resume=True)
    assert len(events(out, "reply")) == done == 9
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert [event["round"] for event in events(out, "resumed")] == [3]
    assert [event["client"] for event in events(out, "personal")].count("client-0") == 1


def test_a_trained_head_and_sampling_resume_too(bert: str, labels: str, tmp_path: Path) -> None:
    config = config_of(classification(bert, labels, federation={"fraction": 0.5, "weighting": "uniform"}))
    federate(config, tmp_path / "whole")
    killed(config, tmp_path / "run", "between rounds")
    federate(config, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_resuming_a_finished_run_changes_nothing(config: RunConfig, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    federate(config, out, resume=True)
    assert_same_run(whole, out)


def test_resume_of_nothing_starts_anew(config: RunConfig, whole: Path, out: Path) -> None:
    federate(config, out, resume=True)
    assert_same_run(whole, out)


def test_what_is_only_speed_may_change(config: RunConfig, whole: Path, out: Path) -> None:
    killed(config, out, "between rounds")
    patient = config.runtime.model_copy(update={"threads": 0, "progress": "lines"})
    federate(config.model_copy(update={"runtime": patient}), out, resume=True)
    assert_same_result(whole, out)


def test_a_run_goes_on_only_with_its_own_configuration(config: RunConfig, out: Path) -> None:
    killed(config, out, "between rounds")
    with pytest.raises(StoreError, match="holds a run already; add --resume"):
        federate(config, out)
    with pytest.raises(CheckpointError, match="another configuration than the one given; resume with that one"):
        federate(config.model_copy(update={"seed": 4}), out, resume=True)


def test_a_torn_checkpoint_is_named_and_its_folder_may_go(config: RunConfig, whole: Path, out: Path) -> None:
    killed(config, out, "in the middle of evaluation")
    torn = out / "checkpoints" / "round-0003" / "state.safetensors"
    os.truncate(torn, 100)
    with pytest.raises(CheckpointError, match="round-0003/state.safetensors: is missing, torn"):
        federate(config, out, resume=True)
    shutil.rmtree(torn.parent)
    shutil.rmtree(out / "adapters")
    federate(config, out, resume=True)
    assert_same_run(whole, out)


def test_a_checkpoint_of_another_basis_is_refused(config: RunConfig, llama: str, words: str, tmp_path: Path) -> None:
    killed(config, tmp_path / "run", "between rounds")
    federate(config_of(table(llama, words)), tmp_path / "other")
    shutil.rmtree(tmp_path / "run" / "basis")
    shutil.copytree(tmp_path / "other" / "basis", tmp_path / "run" / "basis")
    with pytest.raises(BasisError, match="the checkpoint is of another basis"):
        federate(config, tmp_path / "run", resume=True)


def test_a_run_does_not_go_on_with_another_base_model(config: RunConfig, llama: str, out: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(llama, model)
    mine = config.model_copy(update={"model": config.model.model_copy(update={"source": str(model)})})
    killed(mine, out, "between rounds")
    file = model / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] += 1
    save_file(tensors, file, {"format": "pt"})
    _digest.cache_clear()
    with pytest.raises(CheckpointError, match=r"its weights .* are not those that this run was trained on"):
        federate(mine, out, resume=True)
    with pytest.raises(CheckpointError, match=r"its weights .* are not those that this run was trained on"):
        evaluate_run(out)


def test_two_processes_are_not_at_work_on_one_run(config: RunConfig, out: Path) -> None:
    killed(config, out, "between rounds")
    with run_folder(out, config, resume=True), pytest.raises(StoreError, match="another process is at work on this run"):
        federate(config, out, resume=True)


def test_a_process_that_is_really_killed(llama: str, words: str, tmp_path: Path) -> None:
    """kill -9 of `fedsb simulate` in the middle of its rounds, resumed by another process: this one."""
    config = config_of(table(llama, words, federation={"rounds": 6}, train={"steps": 4}))
    (tmp_path / "tiny.toml").write_text(config.to_toml())
    out = tmp_path / "run"
    command = [sys.executable, "-m", "fedsb.cli.main", "simulate", str(tmp_path / "tiny.toml"), "--out", str(out)]
    process = subprocess.Popen(command, cwd=ROOT)
    deadline = time.monotonic() + 60
    while not list(out.glob("checkpoints/round-0002")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert list(out.glob("checkpoints/round-0002")) and not (out / "summary.json").exists()
    federate(config, out, resume=True)
    federate(config, tmp_path / "whole")
    assert_same_run(tmp_path / "whole", out)
    lines = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    assert any(line["event"] == "resumed" and line["round"] >= 2 for line in lines)
