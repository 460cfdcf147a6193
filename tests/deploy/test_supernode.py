"""A SuperNode that is refused: started again, and told why in one sentence."""

import contextlib
import http.server
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedsb.deploy import certs, supernode
from fedsb.deploy.supernode import GIVEN_UP, diagnosis


@contextlib.contextmanager
def server(files: certs.Authority, status: int = 412, clock: float = 0.0) -> Iterator[str]:
    """A server that answers every POST with one status, and whose clock is `clock` seconds ahead."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/fleet/activate-node"
            self.send_response(status)
            self.send_header("content-length", "0")
            self.end_headers()

        def date_time_string(self, timestamp: float | None = None) -> str:
            return super().date_time_string(time.time() + clock)

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Quiet(http.server.ThreadingHTTPServer):
        def handle_error(self, request: object, client_address: object) -> None:
            pass  # a client that does not trust the certificate

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.server, files.server_key)
    with Quiet(("127.0.0.1", 0), Handler) as web:
        web.socket = context.wrap_socket(web.socket, server_side=True)
        thread = threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"127.0.0.1:{web.server_port}"
        web.shutdown()
        thread.join()


@pytest.fixture
def files(tmp_path: Path) -> certs.Authority:
    return certs.make_authority(tmp_path / "tls")


@pytest.mark.parametrize(
    ("status", "clock", "said"),
    [
        (412, 0.0, "does not let this site in; send alpha.pub to its operator, who runs `fedsb site admit alpha.pub`"),
        (401, -10.0, "s ahead of the server's; set it by NTP"),
        (401, 600.0, "s behind the server's; set it by NTP"),
        (412, 200.0, "does not let this site in"),
        (404, 0.0, "is no gateway of a federation"),
        (502, 0.0, "answers 502: the server behind it is starting"),
    ],
)
def test_what_a_server_says_is_told_apart(files: certs.Authority, status: int, clock: float, said: str) -> None:
    with server(files, status, clock) as address:
        assert said in diagnosis(address, files.ca, "alpha")


def test_a_certificate_that_is_not_trusted_or_has_expired(
    files: certs.Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stranger = certs.make_authority(tmp_path / "other" / "tls")
    with server(files) as address:
        assert f"is not one that {stranger.ca} vouches for" in diagnosis(address, stranger.ca, "alpha")
    monkeypatch.setattr(certs, "SERVER_DAYS", -1)
    monkeypatch.setattr(certs, "EARLY", certs.EARLY * 3)
    certs.renew_server(files)
    with server(files) as address:
        said = diagnosis(address, files.ca, "alpha")
    assert "certificate has expired" in said and "`fedsb certs --renew`" in said
    assert "is no certificate that can be read" in diagnosis("127.0.0.1:1", tmp_path / "none.pem", "alpha")


def test_a_connection_that_was_lost_is_no_matter_of_keys(files: certs.Authority) -> None:
    with server(files) as address:
        assert diagnosis(address, files.ca, "alpha", GIVEN_UP) == f"the connection to {address} was lost; it answers now"


def test_a_server_that_is_not_there(files: certs.Authority) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        assert "is not reached" in diagnosis(f"127.0.0.1:{taken.getsockname()[1]}", files.ca, "alpha")


def test_it_is_started_again_until_it_is_told_to_end(tmp_path: Path) -> None:
    """The program fails twice and then stays; SIGTERM ends it and what runs it."""
    program = tmp_path / "program.py"
    program.write_text(
        "import pathlib, sys, time\n"
        f"path = pathlib.Path({str(tmp_path / 'starts')!r})\n"
        "path.write_text(path.read_text() + 'x' if path.exists() else 'x')\n"
        "time.sleep(60) if len(path.read_text()) == 3 else sys.exit(7)\n"
    )
    code = (
        "import sys; from fedsb.deploy.supernode import keep_running; "
        f"sys.exit(keep_running([sys.executable, {str(program)!r}], lambda code: f'why {{code}}', print, 0.1))"
    )
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    root = Path(supernode.__file__).parents[2]
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment, cwd=root)
    deadline = time.monotonic() + 60
    while not ((tmp_path / "starts").exists() and (tmp_path / "starts").read_text() == "xxx"):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    assert out == "why 7; trying again in 0 s\n" * 2 and process.returncode != 0
