"""Flower's SuperNode as a process that ends when it no longer serves: `python -m clients.node`, flags as `flower-supernode`.

When the network or a gateway breaks off a TLS handshake, Flower's SuperNode gives its connection up, but the thread of its own
API keeps the process alive: it looks well to supervisord or a container engine, and the site never comes back. Here it ends,
so that it is started anew.
"""

import os
import sys

from flwr.supernode.cli.flower_supernode import flower_supernode

from fedsb.deploy.supernode import GIVEN_UP


def main() -> None:
    """Serve until the connection is given up."""
    flower_supernode()
    print(
        "fedsb: this SuperNode has given up its connection to the server and ends, to be started anew",
        file=sys.stderr,
        flush=True,
    )
    os._exit(GIVEN_UP)  # since Flower's thread would keep the process


if __name__ == "__main__":
    main()
