"""The Flower ServerApp: Fed-SB from beginning to end (arXiv 2502.15436, algorithm 1).

1. choose the basis (B, A) once            everybody has the same: proved by its fingerprint
2. repeat for every round:
     a. send the global core R to the clients drawn for this round
     b. each trains R on its own data      clients/app.py
     c. R ← exact mean of what came back   strategies/fedsb.py → fedsb/aggregation/mean.py
     d. write a checkpoint
3. each client goes on from R alone; what it publishes is its personal core
4. score base, global and personal on every client's own test set
"""

import contextlib
import time
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedsb.config import RunConfig
from fedsb.report.journal import Journal
from fedsb.report.screen import screen
from fedsb.report.trackers import trackers
from fedsb.store.files import write_json
from server.federation import Federation
from server.personal import evaluate, personalise
from server.run_folder import run_folder
from server.summary import summarise
from strategies.rounds import run_rounds

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that the run config names: `config` (a path or JSON), `set`, `out`, `resume`, `home`."""
    config, folder, resume = read_run_config(context)
    home = str(context.run_config.get("home", ""))
    with (
        run_folder(folder, config, resume),
        contextlib.closing(screen(config.runtime.progress)) as show,
        contextlib.closing(Journal(folder / "events.jsonl", show, trackers(config, folder))) as journal,
    ):
        federate(config, grid, folder, journal, Path(home) if home else None)


def federate(config: RunConfig, grid: Grid, folder: Path, journal: Journal, home: Path | None = None) -> None:
    """The algorithm above. What it leaves in `folder` is described in docs/design.md.

    `home`: the folder of a federation of real sites, which says what name each node was admitted under.
    """
    started = time.monotonic()
    run = Federation(config, grid, folder, journal, home)
    basis = run.choose_basis()
    run.prepare_clients(basis)
    strategy = run.strategy(basis)
    done, state = run.restore_or_start(basis)
    rounds, seconds = config.federation.rounds, config.federation.round_seconds
    state = run_rounds(
        grid,
        strategy,
        state,
        first=done + 1,
        last=rounds,
        seconds=seconds,
        admit=lambda: run.admit(strategy.shared.basis),
        before_round=run.announce,
        after_round=run.checkpoint,
    )
    personalise(run, strategy, state)
    evaluation = evaluate(run, strategy, state)
    journal.tell("end", seconds=round(time.monotonic() - started, 3))
    write_json(folder / "summary.json", summarise(run, strategy.shared.basis, evaluation, time.monotonic() - started))


def read_run_config(context: Context) -> tuple[RunConfig, Path, bool]:
    """The configuration, the run's folder, and whether to resume.

    `config` is a path (relative to the working folder or to this app) or the configuration itself as JSON.
    """
    values = context.run_config
    text = str(values["config"])
    if text.startswith("{"):
        config = RunConfig.from_json(text)
    else:
        path = Path(text) if Path(text).exists() else Path(__file__).parents[1] / text
        config = RunConfig.load(path, [line for line in str(values.get("set", "")).splitlines() if line])
    out = str(values.get("out", ""))
    return config, Path(out) if out else Path("runs") / config.name, bool(values.get("resume", False))
