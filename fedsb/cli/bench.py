"""`fedsb bench`: how fast something is, here and now."""

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from fedsb.cli.options import Quiet, stopped
from fedsb.errors import ConfigError, DeployError
from fedsb.report.units import human_seconds
from fedsb.serving.load import Measured, drive, models_of

bench = typer.Typer(name="bench", help="How fast something is, here and now.", no_args_is_help=True)


@bench.callback()
def _bench() -> None:
    """So that `serve` goes by its name."""


@bench.command("serve")
def bench_serve(
    target: Annotated[
        str, typer.Argument(help="a store, which is served on the loopback meanwhile, or a server's URL, with /v1")
    ],
    clients: Annotated[str, typer.Option(help="how many ask at one time, several numbers for several rows")] = "1,8,32",
    seconds: Annotated[float, typer.Option(min=0.1, help="of each row")] = 20.0,
    prompt: Annotated[int, typer.Option(min=1, help="words of a prompt")] = 16,
    tokens: Annotated[int, typer.Option(min=1, help="tokens of an answer at the most")] = 32,
    models: Annotated[str | None, typer.Option(help="names to ask, by default all but the base model")] = None,
    key: Annotated[str | None, typer.Option(help="of the server", envvar="FEDSB_KEY")] = None,
    threads: Annotated[int, typer.Option(min=0, help="of the server that is started; 0 leaves torch's choice")] = 0,
    json_: Annotated[bool, typer.Option("--json", help="one JSON object instead of a table")] = False,
    quiet: Quiet = False,
) -> None:
    """Load a server, each request another tenant drawn at random, and print throughput and latency."""
    try:
        counts = [int(each) for each in clients.split(",")]
    except ValueError:
        raise ConfigError(f"--clients {clients}: are no numbers; write some as 1,8,32") from None
    if any(not 0 < count <= 1024 for count in counts):
        raise ConfigError(f"--clients {clients}: from 1 to 1024 can ask at one time; choose some of these")
    with _served(target, threads) as url:
        try:
            bases, tenants = asyncio.run(models_of(url, key))
        except (httpx.HTTPError, ValueError, KeyError) as error:
            raise DeployError(
                f"{url}: does not answer as a server of models ({error}); name one with /v1, and its --key"
            ) from None
        asked = models.split(",") if models else tenants or bases
        if not asked:
            raise ConfigError(f"{url}: this key may ask nobody; give --key, or --models")
        rows: list[tuple[int, Measured]] = []
        told: dict[str, Any] = {"prompt": " ".join(["red"] * prompt), "tokens": tokens, "key": key}
        try:
            with _progress(quiet or json_) as progress:
                for number, count in enumerate(counts):
                    left = (len(counts) - number) * seconds
                    task = progress.add_task(f"{count} clients, about {human_seconds(left)} left", total=None)
                    asyncio.run(drive(url, asked, clients=count, seconds=0, **told))  # a first request of each, to warm it up
                    rows.append((count, asyncio.run(drive(url, asked, clients=count, seconds=seconds, **told))))
                    progress.remove_task(task)
        except KeyboardInterrupt:
            if rows and not json_:
                Console().print(_table(rows, len(asked)))
            stopped(f"{len(rows)} of {len(counts)} rows were measured; a row is not gone on with")
    if json_:
        print(json.dumps({"models": len(asked), "rows": [{"clients": count, **figures(each)} for count, each in rows]}))
    else:
        Console().print(_table(rows, len(asked)))


def _progress(silent: bool) -> Progress:
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=silent or not console.is_terminal)


def figures(measured: Measured) -> dict[str, Any]:
    """Throughput a second, latency in seconds (None where there is none), errors."""
    return {
        "requests": measured.requests,
        "requests_per_second": measured.requests / measured.seconds,
        "tokens_per_second": measured.tokens / measured.seconds,
        "first_p50": _quantile(measured.first, 50),
        "first_p99": _quantile(measured.first, 99),
        "between_p50": _quantile(measured.between, 50),
        "between_p99": _quantile(measured.between, 99),
        "errors": measured.errors,
    }


def _quantile(values: Sequence[float], percent: int) -> float | None:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else next(iter(values), None)


def _table(rows: Sequence[tuple[int, Measured]], models: int) -> Table:
    names = ("clients", "requests/s", "tokens/s", "first token\np50", "\np99", "between tokens\np50", "\np99", "errors")
    table = Table(*(Column(name, justify="right") for name in names), title=f"{models} tenants, drawn at random")
    for count, measured in rows:
        told = figures(measured)
        times = [f"{1000 * each:.0f} ms" if (each := told[name]) is not None else "-" for name in _TIMES]
        errors = ", ".join(f"{number} × {name}" for name, number in measured.errors.items()) or "0"
        table.add_row(str(count), f"{told['requests_per_second']:.2f}", f"{told['tokens_per_second']:.0f}", *times, errors)
    return table


_TIMES = ("first_p50", "first_p99", "between_p50", "between_p99")


@contextmanager
def _served(target: str, threads: int) -> Iterator[str]:
    """The URL of a server, started for a store and ended again."""
    if target.startswith(("http://", "https://")):
        yield target.rstrip("/")
        return
    command = [sys.executable, "-m", "fedsb.cli.main", "serve", target, "--port", "0", "--threads", str(threads)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - a pipe that nobody reads would fill up
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith("serving"):
            process.wait()
            log.seek(0)
            said = log.read().strip().splitlines()
            raise ConfigError(said[-1].removeprefix("fedsb: ") if said else f"{target}: cannot be served")
        yield line.split()[-1]
    finally:
        process.terminate()
        process.communicate()
        log.close()
