"""`fedsb site`: join a federation from another machine, and say who may."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from clients.policy import template
from fedsb.cli.run import running, table_of
from fedsb.cli.up import HOME, HomeOption
from fedsb.deploy import sites
from fedsb.deploy.site_folder import make_site
from fedsb.errors import DeployError

site = typer.Typer(help="Join a federation from another machine, and say who may.", no_args_is_help=True)


@site.command()
def init(
    name: Annotated[str, typer.Argument(help="the site's name in the federation")],
    out: Annotated[Path | None, typer.Option(help="the folder to write; by default one of the site's name")] = None,
    server: Annotated[str, typer.Option(help="the server's address as the site reaches it, host:port")] = "",
    ca: Annotated[Path | None, typer.Option(help="ca.pem, as the federation's operator gave it")] = None,
    publish: Annotated[Path | None, typer.Option(help="a folder to copy the public key to, for the operator")] = None,
) -> None:
    """Write a site's folder: key pair, policy, compose file and instructions. Run again, it keeps key and policy."""
    folder = out or Path(name)
    public = make_site(name, folder, template(), server, ca)
    if publish is not None:
        sites.publish(public, publish)
    print(f"{folder} is the site {name}; {folder / 'README.md'} says how to go on")
    print(f"for the operator: fedsb site admit {public}")


@site.command()
def admit(
    keys: Annotated[list[Path], typer.Argument(metavar="NAME.pub…", help="public keys, each named after its site")],
    home: HomeOption = HOME,
) -> None:
    """Let sites take part, each under the name of its key's file."""
    place = running(home)
    for key in keys:
        if key.suffix != ".pub":
            raise DeployError(f"{key}: is no public key's file; a site sends NAME.pub, and keeps its key")
        admitted = sites.admit(place, key, key.stem)
        print(f"{key.stem}: admitted (node {admitted.node})")


@site.command(name="list")
def list_(home: HomeOption = HOME) -> None:
    """Show who may take part, and when each was last seen."""
    rows = sites.overview(running(home))
    Console(width=None if Console().is_terminal else 120).print(table_of("sites", rows))


@site.command()
def revoke(
    name: Annotated[str, typer.Argument(help="the site's name")],
    home: HomeOption = HOME,
) -> None:
    """Let a site take part no longer: its next message is refused. What it has contributed stays in the rounds that are over."""
    sites.revoke(running(home), name)
    print(f"{name}: revoked; a running round goes on without it")
