"""The tables of docs/study.md, from the results of `fedsb compare` that are kept.

python -m benchmarks.study [FOLDER]
"""

import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedsb.store.files import read_events

KEPT = Path(__file__).parent / "results/compare-banking77"
LOSS = 1.5  # nats of training loss: bytes are counted up to the first round that has it
Line = Mapping[str, Any]


def bytes_to(lines: Sequence[Line], loss: float) -> float | None:
    """Bytes, the basis included, up to the first round whose training loss, mean over seeds, is at most `loss`; None: none is."""
    histories = [line["history"] for line in lines]
    for number, rounds in enumerate(zip(*histories, strict=True), 1):
        if statistics.fmean(each["loss"] for each in rounds) <= loss:
            moved = [line["bytes"] for line in lines]
            part = number / len(histories[0])
            return statistics.fmean(each["basis"] + part * (each["up"] + each["down"]) for each in moved)
    return None


def table_of(folder: Path = KEPT) -> str:
    """The rows of a comparison, the best first: seeds, exact match, bytes of the whole run, and bytes up to a loss."""
    found: dict[str, list[Line]] = defaultdict(list)
    for line in read_events(folder / "results.jsonl"):
        found[line["name"]].append(line)
    rows = []
    for name, lines in found.items():
        match = [line["scores"]["global"]["exact_match"] for line in lines]
        whole = statistics.fmean(sum(line["bytes"].values()) for line in lines)
        reached = bytes_to(lines, LOSS)
        spread = f" ± {statistics.stdev(match):.3f}" if len(match) > 1 else ""
        until = "not reached" if reached is None else f"{reached / 1e6:.1f}"
        mean = statistics.fmean(match)
        cells = (f"`{name}`", str(len(lines)), str(len(lines[0]["history"])), f"{mean:.3f}{spread}", f"{whole / 1e6:.1f}", until)
        rows.append((mean, f"| {' | '.join(cells)} |"))
    head = f"| | seeds | rounds | exact match | MB in all | MB to a training loss of {LOSS:.1f} |\n|---|---|---|---|---|---|"
    return "\n".join([head, *(row for _, row in sorted(rows, reverse=True))])


if __name__ == "__main__":
    print(table_of(*map(Path, sys.argv[1:2])))
