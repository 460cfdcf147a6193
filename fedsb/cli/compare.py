"""`fedsb compare`: several methods on one federation, tuned alike, in one table."""

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tomli_w
import typer
from rich.console import Console

from fedsb.cli.compare_plan import Comparison, Run, identify, load_comparison
from fedsb.cli.compare_run import run_apart
from fedsb.cli.compare_screen import Silence, compare_screen
from fedsb.cli.options import Json, Quiet, command, say, stopped
from fedsb.errors import ConfigError, FederationError, StoreError
from fedsb.report.comparison import Row, best_of, comparison_table, csv_of, key_of, line_of, row_of, with_front
from fedsb.report.plots import write_plots
from fedsb.store.files import append_line, clean_leftovers, read_events, write_file, write_json
from server.run_folder import alone

MARK, RESULTS, TUNING = "compare.toml", "results.jsonl", "tuning.jsonl"
Lines = dict[str, list[dict[str, Any]]]


def compare(
    config: Annotated[Path, typer.Argument(help="TOML file of a run with a [compare] table, such as configs/compare.toml")],
    methods: Annotated[
        str | None, typer.Option(metavar="NAME,NAME", help="methods and variants; by default those in the file")
    ] = None,
    seeds: Annotated[str | None, typer.Option(metavar="SEED,SEED", help="seeds of each; by default those in the file")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="override a setting; may be repeated")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="folder of the comparison, gone on with; by default runs/NAME")] = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run each method with each seed, after trying learning rates on a validation split, and print them side by side."""
    numbers = _seeds(seeds)
    plan = load_comparison(config, set_ or [], _names(methods), numbers)
    folder = out or Path("runs") / plan.name
    _check_folder(folder)
    plan.check()
    try:
        with _opened(folder, plan):
            with contextlib.closing(compare_screen(plan.size, json_=json_, quiet=quiet)) as screen:
                lines = Runner(folder, plan, screen).lines()
            rows = with_front([row_of(name, lines[name]) for name in lines])
            _keep(folder, rows, lines)
            if json_:
                say("table", {"folder": str(folder), "rows": [vars(row) for row in rows]})
            else:
                _show(folder, rows, lines)
    except KeyboardInterrupt:
        again = command("compare", config, methods=methods, seeds=seeds, out=out, changes=set_)
        stopped(f"go on with `{again}`")


class Runner:
    """Runs what of a comparison is not there yet.

    Args:
        folder: of the comparison. A result is a line of results.jsonl (of tuning.jsonl on the validation split), written as soon
            as it is there, and its run's folder is below `runs/`.
    """

    def __init__(self, folder: Path, plan: Comparison, screen: Silence) -> None:
        self._folder, self._plan, self._screen = folder, plan, screen
        self._known = {name: {line["key"]: line for line in read_events(folder / name)} for name in (RESULTS, TUNING)}
        self._done = 0

    def lines(self) -> Lines:
        """Name → the lines of its runs, one a seed. Rates come first, then seed by seed, so that what is there early has all."""
        finals = {name: self._plan.final(name, self._factor(name)) for name in self._plan.tables}
        found: Lines = {name: [] for name in finals}
        for runs in zip(*finals.values(), strict=True):
            for run in runs:
                found[run.name].append(self._line(run, RESULTS))
        return found

    def _factor(self, name: str) -> float:
        """The best factor of a method's learning rate on the validation split."""
        runs = self._plan.tried(name)
        if not runs:
            return self._plan.factors[0]
        lines = [self._line(run, TUNING) for run in runs]
        try:
            return runs[best_of(lines)].factor
        except ValueError:
            raise ConfigError(f"{name}: no learning rate of compare.rates gives a result; try smaller ones") from None

    def _line(self, run: Run, file: str) -> dict[str, Any]:
        """A run's result, from disk if it is there. One that fails while rates are tried has none, and is not tried again."""
        self._done += 1
        identity = identify(run.config)
        key = key_of(identity)
        if key in self._known[file]:
            return self._labelled(self._known[file][key], run)
        self._screen.begin(self._done, run.title)
        folder = self._folder / "runs" / f"{run.name}-{run.config.seed}-{key[:12]}"
        told = {"key": key, "name": run.name, "factor": run.factor, "learning_rate": run.rate, "run": folder.name}
        try:
            summary = run_apart(run.config, folder, self._screen.hear)
        except FederationError as error:
            if file == RESULTS:
                raise FederationError(f"{run.title}: {error}") from None
            line = {**told, "seed": run.config.seed, "fingerprints": identity, "failed": str(error)}
        else:
            if summary["data"]["sha256"] != identity["data"]:
                raise StoreError(f"{folder}: its data changed while it ran; remove that folder and run the same command again")
            line = {**line_of(summary, identity, run.config.personal.steps > 0), **told}
        append_line(self._folder / file, json.dumps(line))
        self._screen.done(self._done, run.title, line)
        self._known[file][key] = line
        return line

    @staticmethod
    def _labelled(line: Mapping[str, Any], run: Run) -> dict[str, Any]:
        """The same settings may have had another name, or be another factor of another rate."""
        return {**line, "name": run.name, "factor": run.factor, "learning_rate": run.rate}


def _keep(folder: Path, rows: Sequence[Row], lines: Lines) -> None:
    """Write the table and its plots down."""
    runs = [line for each in lines.values() for line in each]
    write_file(folder / "table.csv", csv_of(rows).encode())
    write_json(folder / "table.json", {"rows": [vars(row) for row in rows], "runs": runs})
    try:
        write_plots(folder, rows, lines)
    except ConfigError as error:
        print(f"fedsb: {error}", file=sys.stderr)


def _show(folder: Path, rows: Sequence[Row], lines: Lines) -> None:
    """Print the table."""
    console = Console(width=None if Console().is_terminal else 200)
    console.print(comparison_table(rows))
    runs = [line for each in lines.values() for line in each]
    if (states := len({line["code"]["sha256"] for line in runs})) > 1:
        console.print(f"these results come from {states} states of the code; {RESULTS} says which", highlight=False)
    console.print(f"table and plots: {folder}", highlight=False, soft_wrap=True)


@contextlib.contextmanager
def _opened(folder: Path, plan: Comparison) -> Iterator[None]:
    """Be the only process at work on a comparison's folder, made if it is not there."""
    settings = {"compare": plan.section.model_dump(mode="json"), "runs": plan.tables}
    new = not (folder / MARK).exists()
    if new:
        write_file(folder / MARK, tomli_w.dumps(settings).encode())
    with alone(folder):
        clean_leftovers(folder)
        if not new:
            write_file(folder / MARK, tomli_w.dumps(settings).encode())
        yield


def _check_folder(folder: Path) -> None:
    """Raise StoreError if something else is at a comparison's place."""
    if folder.exists() and not folder.is_dir():
        raise StoreError(f"{folder} is a file; choose another --out")
    if folder.exists() and any(folder.iterdir()) and not (folder / MARK).exists():
        raise StoreError(f"{folder} holds files that are no comparison; choose another --out")


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def _seeds(text: str | None) -> list[int]:
    """Raises ConfigError for what is no whole number from 0 on."""
    for word in _names(text):
        if not word.isdecimal():
            raise ConfigError(f"--seeds {text}: {word} is no whole number; write --seeds 0,1,2")
    return [int(word) for word in _names(text)]
