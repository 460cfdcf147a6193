"""The page of a comparison: from its results, so also of one that is not finished."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from fedsb.errors import StoreError
from fedsb.report.charts import HUES, Line, lines, scatter
from fedsb.report.comparison import FRONT, Row, row_of, spread, with_front
from fedsb.report.page import Page, Part, State, table_of
from fedsb.report.units import human_bytes, human_seconds
from fedsb.store.files import read_events

RESULTS = "results.jsonl"


def compare_page(folder: Path) -> Page:
    """Read a comparison's folder. Raises StoreError if nothing of it is finished."""
    runs: dict[str, list[Mapping[str, Any]]] = {}
    for line in read_events(folder / RESULTS):
        if "scores" in line:
            runs.setdefault(line["name"], []).append(line)
    if not runs:
        raise StoreError(f"{folder}: no run of this comparison is finished yet; `fedsb compare` goes on with it")
    rows = with_front([row_of(name, found) for name, found in runs.items()])
    state, verdict, because = _judged(rows)
    facts = [
        ("methods", str(len(rows))),
        ("runs", str(sum(map(len, runs.values())))),
        ("on the front", str(sum(r.front for r in rows))),
    ]
    parts = [
        Part("Exact match by bytes", _by_bytes(rows), "To the left and up is better; the line is the Pareto front.", wide=True),
        Part(
            "Training loss",
            lines([_loss(row.name, runs[row.name], not row.front and len(rows) > HUES) for row in rows], "round", "nats"),
            "Mean over seeds; a band from the lowest to the highest. Of many methods, only those on the front have colours.",
            wide=True,
        ),
        Part("All methods", _table(rows), f"Mean ± standard deviation over seeds. {FRONT}: on the front.", wide=True),
    ]
    return Page(f"FedSB: {folder.resolve().name}", "a comparison of methods", state, verdict, because, facts, parts)


def _judged(rows: Sequence[Row]) -> tuple[State, str, str]:
    scored = [row for row in rows if row.exact_match is not None]
    if not scored:
        return "bad", "No run has a score.", ""
    best, few = max(scored, key=lambda row: row.exact_match or 0.0), min(row.seeds for row in rows)
    told = f"With {human_bytes(best.bytes_total)} it reaches {spread(best.exact_match, best.exact_match_sd)}."
    doubt = f" Some rows have {few} seed{'s' if few > 1 else ''} only." if few < 3 else ""
    return "fair" if few < 3 else "good", f"{best.name} is the most accurate.", told + doubt


def _by_bytes(rows: Sequence[Row]) -> Any:
    points = {r.name: (r.bytes_total / 1e6, r.exact_match) for r in rows if r.exact_match is not None}
    return scatter(points, [r.name for r in rows if r.front], "MB in a run", "exact match")


def _loss(name: str, runs: Sequence[Mapping[str, Any]], soft: bool) -> Line:
    by_round: dict[int, list[float]] = {}
    for entry in (entry for run in runs for entry in run["history"] if entry["loss"] is not None):
        by_round.setdefault(entry["round"], []).append(entry["loss"])
    numbers = sorted(by_round)
    band = [(n, min(by_round[n]), max(by_round[n])) for n in numbers] if len(runs) > 1 and not soft else []
    return Line(name, [(n, fmean(by_round[n])) for n in numbers], band=band, soft=soft)


def _table(rows: Sequence[Row]) -> Any:
    heads = (
        "method",
        "seeds",
        "learning rate",
        "trained",
        "basis",
        "up",
        "down",
        "aggregation error",
        "exact match",
        "loss",
        "took",
    )
    return table_of(
        heads,
        [
            (
                f"{row.name} {FRONT}" if row.front else row.name,
                row.seeds,
                f"{row.learning_rate:g}",
                f"{row.trainable_parameters:,}",
                *map(human_bytes, (row.bytes_basis, row.bytes_up, row.bytes_down)),
                "-" if row.aggregation_error is None else f"{row.aggregation_error:.1e}",
                spread(row.exact_match, row.exact_match_sd),
                spread(row.loss, row.loss_sd),
                human_seconds(row.seconds),
            )
            for row in rows
        ],
    )
