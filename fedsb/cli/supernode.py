"""`fedsb supernode`: a site's connection to the federation's server."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from fedsb.deploy.certs import check_node_key, check_valid
from fedsb.deploy.flower import tool
from fedsb.deploy.site_folder import check_address
from fedsb.deploy.supernode import diagnosis, keep_running


def supernode(
    server: Annotated[str, typer.Option(help="address of the federation's server, host:port")],
    name: Annotated[str, typer.Option(help="the site's name in the federation")],
    identity: Annotated[Path, typer.Option(help="folder with the site's key and the federation's ca.pem")],
    host: Annotated[str, typer.Option(help="address on which the site's executor reaches this process")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="port of that address")] = 9094,
) -> None:
    """Connect a site to its federation, and go on trying, saying why it cannot."""
    check_address(server)
    check_valid(identity / "ca.pem")
    check_node_key(identity / "key")
    command = [tool("python"), "-m", "clients.node", "--superlink", server, "--root-certificates", str(identity / "ca.pem")]
    command += ["--auth-supernode-private-key", str(identity / "key"), "--isolation", "process"]
    command += ["--host", host, "--port", str(port)]

    def say(sentence: str) -> None:
        print(f"fedsb: {sentence}", file=sys.stderr, flush=True)

    raise typer.Exit(keep_running(command, lambda code: diagnosis(server, identity / "ca.pem", name, code), say))
