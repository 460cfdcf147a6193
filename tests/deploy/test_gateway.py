"""The gateway, run as it is in docker-compose.yml before a real server: what comes through from outside, and what does not.

Needs `caddy` on the PATH; `make test-gateway`.
"""

import http.client
import os
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedsb.cli.up import _any_port
from fedsb.deploy.certs import make_node_key
from fedsb.deploy.flower import Flower
from fedsb.deploy.health import healthy
from fedsb.deploy.home import Home
from fedsb.deploy.quiet import QUIET

pytestmark = [pytest.mark.gateway, pytest.mark.timeout(300)]
ROOT = Path(__file__).parents[2]
SECONDS = 60
FORBIDDEN = [
    ("POST", "/v1/control/list-runs"),
    ("POST", "/v1/control/start-run"),
    ("POST", "/v1/control/register-node"),
    ("POST", "/v1/runtime/get-nodes"),
    ("POST", "/v1/runtime/acquire-task"),
    ("GET", "/docs"),
    ("GET", "/redoc"),
    ("GET", "/openapi.json"),
    ("GET", "/health"),
    ("GET", "/"),
    ("GET", "/v1/fleet/pull-messages"),
    ("POST", "/v1/fleet/../control/list-runs"),
    ("POST", "/v1/fleet/%2e%2e/control/list-runs"),
    ("POST", "/v1/fleet/..%2fcontrol%2flist-runs"),
    ("POST", "//v1/control/list-runs"),
    ("POST", "/v1/fleet/x/../../control/list-runs"),
    ("POST", "/V1/CONTROL/list-runs"),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    folder = tmp_path_factory.mktemp("g") / "home"
    command = [sys.executable, "-m", "fedsb.cli.main"]
    subprocess.run([*command, "up", "--names", "alpha", "--home", str(folder)], check=True, timeout=SECONDS * 2)
    yield Home(folder)
    subprocess.run([*command, "down", "--home", str(folder)], check=True, timeout=SECONDS * 2)


@pytest.fixture(scope="module")
def gateway(home: Home, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The gateway's port."""
    port, health = _any_port(), _any_port()
    folder = tmp_path_factory.mktemp("caddy")
    environment = os.environ | {"GATEWAY_PORT": str(port), "HEALTH_PORT": str(health), "TLS": str(home.tls.folder.resolve())}
    environment |= {"KEYS": str(home.tls.server_key.parent.resolve())}
    environment |= {
        "SUPERLINK": f"127.0.0.1:{home.topology().port}",
        "XDG_CONFIG_HOME": str(folder),
        "XDG_DATA_HOME": str(folder),
    }
    command = ["caddy", "run", "--config", str(ROOT / "deploy" / "Caddyfile"), "--adapter", "caddyfile"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + SECONDS
        while not healthy(f"http://127.0.0.1:{health}"):
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.1)
        yield port
        process.terminate()
        process.wait(SECONDS)


def status_of(home: Home, port: int, method: str, path: str) -> int:
    """The status of an answer; the path goes out exactly as written."""
    context = ssl.create_default_context(cafile=str(home.tls.ca))
    connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=SECONDS, context=context)
    try:
        connection.request(method, path, b"" if method == "POST" else None, {"content-type": "application/protobuf"})
        return connection.getresponse().status
    finally:
        connection.close()


@pytest.mark.parametrize(("method", "path"), FORBIDDEN)
def test_nothing_but_the_fleet_api_is_reached(home: Home, gateway: int, method: str, path: str) -> None:
    assert status_of(home, gateway, method, path) in (400, 404)


def test_what_the_gateway_hides_is_there(home: Home) -> None:
    """Without it, the test above would prove nothing: inside, these are answered without any password."""
    port = home.topology().port
    for method, path in (("GET", "/docs"), ("GET", "/openapi.json"), ("GET", "/health"), ("POST", "/v1/control/list-runs")):
        assert status_of(home, port, method, path) == 200, path
    assert status_of(home, port, "POST", "/v1/runtime/get-nodes") != 404


def test_the_fleet_api_is_reached_and_asks_for_a_signature(home: Home, gateway: int) -> None:
    assert status_of(home, gateway, "POST", "/v1/fleet/pull-messages") == 401


def supernode(home: Home, gateway: int, key: Path, folder: Path, *more: str) -> subprocess.Popen[bytes]:
    command = [
        str(Path(sys.executable).parent / "flower-supernode"),
        "--superlink",
        f"127.0.0.1:{gateway}",
        "--isolation",
        "process",
    ]
    command += [
        "--root-certificates",
        str(home.tls.ca),
        "--auth-supernode-private-key",
        str(key),
        "--port",
        str(_any_port()),
        *more,
    ]
    with (folder / "said").open("w") as said:
        environment = os.environ | QUIET | {"FLWR_HOME": str(folder)}
        return subprocess.Popen(command, env=environment, stdout=said, stderr=subprocess.STDOUT)


def test_a_site_comes_through_once_it_is_admitted_and_no_more_when_it_is_revoked(
    home: Home, gateway: int, tmp_path: Path
) -> None:
    """An unregistered node is refused; admitted by `fedsb site admit` it is online; revoked it is refused again."""
    make_node_key(tmp_path / "key", "beta")
    (tmp_path / "beta.pub").write_bytes((tmp_path / "key.pub").read_bytes())
    site = [sys.executable, "-m", "fedsb.cli.main", "site"]
    where = ["--home", str(home.folder)]

    def refused() -> None:
        process = supernode(home, gateway, tmp_path / "key", tmp_path, "--max-retries", "1")
        assert process.wait(SECONDS) != 0 and "Failed to activate SuperNode" in (tmp_path / "said").read_text()

    refused()
    subprocess.run([*site, "admit", str(tmp_path / "beta.pub"), *where], check=True, timeout=SECONDS)
    number = home.admitted()["beta"].node
    process = supernode(home, gateway, tmp_path / "key", tmp_path)
    try:
        deadline = time.monotonic() + SECONDS
        while Flower(home).nodes()[number]["status"] != "online":
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "said").read_text()
            time.sleep(0.2)
    finally:
        process.terminate()
        process.wait(SECONDS)
    listed = subprocess.run([*site, "list", *where], check=True, timeout=SECONDS, capture_output=True, text=True).stdout
    assert "alpha" in listed and "beta" in listed
    subprocess.run([*site, "revoke", "beta", *where], check=True, timeout=SECONDS)
    assert "beta" not in home.admitted()
    refused()
