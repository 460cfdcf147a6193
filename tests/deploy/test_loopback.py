"""`fedsb up`: server and sites as processes on the loopback, with TLS and keys; a run there gives what a simulation gives."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedsb.cli.up import _any_port
from fedsb.config import RunConfig
from fedsb.deploy import processes
from fedsb.deploy.certs import make_node_key
from fedsb.deploy.flower import Flower
from fedsb.deploy.home import Home
from tests.federation.tiny import assert_same_result, config_of, federate, save_model, save_task, table

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SECONDS = 300


def fedsb(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """The command as a user types it."""
    command = [sys.executable, "-m", "fedsb.cli.main", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("model")
    return config_of(
        table(
            save_model(folder / "model"),
            save_task(folder / "words"),
            federation={"clients": 2, "names": ["alpha", "beta"], "rounds": 2, "min_clients": 2},
            runtime={"progress": "lines"},
        )
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("f") / "home"
    fedsb("up", "--names", "alpha,beta", "--home", str(folder))
    yield folder
    fedsb("down", "--home", str(folder))
    assert processes.running(Home(folder)) is None


@pytest.fixture(scope="module")
def toml(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.toml"
    path.write_text(config.to_toml())
    return path


def status(home: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(fedsb("status", "--home", str(home), "--json").stdout)
    return found


def test_a_run_gives_what_a_simulation_gives(home: Path, toml: Path, config: RunConfig, tmp_path: Path) -> None:
    done = fedsb("run", str(toml), "--home", str(home))
    out = home / "runs" / "tiny"
    there = json.loads((out / "summary.json").read_text())
    here = federate(config, tmp_path / "here")
    assert_same_result(tmp_path / "here", out)
    assert there["evaluation"] == here["evaluation"] and there["bytes"] == here["bytes"]
    assert "round 2/2" in done.stdout and "personal adapters:" in done.stdout
    found = status(home)
    assert {row["site"]: row["status"] for row in found["sites"]} == {"alpha": "online", "beta": "online"}
    (row,) = found["runs"]
    assert (row["run"], row["status"], row["round"], row["refused"]) == ("tiny", "finished:completed", "2/2", 0)
    assert set(found["processes"].values()) == {"RUNNING"} and len(found["processes"]) == 2 + 3 * 2
    again = fedsb("run", str(toml), "--home", str(home), check=False)
    assert again.returncode == 2 and "`fedsb resume tiny` goes on with it" in again.stderr


def test_nobody_waits_for_the_slowest_with_fedbuff(home: Path, toml: Path) -> None:
    """Two sites at work at once, and a round for every update that comes: through a real SuperLink, stale ones among them."""
    settings = ["name=buffered", "strategy.name=fedbuff", "strategy.concurrency=2", "strategy.buffer=1"]
    settings += ["federation.min_clients=1", "federation.rounds=4"]
    done = fedsb("run", str(toml), "--home", str(home), *(word for setting in settings for word in ("--set", setting)))
    out = home / "runs" / "buffered"
    assert "round 4/4" in done.stdout
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    replies = [event for event in events if event["event"] == "reply"]
    assert [event["clients"] for event in events if event["event"] == "round"] == [1, 1, 1, 1]
    assert {event["client"] for event in replies} == {"alpha", "beta"} and max(event["staleness"] for event in replies) > 0
    assert not [event for event in events if event["event"] == "refused"]
    assert {path.name for path in (out / "adapters").iterdir()} == {"alpha", "beta"}


def test_a_run_that_fails_says_why_where_it_was_started(home: Path, toml: Path) -> None:
    done = fedsb("run", str(toml), "--home", str(home), "--set", "name=wrong", "--set", "adapter.rank=40", check=False)
    assert done.returncode == 2
    assert "wrong: adapter.rank = 40 is larger than the smallest side" in done.stderr


def test_an_unknown_key_is_not_let_in(home: Path, tmp_path: Path) -> None:
    """A SuperNode with the right certificate and a key of its own: the server refuses it, and it is not among the sites."""
    make_node_key(tmp_path / "key", "stranger")
    place = Home(home)
    command = [str(Path(sys.executable).parent / "flower-supernode"), "--superlink", f"127.0.0.1:{place.topology().port}"]
    command += ["--root-certificates", str(place.tls.ca), "--auth-supernode-private-key", str(tmp_path / "key")]
    environment = os.environ | {"FLWR_HOME": str(tmp_path), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    command += ["--isolation", "process", "--port", str(_any_port()), "--max-retries", "1"]
    with (tmp_path / "said").open("w") as said:
        ended = subprocess.run(command, env=environment, stdout=said, stderr=subprocess.STDOUT, timeout=60, check=False)
    assert ended.returncode != 0 and "Failed to activate SuperNode" in (tmp_path / "said").read_text()
    assert len(Flower(place).nodes()) == 2


def test_without_tls_nobody_is_answered(home: Path) -> None:
    with socket.create_connection(("127.0.0.1", Home(home).topology().port), timeout=10) as plain:
        plain.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        plain.settimeout(5)
        try:
            answer = plain.recv(100)
        except OSError:
            answer = b""
    assert not answer.startswith(b"HTTP")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["up"], "a federation runs here already"),
        (["run", "nothing.toml"], "there is no such configuration file"),
        (["resume", "other"], "runs/other is no run"),
        (["stop", "other"], "other was not started here"),
        (["logs", "other"], "other was not started here"),
    ],
)
def test_wrong_input(home: Path, arguments: list[str], said: str) -> None:
    done = fedsb(*arguments, "--home", str(home), check=False)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1


def test_where_nothing_was_started(tmp_path: Path) -> None:
    for command in (["down"], ["status"], ["resume"], ["stop"], ["logs"]):
        done = fedsb(*command, "--home", str(tmp_path / "none"), check=False)
        assert done.returncode == 2 and "`fedsb up` starts one" in done.stderr and done.stderr.count("\n") == 1, done.stderr
        assert not (tmp_path / "none").exists()
    done = fedsb("up", "--home", str(tmp_path / ("x" * 100)), check=False)
    assert done.returncode == 2 and "choose a shorter --home" in done.stderr
    assert not (tmp_path / ("x" * 100)).exists()
