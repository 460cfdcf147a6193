"""`fedsb simulate`: a whole federation in this process."""

from pathlib import Path
from typing import Annotated, Any

import typer
from flwr.app import Context, RecordDict, UserConfig

from clients.app import app as client_app
from fedsb.cli.options import Json, Quiet, command, say, stopped, told
from fedsb.config import RunConfig
from fedsb.data.fingerprint import data_fingerprint
from fedsb.errors import ConfigError
from fedsb.report.table import show_summary
from fedsb.store.files import read_json, write_json
from server.app import app as server_app
from server.local_grid import LocalGrid, node_configs, settle


def simulate(
    config: Annotated[Path, typer.Argument(help="TOML file of the run, such as configs/quickstart.toml")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="override a setting; may be repeated")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="folder of the run; by default runs/NAME")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the last finished round")] = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run a whole federation on this machine: train, aggregate, personalise, score."""
    run = told(RunConfig.load(config, set_ or []), json_, quiet)
    check_clients(run, str(config))
    folder = out or Path("runs") / run.name
    try:
        summary = simulated(run, folder, resume)
    except KeyboardInterrupt:
        stopped(f"go on with `{command('simulate', config, out=folder, changes=set_)} --resume`")
    if json_:
        say("summary", {"folder": str(folder), **summary})
    else:
        show_summary(summary, str(folder / "adapters"))


def check_clients(run: RunConfig, where: str) -> None:
    """Raise ConfigError if a simulation has too few clients; of real sites with own data there may be more."""
    if run.federation.min_clients > run.federation.clients:
        raise ConfigError(f"{where}: federation.min_clients is larger than federation.clients; lower it")


def simulated(run: RunConfig, folder: Path, resume: bool) -> dict[str, Any]:
    """Run a whole federation in this process; returns its summary.json, which says what the data were, too."""
    settle()
    grid = LocalGrid(client_app, node_configs(run.client_names, str(folder / "sites")))
    values: UserConfig = {"config": run.to_json(), "out": str(folder), "resume": resume}
    context = Context(run_id=0, node_id=0, node_config={}, state=RecordDict(), run_config=values)
    server_app(grid, context)
    summary = read_json(folder / "summary.json") | {"data": {"sha256": data_fingerprint(run)}}
    write_json(folder / "summary.json", summary)
    return summary
