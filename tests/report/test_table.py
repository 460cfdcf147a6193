from typing import Any

import pytest
from rich.console import Console

from fedsb.report.table import evaluation_table, mean_score, show_summary
from fedsb.report.units import human_bytes, human_seconds


def _score(match: float, loss: float) -> dict[str, Any]:
    return {"exact_match": match, "loss": loss, "n": 48, "task": "sums"}


EVALUATION = {
    "base": {"b": _score(0.0, 4.0), "a": _score(0.5, 2.0)},
    "global": {"b": _score(0.25, 3.0), "a": _score(0.75, 1.0)},
    "personal": {"a": _score(1.0, 0.125)},
}


def _text(table: object) -> list[str]:
    console = Console(width=120, record=True, file=None, quiet=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get().splitlines()


def test_a_row_for_each_client_and_the_means() -> None:
    lines = _text(evaluation_table(EVALUATION))
    rows = {cells[0]: cells[1:] for line in lines if (cells := line.replace("│", " ").split())}
    assert rows["a"] == ["sums", "48", "0.500", "2.000", "0.750", "1.000", "1.000", "0.125"]
    assert rows["b"] == ["sums", "48", "0.000", "4.000", "0.250", "3.000", "-", "-"]
    assert rows["mean"] == ["0.250", "3.000", "0.500", "2.000", "1.000", "0.125"]
    assert lines.index(next(x for x in lines if "│ a " in x)) < lines.index(next(x for x in lines if "│ b " in x))


def test_the_mean_counts_each_client_alike() -> None:
    assert mean_score(EVALUATION["global"]) == {"exact_match": 0.5, "loss": 2.0}
    assert mean_score({}) is None


def test_a_summary_says_what_was_moved_and_where_the_adapters_lie(capsys: pytest.CaptureFixture[str]) -> None:
    summary = {
        "evaluation": EVALUATION,
        "split": "validation",
        "bytes": {"basis": 0, "up": 1_234_567, "down": 999, "up_per_client_round": 3_440_640},
        "seconds": {"total": 185.0},
    }
    show_summary(summary, "runs/a-very-long-name-" + "x" * 150 + "/adapters")
    printed = capsys.readouterr().out
    assert "each client's own validation set" in printed
    assert "moved: basis 0 B, up 1.2 MB, down 999 B (3.4 MB up per client and round)\n" in printed
    assert "took 3 min 05 s\n" in printed
    assert f"personal adapters: runs/a-very-long-name-{'x' * 150}/adapters\n" in printed


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (3_440_640, "3.4 MB"), (2e9, "2.0 GB"), (5e15, "5000.0 TB"),
        (999_949, "999.9 kB"), (999_999, "1.0 MB"),
    ],
)  # fmt: skip
def test_bytes_for_people(count: float, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0.0 s"), (4.25, "4.2 s"), (119.9, "119.9 s"), (120, "2 min 00 s"), (185.7, "3 min 05 s")]
)
def test_seconds_for_people(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text
