"""Flower's SuperNode as a process that ends when it no longer serves: `python -m clients.node`, flags as `flower-supernode`.

When the network or a gateway breaks off a TLS handshake, Flower's SuperNode gives its connection up, but the thread of its own
API keeps the process alive: it looks well to supervisord or a container engine, and the site never comes back. Here it ends,
so that it is started anew.

And Flower asks the server for work every 3 s, without a setting for it; here FEDSB_POLL_SECONDS is one. Sites on one machine
need not wait so long, many sites on one server may well.
"""

import os
import sys
import time
from types import SimpleNamespace

from flwr.supernode import start_client_internal
from flwr.supernode.cli.flower_supernode import flower_supernode

from fedsb.deploy.supernode import GIVEN_UP

POLL = "FEDSB_POLL_SECONDS"
FLOWER_SECONDS = 3  # what Flower 1.41 sleeps between two questions for work, and nothing else


def poll_every(seconds: float) -> None:
    """Let this process's SuperNode ask for work every so many seconds."""

    def sleep(asked: float) -> None:
        time.sleep(seconds if asked == FLOWER_SECONDS else asked)

    vars(start_client_internal)["time"] = SimpleNamespace(sleep=sleep)


def main() -> None:
    """Serve until the connection is given up."""
    poll_every(float(os.environ.get(POLL, FLOWER_SECONDS)))
    flower_supernode()
    print(
        "fedsb: this SuperNode has given up its connection to the server and ends, to be started anew",
        file=sys.stderr,
        flush=True,
    )
    os._exit(GIVEN_UP)  # since Flower's thread would keep the process


if __name__ == "__main__":
    main()
