"""A grid on the tiny model: every combination is run once, again nothing, and means are over the seeds."""

import json
from pathlib import Path

import pytest

from benchmarks import grid
from fedsb.cli.evaluate import evaluate_run
from tests.benchmarks.samples import check, last_line
from tests.federation.tiny import config_of, federate, save_model, save_task, table


@pytest.fixture
def config(tmp_path: Path) -> Path:
    content = table(save_model(tmp_path / "model"), save_task(tmp_path / "words"), federation={"rounds": 1})
    path = tmp_path / "tiny.toml"
    path.write_text(config_of(content).to_toml())
    return path


def test_cells_are_all_combinations() -> None:
    assert grid.cells(["a: ", 'b: basis.source="weights"; adapter.rank=2'], ["x.y=1,2", "z.w=3"]) == [
        ("a x.y=1 z.w=3", ("x.y=1", "z.w=3")),
        ("a x.y=2 z.w=3", ("x.y=2", "z.w=3")),
        ("b x.y=1 z.w=3", ('basis.source="weights"', "adapter.rank=2", "x.y=1", "z.w=3")),
        ("b x.y=2 z.w=3", ('basis.source="weights"', "adapter.rank=2", "x.y=2", "z.w=3")),
    ]


def test_a_grid_runs_each_point_once_and_ends_with_its_figures(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "grid.jsonl"
    command = [str(config), "--out", str(out), "--seeds", "0,1", "--vary", "train.learning_rate=1e-3,1e-2"]
    grid.main(command)
    result = last_line(capsys)
    names = {f"run train.learning_rate={rate}" for rate in ("1e-3", "1e-2")}
    check(result, "grid", names)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted((line["name"], line["seed"]) for line in lines) == sorted((name, seed) for name in names for seed in (0, 1))
    for name in names:
        exact = [line["exact_match"] for line in lines if line["name"] == name]
        assert result["figures"][name]["value"] == pytest.approx(sum(exact) / 2, abs=1e-4)
    monkeypatch.setattr(grid, "run", lambda *_: pytest.fail("run again"))
    grid.main(command)
    assert last_line(capsys)["figures"] == result["figures"]


def test_a_points_score_is_that_of_the_whole_run(config: Path, tmp_path: Path) -> None:
    run = grid.RunConfig.load(config)
    found = grid.run(run, personal=True)
    federate(run, tmp_path / "run")
    scores = evaluate_run(tmp_path / "run", sequential=True)
    for which, prefix in (("global", ""), ("personal", "personal_")):
        expected = grid.pooled(scores[which])
        assert {what: found[prefix + what] for what in expected} == pytest.approx(expected)
