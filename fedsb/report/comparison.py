"""What the runs of a comparison add up to: one line a run, one row a method; as a table on the screen, CSV and JSON."""

import csv
import dataclasses
import hashlib
import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from fedsb.report.units import human_bytes, human_seconds

COPIED = (  # from a summary into its line
    "method", "rank", "seed", "split", "trainable_parameters", "aggregation_error", "peak_memory", "code", "versions", "machine",
)  # fmt: skip
SCORES = ("exact_match", "loss")
FRONT = "*"
WORST = (-1.0, -math.inf)


@dataclass(frozen=True)
class Row:
    """One method over its seeds; None is what was not measured.

    Attributes:
        learning_rate: of AdamW, and the `factor` of the method's own that it is.
        bytes_basis: moved for the basis, mean over the seeds; `bytes_up`, `bytes_down`: in the rounds of training; `bytes_total`:
            their sum. Publishing and scoring are not in it.
        aggregation_error: the largest of a run's rounds, mean over the seeds.
        exact_match: of the global adapter over all test examples together, mean over the seeds, `_sd` the standard deviation
            (of a sample; None with one seed). `loss`: the same in nats. `personal_…`: of each client's own adapter.
        seconds: of all rounds of a run, mean over the seeds.
        peak_memory: bytes resident in a run's process, the largest of the seeds.
        front: whether no other row has a better exact match for as few bytes or fewer (Pareto).
    """

    name: str
    method: str
    rank: int
    factor: float
    learning_rate: float
    seeds: int
    trainable_parameters: int
    bytes_basis: float
    bytes_up: float
    bytes_down: float
    bytes_total: float
    aggregation_error: float | None
    exact_match: float | None
    exact_match_sd: float | None
    loss: float | None
    loss_sd: float | None
    personal_exact_match: float | None
    personal_exact_match_sd: float | None
    personal_loss: float | None
    personal_loss_sd: float | None
    seconds: float
    peak_memory: int
    front: bool = False


def key_of(identity: Mapping[str, str]) -> str:
    """What a finished run is found again by: SHA-256 over the fingerprints of its settings, base model and data."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def line_of(summary: Mapping[str, Any], identity: Mapping[str, str], personal: bool) -> dict[str, Any]:
    """A run's summary as one line of results.jsonl. `personal`: whether its personal adapters were trained."""
    which = ("global", "personal") if personal else ("global",)
    return {
        "key": key_of(identity),
        "fingerprints": dict(identity),
        **{name: summary[name] for name in COPIED},
        "bytes": {
            "basis": summary["bytes"]["basis"],
            **{way: sum(entry[way] for entry in summary["history"]) for way in ("up", "down")},
        },
        "scores": {each: pooled(summary["evaluation"][each]) for each in which},
        "history": [{name: entry[name] for name in ("round", "loss", "aggregation_error")} for entry in summary["history"]],
        "seconds": round(sum(summary["seconds"]["rounds"]), 3),
    }


def sentence_of(line: Mapping[str, Any]) -> str:
    """A result in half a line, for people."""
    score = line["scores"]["global"]
    match, loss = (spread(score[what], None) for what in SCORES)
    return f"exact match {match}, loss {loss}, {human_seconds(line['seconds'])}"


