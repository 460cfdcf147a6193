import csv
import io
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedsb.errors import ConfigError
from fedsb.report.comparison import Row, best_of, comparison_table, csv_of, key_of, line_of, pooled, row_of, with_front
from fedsb.report.plots import write_plots


def line(match: float | None, loss: float | None = 1.0, up: int = 100, **more: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "method": "lora", "rank": 4, "seed": 0, "factor": 1.0, "learning_rate": 2e-3, "trainable_parameters": 1234,
        "bytes": {"basis": 7, "up": up, "down": 2 * up}, "aggregation_error": 0.5, "peak_memory": 1000, "seconds": 2.0,
        "scores": {"global": {"exact_match": match, "loss": loss, "n": 9}},
        "history": [{"round": i, "loss": 3.0 / i, "aggregation_error": 0.5} for i in (1, 2)],
    }  # fmt: skip
    return base | more


def shown(rows: list[Row]) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(comparison_table(rows))
    return capture.get()


def test_scores_are_pooled_over_examples_and_not_over_clients() -> None:
    scores = {"a": {"n": 1, "exact_match": 1.0, "loss": 4.0}, "b": {"n": 3, "exact_match": 0.0, "loss": 2.0}}
    assert pooled(scores) == {"n": 4, "exact_match": 0.25, "loss": 2.5}
    assert pooled({}) == {"n": 0, "exact_match": None, "loss": None}
    assert pooled({"a": {"n": 1, "exact_match": 0.0, "loss": math.nan}})["loss"] is None


def test_a_row_is_the_mean_and_deviation_over_seeds() -> None:
    runs = [line(0.5, 1.0, up=100, aggregation_error=0.1), line(0.7, 2.0, up=300, peak_memory=3000, seconds=4.0)]
    row = row_of("mine", runs)
    assert (row.seeds, row.bytes_basis, row.bytes_up, row.bytes_down, row.bytes_total) == (2, 7, 200, 400, 607)
    assert row.exact_match == pytest.approx(0.6) and row.exact_match_sd == pytest.approx(0.1 * math.sqrt(2))
    assert row.loss == 1.5 and row.loss_sd == pytest.approx(0.5 * math.sqrt(2))
    assert row.aggregation_error == pytest.approx(0.3) and row.seconds == 3.0 and row.peak_memory == 3000
    assert row.personal_loss is None and row.personal_loss_sd is None


def test_one_seed_has_no_deviation_and_one_unknown_makes_the_mean_unknown() -> None:
    alone = row_of("x", [line(0.5)])
    assert alone.exact_match == 0.5 and alone.exact_match_sd is None and "±" not in shown([alone]).split("\n", 1)[1]
    row = row_of("x", [line(0.5), line(None, None, aggregation_error=None)])
    assert row.exact_match is None and row.exact_match_sd is None and row.aggregation_error is None


@pytest.mark.parametrize(
    ("points", "front"),
    [
        ([(0.5, 100), (0.6, 200), (0.55, 300), (0.4, 90)], [True, True, False, True]),
        ([(0.5, 100), (0.5, 100)], [True, True]),
        ([(0.5, 100), (0.5, 90)], [False, True]),
        ([(None, 1), (0.1, 100)], [False, True]),
    ],
)
def test_the_front_is_what_nothing_beats(points: list[tuple[float | None, int]], front: list[bool]) -> None:
    rows = with_front([row_of(f"m{i}", [line(match, up=up)]) for i, (match, up) in enumerate(points)])
    assert [row.front for row in rows] == front
    for row in rows:
        assert (f"│ {row.name} * " in shown(rows)) == row.front


def test_the_best_rate_has_the_best_match_then_the_least_loss_then_comes_first() -> None:
    failed = {"failed": "diverged"}
    assert best_of([line(0.5), line(0.6, 9.0), line(0.6, 8.0), line(0.6, 8.0), failed]) == 2
    assert best_of([failed, line(0.0, None), line(0.0, 5.0)]) == 2
    with pytest.raises(ValueError, match="no run has a score"):
        best_of([failed, line(None, None)])


def test_csv_and_screen_say_what_the_rows_say() -> None:
    personal = {"exact_match": 0.75, "loss": 0.5, "n": 9}
    scores = {"global": {"exact_match": 0.512345, "loss": 1.25, "n": 9}, "personal": personal}
    rows = with_front([row_of("mine", [line(None, scores=scores)])])
    (found,) = csv.DictReader(io.StringIO(csv_of(rows)))
    assert found["name"] == "mine" and float(found["exact_match"]) == 0.512345 and found["exact_match_sd"] == ""
    assert found["front"] == "True" and float(found["bytes_total"]) == 307
    text = shown(rows)
    for cell in ("mine *", "1,234", "7 B", "100 B", "200 B", "5.0e-01", "0.512", "1.250", "0.750", "0.500", "2.0 s", "1.0 kB"):
        assert f" {cell} " in text
    assert "personal" not in shown([row_of("mine", [line(0.5)])])


def test_a_line_is_a_summary_with_what_it_is_known_by() -> None:
    summary = {
        **line(0.0),
        "split": "test", "code": {"sha256": "c"}, "versions": {}, "machine": {}, "seconds": {"total": 99.0, "rounds": [1.0, 2.5]},
        "evaluation": {"global": {"a": {"n": 2, "exact_match": 0.5, "loss": 1.0}}, "personal": {}},
        "bytes": {"basis": 7, "up": 1000, "down": 2000},
        "history": [{"round": i, "loss": 1.0, "aggregation_error": 0.0, "up": 10, "down": 30 * i} for i in (1, 2)],
    }  # fmt: skip
    identity = {"config": "1", "model": "2", "data": "3"}
    found = line_of(summary, identity, personal=False)
    assert found["key"] == key_of(identity) != key_of({**identity, "data": "4"})
    assert found["fingerprints"] == identity and found["seconds"] == 3.5
    assert found["scores"] == {"global": {"n": 2, "exact_match": 0.5, "loss": 1.0}}
    assert found["bytes"] == {"basis": 7, "up": 20, "down": 90}, "of the rounds, without publishing and scoring"


def test_plots_are_drawn_and_the_same_each_time(tmp_path: Path) -> None:
    lines = {
        "a": [line(0.5), line(0.6, history=[{"round": 1, "loss": 2.0}, {"round": 2, "loss": 1.0}])],
        "private": [line(0.4, up=50, history=[{"round": 1, "loss": None}, {"round": 2, "loss": None}])],
    }
    rows = with_front([row_of(name, lines[name]) for name in lines])
    written = write_plots(tmp_path, rows, lines)
    assert {path.name for path in written} == {
        f"{name}.{kind}" for name in ("accuracy-by-bytes", "loss-by-round") for kind in ("png", "svg")
    }
    before = {path: path.read_bytes() for path in written}
    assert all(before[path].startswith(b"\x89PNG" if path.suffix == ".png" else b"<?xml") for path in written)
    write_plots(tmp_path, rows, lines)
    assert {path: path.read_bytes() for path in written} == before


def test_without_matplotlib_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"plots need matplotlib; pip install 'fedsb\[plots\]'"):
        write_plots(tmp_path, [], {})
    assert not list(tmp_path.iterdir())
