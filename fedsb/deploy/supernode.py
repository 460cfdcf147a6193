"""A site's SuperNode, started again whenever it ends, with one sentence about why it cannot reach the federation.

Flower's SuperNode gives up when the server refuses it, with the same exit code for a key that is not admitted, a wrong clock and
a certificate that is not trusted. Here the server is asked once more, in a way that tells these apart.
"""

import datetime
import email.utils
import http.client
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

AGAIN_SECONDS = 10.0
GIVEN_UP = 75  # exit code of a SuperNode that has lost its connection (clients/node.py)
PROBE_SECONDS = 10.0
AHEAD_SECONDS, BEHIND_SECONDS = 4, 300  # Flower refuses what was signed 5 s ahead or 305 s ago; an HTTP date is whole seconds
PATH = "/v1/fleet/activate-node"


def keep_running(
    command: Sequence[str], diagnose: Callable[[int], str], say: Callable[[str], None], wait: float = AGAIN_SECONDS
) -> int:
    """Run a program, and again `wait` seconds after it ends by itself; ends with it on SIGTERM, and returns its exit code.

    `diagnose`: exit code → why it ended, for people.
    """
    asked_to_end = False
    process: subprocess.Popen[bytes] | None = None

    def end(number: int, _: FrameType | None) -> None:
        nonlocal asked_to_end
        asked_to_end = True
        if process is not None:
            process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    while True:
        process = subprocess.Popen(command)
        if asked_to_end:
            process.terminate()
        code = process.wait()
        if not asked_to_end:
            say(f"{diagnose(code)}; trying again in {wait:.0f} s")
        deadline = time.monotonic() + wait
        while not asked_to_end and time.monotonic() < deadline:
            time.sleep(0.1)
        if asked_to_end:
            return code


def diagnosis(server: str, ca: Path, name: str, code: int = 1) -> str:
    """Why a SuperNode that ended may have been refused: one sentence with what to do.

    Args:
        server: host:port.
        ca: certificate of the federation's authority.
        name: how the site's public key is called, to be named to the operator.
        code: the SuperNode's exit code.
    """
    host, _, port = server.rpartition(":")
    try:
        context = ssl.create_default_context(cafile=str(ca))
    except (OSError, ssl.SSLError) as error:
        return f"{ca}: is no certificate that can be read ({error}); put the operator's ca.pem there"
    connection = http.client.HTTPSConnection(host, int(port), timeout=PROBE_SECONDS, context=context)
    try:
        connection.request("POST", PATH, b"", {"content-type": "application/protobuf"})
        answer = connection.getresponse()
    except ssl.SSLCertVerificationError as error:
        return (
            f"the certificate of {server} is not one that {ca} vouches for ({error.verify_message}); "
            "its operator renews it with `fedsb certs --renew`, or adds a name with --host"
        )
    except (OSError, http.client.HTTPException, socket.gaierror) as error:
        return f"{server} is not reached ({error}); check the address, and the firewall on the way"
    finally:
        connection.close()
    if answer.status == http.client.NOT_FOUND:
        return f"{server} is no gateway of a federation; check the address"
    if answer.status >= http.client.INTERNAL_SERVER_ERROR:
        return f"{server} answers {answer.status}: the server behind it is starting, or its operator must look"
    ahead = _clock_ahead(answer.headers.get("date"))
    if ahead is not None and not -BEHIND_SECONDS < ahead < AHEAD_SECONDS:
        side = "ahead of" if ahead > 0 else "behind"
        return f"this machine's clock is {abs(ahead):.0f} s {side} the server's; set it by NTP"
    if code == GIVEN_UP:
        return f"the connection to {server} was lost; it answers now"
    return f"the server does not let this site in; send {name}.pub to its operator, who runs `fedsb site admit {name}.pub`"


def _clock_ahead(date: str | None) -> float | None:
    try:
        told = email.utils.parsedate_to_datetime(date or "")
    except ValueError:
        return None
    return (datetime.datetime.now(datetime.UTC) - told).total_seconds()
