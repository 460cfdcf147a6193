"""`fedsb trainer`: the resident trainer of a site."""

from pathlib import Path
from typing import Annotated

import typer

from clients.policy import load_policy
from clients.session import Site
from clients.worker import serve


def trainer(
    socket: Annotated[Path, typer.Option(help="Unix socket to listen on; FEDSB_TRAINER names it to the ClientApp")],
    name: Annotated[str, typer.Option(help="the site's name in the federation")],
    home: Annotated[Path, typer.Option(help="folder of what the site keeps: bases and its own cores")],
    index: Annotated[
        int, typer.Option(help="the site's place, from 0, where a run deals out common data; not needed for own data")
    ] = 0,
    sites: Annotated[int, typer.Option(help="how many sites a run deals common data to; not needed for own data")] = 1,
    policy: Annotated[Path | None, typer.Option(help="TOML file of what the site allows")] = None,
) -> None:
    """Keep model, basis and data of a site loaded, and answer what its ClientApp passes on."""
    Site(name, index, home)  # or the name is refused
    node = {"name": name, "partition-id": index, "num-partitions": sites, "folder": str(home)}
    if policy is not None:
        load_policy(policy)
        node["policy"] = str(policy.resolve())
    serve(socket, node)
