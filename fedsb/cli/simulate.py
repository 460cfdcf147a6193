"""`fedsb simulate`: a whole federation in this process."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from flwr.app import Context, RecordDict, UserConfig

from clients.app import app as client_app
from fedsb.config import RunConfig
from fedsb.errors import ConfigError
from fedsb.report.table import show_summary
from server.app import app as server_app
from server.local_grid import LocalGrid, node_configs, settle


def simulate(
    config: Annotated[Path, typer.Argument(help="TOML file of the run, such as configs/quickstart.toml")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="override a setting; may be repeated")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="folder of the run; by default runs/NAME")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the last finished round")] = False,
) -> None:
    """Run a whole federation on this machine: train, aggregate, personalise, score."""
    settle()
    run = RunConfig.load(config, set_ or [])
    if run.federation.min_clients > run.federation.clients:  # of real sites with own data there may be more
        raise ConfigError(f"{config}: federation.min_clients is larger than federation.clients; lower it")
    folder = out or Path("runs") / run.name
    grid = LocalGrid(client_app, node_configs(run.client_names, str(folder / "sites")))
    values: UserConfig = {"config": run.to_json(), "out": str(folder), "resume": resume}
    context = Context(run_id=0, node_id=0, node_config={}, state=RecordDict(), run_config=values)
    try:
        server_app(grid, context)
    except KeyboardInterrupt:
        print(f"fedsb: stopped; go on with `fedsb simulate {config} --out {folder} --resume`", file=sys.stderr)
        raise typer.Exit(130) from None
    show_summary(json.loads((folder / "summary.json").read_text()), str(folder / "adapters"))
