"""One federation for every setting of a grid: how far each comes, in loss and exact match of the global core.

    python -m benchmarks.grid configs/banking77.toml --out grid.jsonl --seeds 0,1,2 \\
        --vary train.learning_rate=5e-3,1e-2,2e-2 --variant 'random: ' --variant 'weights: basis.source="weights"'

Every variant (a name and settings, separated by semicolons) is run with every combination of the `--vary` values and every
seed. Each result is one line of `--out`, written as soon as it is there; what is there already is not run again, so a grid
can be interrupted and extended. Figures: mean over the seeds of the exact match on all clients' test sets, with its standard
deviation and the loss. `--personal` personalises too and adds those scores.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import figure, report, say
from clients.app import app as client_app
from fedsb.config import RunConfig
from fedsb.report.journal import Journal
from fedsb.report.screen import screen
from server.federation import Federation
from server.local_grid import LocalGrid, node_configs
from server.personal import evaluate, personalise
from strategies.rounds import run_rounds

Cell = tuple[str, tuple[str, ...]]  # the name of a point of the grid, and its settings


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one a run; extended if it is there")
    parser.add_argument("--seeds", default="0", help="seeds, separated by commas")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="a setting of every run")
    parser.add_argument("--vary", action="append", default=[], metavar="SECTION.KEY=V1,V2", help="values to combine")
    parser.add_argument("--variant", action="append", default=[], metavar="NAME: KEY=VALUE; …", help="a named set of settings")
    parser.add_argument("--personal", action="store_true", help="personalise too")
    options = parser.parse_args(arguments)
    seeds = [int(seed) for seed in options.seeds.split(",")]
    points = cells(options.variant or ["run: "], options.vary)
    runs = [
        (name, RunConfig.load(options.config, [*options.set, *settings, f"seed={seed}", "runtime.progress=none"]))
        for name, settings in points
        for seed in seeds
    ]
    for name, config in runs:
        if key(config, options.personal) not in finished(options.out):
            result = {"name": name, "key": key(config, options.personal), "seed": config.seed, **run(config, options.personal)}
            scores = f"{result['exact_match']:.4f} exact, loss {result['loss']:.4f}"
            say(f"{name}, seed {config.seed}: {scores}, {result['seconds']:.0f} s")
            with options.out.open("a") as file:
                file.write(json.dumps(result) + "\n")
    report("grid", figures([name for name, _ in points], runs, finished(options.out), options.personal))


def cells(variants: Sequence[str], vary: Sequence[str]) -> list[Cell]:
    """Every variant with every combination of values."""
    axes = [[f"{name}={value}" for value in values.split(",")] for name, _, values in (axis.partition("=") for axis in vary)]
    found = []
    for variant, chosen in itertools.product(variants, itertools.product(*axes)):
        name, _, settings = variant.partition(":")
        own = [setting.strip() for setting in settings.split(";") if setting.strip()]
        found.append((" ".join([name.strip(), *chosen]), (*own, *chosen)))
    return found


def run(config: RunConfig, personal: bool) -> dict[str, float]:
    """One federation: mean loss and exact match over all test examples, mean training loss of the last round, seconds."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "adapters").mkdir()
        grid = LocalGrid(client_app, node_configs(config.client_names, str(folder / "sites")))
        federation = Federation(config, grid, folder, Journal(folder / "events.jsonl", screen("none")))
        basis = federation.choose_basis()
        federation.prepare_clients(basis)
        strategy = federation.strategy(basis)
        _, state = federation.restore_or_start(basis)
        rounds, seconds = config.federation.rounds, config.federation.round_seconds
        state = run_rounds(grid, strategy, state, first=1, last=rounds, seconds=seconds, after_round=federation.checkpoint)
        result = pooled(evaluate(federation, strategy, state, ["global"])["global"])
        if personal:
            personalise(federation, strategy, state)
            scores = pooled(evaluate(federation, strategy, state, ["personal"])["personal"])
            result |= {f"personal_{what}": value for what, value in scores.items()}
        trained = federation.history[-1]["loss"]
    return result | {"train_loss": trained, "seconds": round(time.monotonic() - started, 1)}


def pooled(scores: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Mean over the test examples of all clients."""
    total = sum(score["n"] for score in scores.values())
    return {what: sum(score[what] * score["n"] for score in scores.values()) / total for what in ("loss", "exact_match")}


def key(config: RunConfig, personal: bool) -> str:
    """What a finished run is found again by."""
    return config.digest() + (":personal" if personal else "")


def finished(path: Path) -> dict[str, dict[str, Any]]:
    """The results so far, by key."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {result["key"]: result for result in map(json.loads, lines)}


def figures(
    names: Sequence[str], runs: Sequence[tuple[str, RunConfig]], results: Mapping[str, Mapping[str, Any]], personal: bool
) -> dict[str, dict[str, Any]]:
    """Mean and standard deviation over the seeds, by name."""
    found = {}
    for name in names:
        own = [results[key(config, personal)] for run_name, config in runs if run_name == name]
        exact = [result["exact_match"] for result in own]
        more = {what: [round(result[what], 4) for result in own] for what in own[0] if what not in ("name", "key", "seconds")}
        deviation = round(statistics.stdev(exact), 4) if len(exact) > 1 else None
        found[name] = figure(statistics.mean(exact), "exact match", deviation=deviation, **more)
    return found


if __name__ == "__main__":
    main()
