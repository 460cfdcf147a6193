"""`fedsb metrics` as a process: it serves until it is ended, and says in one sentence what it cannot do."""

import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from fedsb.deploy.certs import make_authority
from tests.cli.front_door import complaint

ROOT = Path(__file__).parents[2]
Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize("arguments", [[], ["--home", "somewhere", "--socket", "elsewhere"]])
def test_it_needs_one_of_two(capsys: Capture, arguments: list[str]) -> None:
    assert complaint(capsys, "metrics", *arguments).endswith("give --home or --socket, and not both")


def test_a_folder_that_is_none(tmp_path: Path, capsys: Capture) -> None:
    said = complaint(capsys, "metrics", "--home", str(tmp_path / "none"))
    assert said == f"--home {tmp_path / 'none'}: there is no such folder; name the folder of a federation"
    assert not (tmp_path / "none").exists()


def test_a_port_in_use_and_an_address_that_is_not_here(tmp_path: Path, capsys: Capture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = complaint(capsys, "metrics", "--home", str(tmp_path), "--port", str(port))
    assert said == f"cannot listen on 127.0.0.1, port {port} (Address already in use); choose another --host or --port"
    said = complaint(capsys, "metrics", "--socket", str(tmp_path / "s"), "--host", "192.0.2.1", "--port", "0")
    assert said.startswith("cannot listen on 192.0.2.1, port 0 (")


@pytest.mark.parametrize("which", ["home", "socket"])
def test_it_serves_until_it_is_ended(tmp_path: Path, which: str) -> None:
    make_authority(tmp_path / "tls")
    place = tmp_path if which == "home" else tmp_path / "trainer.sock"
    command = [sys.executable, "-m", "fedsb.cli.main", "metrics", f"--{which}", str(place), "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            address = re.search(r"http://\S+", process.stdout.readline())
            assert address
            for _ in range(2):
                with urllib.request.urlopen(address[0], timeout=60) as answer:
                    text = answer.read().decode()
            told = (
                'fedsb_certificate_expiry_timestamp_seconds{certificate="server"}' if which == "home" else "fedsb_trainer_up 0.0"
            )
            assert f"\n{told}" in text
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=60) == 0
            assert "Traceback" not in process.stderr.read()
        finally:
            process.kill()


def test_it_imports_no_torch() -> None:
    script = "import sys, fedsb.cli.metrics; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
