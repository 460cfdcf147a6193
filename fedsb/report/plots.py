"""The plots of a comparison. The only file that needs matplotlib, which is imported when one is drawn."""

import io
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsb.errors import ConfigError
from fedsb.report.comparison import Row
from fedsb.store.files import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("png", "svg")
SIZE, DPI = (6.4, 4.4), 150  # inches


def write_plots(folder: Path, rows: Sequence[Row], lines: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Path]:
    """Draw `accuracy-by-bytes` and `loss-by-round`, as PNG and SVG. `lines`: name → its runs, one a seed.

    Raises ConfigError without matplotlib, and DiskError.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("plots need matplotlib; pip install 'fedsb[plots]', and the same command draws them") from None
    written = []
    with matplotlib.rc_context({"svg.hashsalt": "fedsb"}):  # the same bytes each time
        for name, draw in (("accuracy-by-bytes", _accuracy), ("loss-by-round", _loss)):
            figure = Figure(figsize=SIZE, layout="constrained")
            draw(figure.subplots(), rows, lines)
            for kind in FORMATS:
                written.append(folder / f"{name}.{kind}")
                write_file(written[-1], _drawn(figure, kind))
    return written


def _drawn(figure: "Figure", kind: str) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, format=kind, dpi=DPI, metadata={"Date": None} if kind == "svg" else None)
    return data.getvalue()


def _accuracy(axes: "Axes", rows: Sequence[Row], lines: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """A point a method, with its standard deviation; the Pareto front as a line."""
    scored = [row for row in rows if row.exact_match is not None]
    for row in scored:
        axes.errorbar(row.bytes_total, row.exact_match or 0.0, yerr=row.exact_match_sd or 0.0, fmt="o", capsize=3, label=row.name)
    front = sorted((row.bytes_total, row.exact_match) for row in scored if row.front)
    axes.plot([x for x, _ in front], [y or 0.0 for _, y in front], "--", color="grey", linewidth=1, zorder=0)
    axes.set_xscale("log")
    axes.set(xlabel="bytes moved in a run (basis, up and down)", ylabel="exact match of the global adapter")
    _finish(axes, bool(scored))


def _loss(axes: "Axes", rows: Sequence[Row], lines: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Mean training loss of each round, a line a method, with a band of one standard deviation over the seeds."""
    from matplotlib.ticker import MaxNLocator

    for row in rows:
        runs = [[entry["loss"] for entry in line["history"]] for line in lines[row.name]]
        if any(loss is None for run in runs for loss in run):
            axes.plot([], [])  # a method keeps its colour in both plots
            continue
        means = [statistics.fmean(losses) for losses in zip(*runs, strict=True)]
        deviations = [statistics.stdev(losses) if len(losses) > 1 else 0.0 for losses in zip(*runs, strict=True)]
        rounds = range(1, len(means) + 1)
        axes.plot(rounds, means, label=row.name)
        low, high = ([m + sign * d for m, d in zip(means, deviations, strict=True)] for sign in (-1, 1))
        axes.fill_between(rounds, low, high, alpha=0.2, linewidth=0)
    axes.set(xlabel="round", ylabel="training loss (nats)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _finish(axes, bool(axes.get_legend_handles_labels()[0]))


def _finish(axes: "Axes", labelled: bool) -> None:
    axes.grid(alpha=0.3)
    if labelled:
        axes.legend()
