"""How a ClientApp reaches its site's trainer: HTTP over a Unix socket, with safetensors as bodies. Imports no torch."""

import http.client
import json
import socket
import time
from pathlib import Path

from flwr.app import RecordDict

from fedsb.errors import TrainerError
from strategies.envelope import from_bytes, to_bytes

SOCKET = "FEDSB_TRAINER"  # the environment variable that names the socket
WAIT_SECONDS = 120.0  # for a trainer that is starting, or starting anew after a crash
POLL_SECONDS = 0.2
BURIAL_SECONDS = 2.0  # after which the socket of a killed process takes no more connections
REFUSED = 422  # the trainer says in one sentence why it does not answer


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket; `seconds` is the longest wait for each of its steps, by default without end."""

    def __init__(self, path: Path, seconds: float | None = None) -> None:
        super().__init__("localhost", timeout=seconds)
        self.path = path

    def connect(self) -> None:
        """Connect to the socket instead of a host."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self.path))


def ask(path: Path, kind: str, content: RecordDict, seconds: float, wait_seconds: float = WAIT_SECONDS) -> RecordDict:
    """Put a question to the trainer behind a socket and return its answer.

    A trainer that is away is waited for; one that dies while it answers is asked once more when it is back, since an
    answer depends on the question alone, or was paid for and is on the disk. Raises TrainerError if it stays away, dies
    again, refuses, or has not answered after `seconds`; it then drops the question, unless it is at work on it already.
    """
    body = to_bytes(content)
    for attempt in (1, 2):
        connection = _connected(path, wait_seconds, seconds)
        try:
            connection.request("POST", f"/answer/{kind}", body, {"content-type": "application/octet-stream"})
            response = connection.getresponse()
            data = response.read()
        except TimeoutError:
            raise TrainerError(f"the trainer at {path} did not answer {kind} in {seconds:.4g} s; see its log") from None
        except (OSError, http.client.HTTPException) as error:
            if attempt == 1:
                time.sleep(BURIAL_SECONDS)
                continue
            raise TrainerError(f"the trainer at {path} died twice over {kind} ({error}); see its log") from error
        finally:
            connection.close()
        if response.status == REFUSED:
            raise TrainerError(str(json.loads(data)["error"]))
        if response.status != http.client.OK:
            raise TrainerError(f"the trainer at {path} answered {response.status} to {kind}; see its log")
        return from_bytes(data)
    raise AssertionError("unreachable")


def _connected(path: Path, wait_seconds: float, seconds: float) -> UnixConnection:
    deadline = time.monotonic() + wait_seconds
    while True:
        connection = UnixConnection(path, seconds)
        try:
            connection.connect()
        except OSError as error:
            connection.close()
            if time.monotonic() > deadline:
                raise TrainerError(
                    f"no trainer answers at {path} ({error.strerror or error}) after {wait_seconds:.0f} s; "
                    "start it with `fedsb trainer`"
                ) from None
            time.sleep(POLL_SECONDS)
        else:
            return connection
