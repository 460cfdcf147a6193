"""Two replicas over one store behind the proxy of docs/operations.md: what is published and revoked both see; one may die.

Needs `caddy` on the PATH; `make test-gateway`.
"""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from fedsb.cli.up import _any_port
from fedsb.serving.http.keys import add_key, revoke_key
from fedsb.store import adapters
from tests.federation.tiny import config_of, federate, save_model, save_task, table

pytestmark = [pytest.mark.gateway, pytest.mark.timeout(300)]
ROOT = Path(__file__).parents[2]
SECONDS = 60


class Replica:
    """`fedsb serve` as a process."""

    def __init__(self, run: Path, keys: Path) -> None:
        command = [
            sys.executable,
            "-m",
            "fedsb.cli.main",
            "serve",
            str(run),
            "--port",
            "0",
            "--threads",
            "1",
            "--keys",
            str(keys),
        ]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"127\.0\.0\.1:\d+", line)
        assert found, line
        self.address = found[0]

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    source, task = save_model(tmp_path / "model"), save_task(tmp_path / "task")
    federate(config_of(table(source, task, federation={"clients": 2, "rounds": 1})), tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    return tmp_path / "keys.toml"


@pytest.fixture
def clinic(keys: Path) -> str:
    return add_key(keys, {"name": "clinic", "tenants": ["*"]})


@pytest.fixture
def replicas(run: Path, keys: Path, clinic: str) -> Iterator[list[Replica]]:
    found = [Replica(run, keys) for _ in range(2)]
    yield found
    for each in found:
        each.kill()


@pytest.fixture
def proxy(replicas: list[Replica], tmp_path: Path) -> Iterator[str]:
    """The URL of the proxy, with the page's own lines."""
    page = (ROOT / "docs" / "operations.md").read_text()
    lines = page.split("# Caddyfile\n")[1].split("```")[0]
    port = _any_port()
    told = lines.replace("models.example.org", f":{port}").replace("health_interval 5s", "health_interval 200ms")
    told = told.replace("replica-1:8000 replica-2:8000", " ".join(each.address for each in replicas))
    assert told.count("127.0.0.1:") == 2
    (tmp_path / "Caddyfile").write_text("{\n    admin off\n    auto_https off\n}\n" + told)
    environment = os.environ | {"XDG_CONFIG_HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path)}
    command = ["caddy", "run", "--config", str(tmp_path / "Caddyfile"), "--adapter", "caddyfile"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + SECONDS
        while not _ready(url):
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.1)
        yield url
        process.terminate()
        process.wait(SECONDS)


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready").status_code == 200
    except httpx.HTTPError:
        return False


def answer(url: str, key: str, name: str = "client-0") -> str:
    body = {"model": name, "prompt": "red green blue left", "max_tokens": 6, "temperature": 0}
    found = httpx.post(f"{url}/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"}, timeout=60)
    found.raise_for_status()
    return str(found.json()["choices"][0]["text"])


def publish(run: Path, factor: float) -> None:
    """A new version of client-0: the last one, times a factor."""
    stored = adapters.load(run / "adapters", "client-0")
    adapters.publish(
        run / "adapters",
        "client-0",
        {name: factor * tensor for name, tensor in stored.state.items()},
        base_model=stored.manifest.base_model,
        method=stored.manifest.method,
        rank=stored.manifest.rank,
        basis_fingerprint=stored.manifest.basis_fingerprint,
        round=1,
        task="t",
    )


def test_two_replicas_are_one_server(run: Path, keys: Path, clinic: str, replicas: list[Replica], proxy: str) -> None:
    publish(run, 50)
    direct = [f"http://{each.address}" for each in replicas]
    before = {answer(url, clinic) for url in (proxy, *direct)}
    assert len(before) == 1

    base = {answer(url, clinic, "model") for url in direct}
    publish(run, 0)  # with a core of zeros a tenant is the base model
    assert {answer(url, clinic) for url in (proxy, *direct)} == base != before

    replicas[0].kill()
    deadline = time.monotonic() + SECONDS
    while len({_ready(proxy) for _ in range(10)}) > 1:  # until the proxy has noticed
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert {answer(proxy, clinic) for _ in range(10)} == base

    other = add_key(keys, {"name": "other", "tenants": ["client-1"]})
    revoke_key(keys, "clinic")
    answer(proxy, other, "client-1")  # or it would raise
    with pytest.raises(httpx.HTTPStatusError, match="401"):
        answer(proxy, clinic)
