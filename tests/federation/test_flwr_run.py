"""`flwr run` on this project as on any Flower app: Flower's own SuperLink, a FAB, and its simulation on Ray."""

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.federation.tiny import assert_same_result, config_of, federate, table

ROOT = Path(__file__).parents[2]
SECONDS = 120
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs pip install '.[ray]'"),
]


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _processes(home: Path) -> list[int]:
    """Those that were started with this FLWR_HOME, so by this test and nobody else."""
    found, mark = [], f"FLWR_HOME={home}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:
            continue
    return sorted(found)


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    home = tmp_path / "flwr"
    home.mkdir()
    (home / "config.toml").write_text('[superlink]\ndefault = "local"\n\n[superlink.local]\naddress = ":local-in-memory:"\n')
    own = {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": _free_port(),
        "FLWR_LOCAL_CONTROL_API_PORT": _free_port(),
        "FEDSB_HOME": str(tmp_path / "sites"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    try:
        yield os.environ | own
    finally:
        for kind in (signal.SIGTERM, signal.SIGKILL):
            for process in _processes(home):
                os.kill(process, kind)
            deadline = time.monotonic() + 5
            while _processes(home) and time.monotonic() < deadline:
                time.sleep(0.1)
        assert not _processes(home)


def _app(folder: Path) -> Path:
    """A copy of the project, as a user has cloned it."""
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "runs", "exports", "tests", "*.egg-info", "__pycache__"))
    return folder


def _flwr(environment: dict[str, str], *arguments: str) -> dict[str, Any]:
    command = ["flwr", *arguments, "--format", "json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    answer: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    return answer


def test_flwr_run_gives_what_simulate_gives(llama: str, words: str, tmp_path: Path, environment: dict[str, str]) -> None:
    config = config_of(table(llama, words, federation={"clients": 2, "rounds": 2}))
    (tmp_path / "tiny.toml").write_text(config.to_toml())
    out = tmp_path / "run"
    answer = _flwr(
        environment,
        *("run", str(_app(tmp_path / "app")), "local"),
        *("--federation-config", "num-supernodes=2 client-resources-num-cpus=1"),
        *("--run-config", f'config="{tmp_path / "tiny.toml"}" out="{out}"'),
    )
    assert answer["success"], answer
    deadline = time.monotonic() + SECONDS
    while not (out / "summary.json").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert (out / "summary.json").exists(), subprocess.run(
        ["flwr", "log", str(answer["run-id"]), "local", "--show"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    here = federate(config, tmp_path / "here")
    assert_same_result(tmp_path / "here", out)
    there = json.loads((out / "summary.json").read_text())
    assert there["evaluation"] == here["evaluation"] and there["bytes"] == here["bytes"]
