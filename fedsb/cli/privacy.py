"""`fedsb privacy`: what a run will cost, before it begins, and what has been spent."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fedsb.adapters.attach import attach, layout_of
from fedsb.adapters.share import share_of, trained_size
from fedsb.cli.run import table_of
from fedsb.config import RunConfig
from fedsb.data.sites import client_data
from fedsb.data.tasks import labels_of
from fedsb.errors import ConfigError, LedgerError
from fedsb.models import locate, outline_model
from fedsb.privacy.accounting import Release, epsilon
from fedsb.privacy.mechanism import basis_releases, delta_of, mechanism_of, planned_steps
from fedsb.store.ledger import NAME, Entry, Ledger, spent

privacy = typer.Typer(help="What a run will cost in privacy, and what has been spent.", no_args_is_help=True)
NOTHING = 'privacy.unit = "none" in {}: this run promises nothing; set privacy.unit and privacy.epsilon'


@privacy.command("plan")
def plan(
    config: Annotated[Path, typer.Argument(help="TOML file of the run")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="override a setting; may be repeated")
    ] = None,
    records: Annotated[
        list[int] | None,
        typer.Option("--records", help="training examples of a site with data of its own, which only it knows; may be repeated"),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="print one JSON object instead of a table")] = False,
) -> None:
    """Print what a run will cost each client before it begins: ε at δ by both accountants, with and without amplification."""
    chosen = RunConfig.load(config, set_ or [])
    if chosen.privacy.unit == "none":
        raise ConfigError(NOTHING.format(config))
    layout = layout_of(attach(outline_model(locate(chosen.model.source), chosen.model, _labels(chosen)), chosen))
    if chosen.privacy.unit == "client":  # noise falls on what travels
        layout = share_of(layout, chosen.adapter.method, chosen.adapter.rank).layout
    numbers = trained_size(layout, chosen.adapter.method)
    rows = [_planned(chosen, name, count, numbers) for name, count in _counts(chosen, records or [])]
    if json_:
        print(json.dumps({"unit": chosen.privacy.unit, "numbers": numbers, "clients": rows}))
        return
    console = Console(width=None if Console().is_terminal else 150)
    console.print(table_of(f"what {chosen.name} will cost, by {chosen.privacy.unit}", [_shown(row) for row in rows]))
    console.print(
        "ε: what holds, by the accountant named; rdp is the older and looser bound. unamplified: were it known who takes part "
        "in each step. basis: the part of ε that making the basis takes.\nnoise/signal: norm of the noise in one step over the "
        "largest norm that what is clipped can have together; "
        "what it costs in accuracy is not known before.",
        highlight=False,
    )


@privacy.command("ledger")
def ledger(
    where: Annotated[Path, typer.Argument(help="folder of a simulated run, or of a site (its --home), or one ledger.jsonl")],
    delta: Annotated[float | None, typer.Option(help="δ; by default one over the largest number of records in an entry")] = None,
    json_: Annotated[bool, typer.Option("--json", help="print one JSON object instead of tables")] = False,
) -> None:
    """Print what has been released of each client's data, and what it has cost together."""
    found = {path: Ledger(path, _client_of(path)).entries() for path in _ledgers(where)}
    clients = [_spent(entries, delta) for entries in found.values() if entries]
    if json_:
        print(json.dumps({"clients": clients, "entries": [vars(entry) for entries in found.values() for entry in entries]}))
        return
    console = Console(width=None if Console().is_terminal else 150)
    for entries in found.values():
        console.print(table_of(f"released of {entries[0].client}'s data", _by_run(entries)) if entries else "")
    console.print(table_of("spent", [_shown(row) for row in clients]))


def _counts(config: RunConfig, records: Sequence[int]) -> list[tuple[str, int]]:
    """Client → how many of what is protected it has to do with: its records, or the planned clients."""
    if config.privacy.unit == "client":
        return [("every client", config.federation.clients)]
    if records:
        return [(f"{count} records", count) for count in records]
    if config.data.partition == "own" and config.federation.names == ():
        raise ConfigError(
            'data.partition = "own": only the sites know how many records they have; give --records NUMBER, for each'
        )
    return [(name, len(client_data(config, name, index, "train"))) for index, name in enumerate(config.client_names)]


def _planned(config: RunConfig, name: str, count: int, numbers: int) -> dict[str, Any]:
    mechanism, delta, steps = mechanism_of(config, count), delta_of(config, count), planned_steps(config)
    basis = basis_releases(config, count)
    cost = epsilon([*basis, mechanism.release(steps)], delta)
    known = epsilon([Release(r.noise_multiplier, 1.0, r.steps) for r in (*basis, mechanism.release(steps))], delta)
    return {
        "client": name,
        "of": count,
        "delta": delta,
        "epsilon": cost.best,
        "accountant": cost.accountant,
        "rdp": cost.rdp,
        "unamplified": known.best,
        "noise_multiplier": mechanism.noise_multiplier,
        "sample_rate": mechanism.sample_rate,
        "steps": steps,
        "basis": epsilon(basis, delta).best,
        "noise_over_signal": mechanism.noise_multiplier * math.sqrt(numbers) / (mechanism.sample_rate * count),
    }


def _spent(entries: Sequence[Entry], delta: float | None) -> dict[str, Any]:
    last = entries[-1]
    chosen = delta if delta is not None else 1 / max(2, *(entry.records for entry in entries))
    cost = spent(entries, chosen)
    return {
        "client": last.client,
        "delta": chosen,
        "epsilon": cost.best,
        "accountant": cost.accountant,
        "rdp": cost.rdp,
        "data_sets": len({entry.dataset for entry in entries}),
        "releases": len(entries),
    }


def _by_run(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Entries with the same run and mechanism in one row."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for entry in entries:
        key = (entry.config, entry.what, entry.unit, entry.noise_multiplier, entry.sample_rate, entry.clip_norm)
        row = rows.setdefault(
            key,
            {
                "run": entry.run,
                "what": entry.what,
                "unit": entry.unit,
                "rounds": "",
                "steps": 0,
                "noise": f"{entry.noise_multiplier:.3f}",
                "rate": f"{entry.sample_rate:.4f}",
                "clip": entry.clip_norm,
            },
        )
        row["steps"] += entry.steps
        first = str(row["rounds"]).partition("-")[0] or str(entry.round)
        row["rounds"] = first if first == str(entry.round) else f"{first}-{entry.round}"
    return list(rows.values())


def _ledgers(where: Path) -> list[Path]:
    if where.is_file():
        return [where]
    found = sorted([*where.glob(NAME), *where.glob(f"*/{NAME}"), *where.glob(f"sites/*/{NAME}")])
    if not found:
        raise LedgerError(
            f"{where}: holds no {NAME}; name the folder of a simulated run or of a site "
            "(of a run on real sites each site has its own ledger, on its own disk)"
        )
    return found


def _client_of(path: Path) -> str:
    return path.resolve().parent.name


def _labels(config: RunConfig) -> int | None:
    return len(labels_of(config)) or None


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers to four digits."""
    return {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()}