def pooled(scores: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """Client → score as the mean over all examples together; None of what is no number, or where there are no examples."""
    total = sum(score["n"] for score in scores.values())
    means = {what: sum(s["n"] * s[what] for s in scores.values()) / total if total else math.nan for what in SCORES}
    return {"n": total, **{what: mean if math.isfinite(mean) else None for what, mean in means.items()}}


def best_of(lines: Sequence[Mapping[str, Any]]) -> int:
    """The number of the line with the best exact match, among equals of the least loss, then the first; not of a failed run.

    Raises ValueError if all failed.
    """
    ranks = [_merit(line) for line in lines]
    if max(ranks, default=WORST) == WORST:
        raise ValueError("no run has a score")
    return ranks.index(max(ranks))


def row_of(name: str, lines: Sequence[Mapping[str, Any]]) -> Row:
    """The row of a method's runs, one a seed."""
    first = lines[0]
    basis, up, down = (statistics.fmean(line["bytes"][kind] for line in lines) for kind in ("basis", "up", "down"))
    scores = {
        (which, what): [line["scores"].get(which, {}).get(what) for line in lines]
        for which in ("global", "personal")
        for what in SCORES
    }
    return Row(
        name=name,
        method=first["method"],
        rank=first["rank"],
        factor=first["factor"],
        learning_rate=first["learning_rate"],
        seeds=len(lines),
        trainable_parameters=first["trainable_parameters"],
        bytes_basis=basis,
        bytes_up=up,
        bytes_down=down,
        bytes_total=basis + up + down,
        aggregation_error=_mean([line["aggregation_error"] for line in lines]),
        exact_match=_mean(scores["global", "exact_match"]),
        exact_match_sd=_deviation(scores["global", "exact_match"]),
        loss=_mean(scores["global", "loss"]),
        loss_sd=_deviation(scores["global", "loss"]),
        personal_exact_match=_mean(scores["personal", "exact_match"]),
        personal_exact_match_sd=_deviation(scores["personal", "exact_match"]),
        personal_loss=_mean(scores["personal", "loss"]),
        personal_loss_sd=_deviation(scores["personal", "loss"]),
        seconds=statistics.fmean(line["seconds"] for line in lines),
        peak_memory=max(line["peak_memory"] for line in lines),
    )


def with_front(rows: Sequence[Row]) -> list[Row]:
    """The rows, with those of the Pareto front marked: a row is on it unless another one is as good in both exact match and bytes
    and better in one. A row without a score is not."""
    return [dataclasses.replace(row, front=not any(_beats(other, row) for other in rows) and _scored(row)) for row in rows]


def csv_of(rows: Sequence[Row]) -> str:
    """The rows as CSV with a head, in full precision; empty is what was not measured."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in dataclasses.fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(dataclasses.asdict(row) for row in rows)
    return text.getvalue()


def comparison_table(rows: Sequence[Row]) -> Table:
    """The rows for people."""
    personal = any(row.personal_exact_match is not None for row in rows)
    table = Table(title="mean ± standard deviation over seeds, on all test examples together")
    heads = ["method", "seeds", "learning\nrate", "trained", "basis", "up", "down", "aggregation\nerror", "exact\nmatch", "loss"]
    heads += ["personal\nmatch", "personal\nloss"] if personal else []
    for head in [*heads, "rounds\ntook", "peak\nmemory"]:
        table.add_column(head, justify="left" if head == "method" else "right")
    for row in rows:
        own = [
            spread(row.personal_exact_match, row.personal_exact_match_sd),
            spread(row.personal_loss, row.personal_loss_sd),
        ]
        table.add_row(
            f"{row.name} {FRONT}" if row.front else row.name,
            str(row.seeds),
            f"{row.learning_rate:g}",
            f"{row.trainable_parameters:,}",
            *map(human_bytes, (row.bytes_basis, row.bytes_up, row.bytes_down)),
            "-" if row.aggregation_error is None else f"{row.aggregation_error:.1e}",
            spread(row.exact_match, row.exact_match_sd),
            spread(row.loss, row.loss_sd),
            *(own if personal else []),
            human_seconds(row.seconds),
            human_bytes(row.peak_memory),
        )
    table.caption = f"{FRONT} no other has a better exact match for as few bytes (basis, up and down together)"
    return table


def _merit(line: Mapping[str, Any]) -> tuple[float, float]:
    score = line["scores"]["global"] if "scores" in line else {"exact_match": None}
    if score["exact_match"] is None:
        return WORST
    return score["exact_match"], -math.inf if score["loss"] is None else -score["loss"]


def _scored(row: Row) -> bool:
    return row.exact_match is not None


def _beats(one: Row, other: Row) -> bool:
    if one.exact_match is None or other.exact_match is None:
        return False
    better = one.exact_match > other.exact_match or one.bytes_total < other.bytes_total
    return better and one.exact_match >= other.exact_match and one.bytes_total <= other.bytes_total


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == len(values) else None


def _deviation(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.stdev(known) if len(known) == len(values) > 1 else None


def spread(mean: float | None, deviation: float | None) -> str:
    """A mean and its standard deviation, for people."""
    if mean is None:
        return "-"
    return f"{mean:.3f}" if deviation is None else f"{mean:.3f} ± {deviation:.3f}"
