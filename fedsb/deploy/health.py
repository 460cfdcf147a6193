"""Whether a service answers: the health check of containers, `python -m fedsb.deploy.health URL|SOCKET [CA]`; exit 0 or 1."""

import contextlib
import http.client
import socket
import ssl
import sys
from pathlib import Path
from urllib.parse import urlsplit

SECONDS = 5.0


def healthy(where: str, ca: Path | None = None) -> bool:
    """Whether GET /health is answered with 200 at a URL, or on a Unix socket (a path)."""
    try:
        with contextlib.closing(_connection(where, ca)) as connection:
            connection.request("GET", "/health")
            return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False


def _connection(where: str, ca: Path | None) -> http.client.HTTPConnection:
    parts = urlsplit(where)
    if parts.scheme == "https":
        context = ssl.create_default_context(cafile=str(ca) if ca else None)
        return http.client.HTTPSConnection(parts.netloc, timeout=SECONDS, context=context)
    if parts.scheme == "http":
        return http.client.HTTPConnection(parts.netloc, timeout=SECONDS)
    connection = http.client.HTTPConnection("localhost", timeout=SECONDS)
    connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.sock.settimeout(SECONDS)
    try:
        connection.sock.connect(where)
    except OSError:
        connection.close()
        raise
    return connection


if __name__ == "__main__":
    sys.exit(not healthy(sys.argv[1], Path(sys.argv[2]) if len(sys.argv) > 2 else None))
