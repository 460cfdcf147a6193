"""`fedsb key`: who may ask a server of adapters."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fedsb.serving.http.keys import add_key, entries_of, revoke_key

key = typer.Typer(name="key", help="Keys of `fedsb serve`: a server sees at once what is changed.", no_args_is_help=True)
FileOption = Annotated[Path, typer.Option("--file", help="file of keys, the server's --keys")]
Name = Annotated[str, typer.Argument(help="whose it is; for people")]


@key.command("add")
def add(
    name: Name,
    file: FileOption,
    tenant: Annotated[list[str] | None, typer.Option(help="whom it may ask, * for any characters; may be repeated")] = None,
    base: Annotated[bool, typer.Option(help="whether it may ask the base model")] = True,
    admin: Annotated[bool, typer.Option("--admin", help="it may load and unload adapters, and asks nobody")] = False,
    requests_per_minute: Annotated[int | None, typer.Option(min=1, help="no limit without it")] = None,
) -> None:
    """Make a key and print it, this once; the file is given its hash."""
    told: dict[str, object] = {"name": name, "tenants": tenant or [], "base": base, "admin": admin}
    if requests_per_minute:
        told["requests_per_minute"] = requests_per_minute
    print(add_key(file, told))


@key.command("list")
def list_(file: FileOption) -> None:
    """Show whose keys a file has, and what each may."""
    table = Table("key", "may ask", "base model", "administers", "a minute", box=None)
    for entry in entries_of(file):
        limit = str(entry.requests_per_minute or "")
        base = "yes" if entry.base and not entry.admin else "no"
        table.add_row(entry.name, " ".join(entry.tenants), base, "yes" if entry.admin else "no", limit)
    Console().print(table)


@key.command("revoke")
def revoke(name: Name, file: FileOption) -> None:
    """Take a key out of a file; its next request is refused."""
    revoke_key(file, name)
    print(f"{name} may ask no more")
