"""A run of a comparison in a process of its own."""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedsb.cli import compare_run
from fedsb.cli.compare_run import run_apart
from fedsb.config import RunConfig
from fedsb.errors import FederationError, FedsbError
from fedsb.store.files import read_json
from fedsb.store.tensors import load_tensors
from tests.federation.tiny import config_of, table

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def test_a_run_in_its_own_process_has_its_own_memory_and_says_what_is_wrong(llama: str, words: str, tmp_path: Path) -> None:
    ballast = bytearray(os.urandom(1 << 20)) * 1500  # 1.5 GB of this process, which a child must not be charged with
    config = config_of(table(llama, words, federation={"rounds": 1}))
    summary = run_apart(config, tmp_path / "run")
    assert 1e8 < summary["peak_memory"] < len(ballast)
    assert summary == read_json(tmp_path / "run" / "summary.json")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert run_apart(config, tmp_path / "run") == summary
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before
    with pytest.raises(FedsbError, match=r"^adapter.rank = 99 is larger") as caught:
        run_apart(config_of(table(llama, words, adapter={"rank": 99})), tmp_path / "wrong")
    assert not isinstance(caught.value, FederationError) and not (tmp_path / "wrong").exists()


def test_ctrl_c_reaches_the_run_too(comparison: Path, out: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "fedsb.cli.main",
        "compare",
        str(comparison),
        "--out",
        str(out),
        "--methods",
        "lora",
        "--seeds",
        "0",
    ]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell runs the suite in the background
    try:
        process = subprocess.Popen([*command, "--set", "federation.rounds=500"], stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    with process:
        try:
            _stop_after_a_round(process, comparison, out)
        finally:
            process.kill()


def _stop_after_a_round(process: subprocess.Popen[str], comparison: Path, out: Path) -> None:
    deadline = time.monotonic() + 120
    while not list(out.glob("runs/*/checkpoints/round-0001")) and time.monotonic() < deadline:
        time.sleep(0.1)
    (run,) = out.glob("runs/*")
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and said.startswith(
        f"fedsb: stopped; go on with `fedsb compare {comparison} --methods lora"
    ), said
    done = len(list(run.glob("checkpoints/round-*")))
    time.sleep(1)
    assert len(list(run.glob("checkpoints/round-*"))) == done < 500, "the run has ended too"
    assert load_tensors(run / "checkpoints" / "round-0001" / "state.safetensors")[0]


@pytest.mark.parametrize(
    ("error", "code"), [(FederationError("no replies"), 3), (FedsbError("no model"), 2), (KeyboardInterrupt(), 130)]
)
def test_the_process_of_a_run_tells_by_its_exit_code_whether_it_could_be_run(
    llama: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, error: BaseException, code: int
) -> None:
    def fails(config: RunConfig, folder: Path) -> None:
        raise error

    monkeypatch.setattr(compare_run, "run_here", fails)
    monkeypatch.setattr(sys, "argv", ["compare_run", str(tmp_path / "run")])
    monkeypatch.setattr(sys, "stdin", io.StringIO(config_of(table(llama, words)).to_json()))
    with pytest.raises(SystemExit) as left:
        compare_run.main()
    assert left.value.code == code and capsys.readouterr().err == (f"{error}\n" if code != 130 else "")
