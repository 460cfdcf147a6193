"""Newcomers: how rows are dealt, and a toy run that is not run again."""

import json
from pathlib import Path

import pytest

from benchmarks import newcomer
from tests.benchmarks.samples import check, last_line
from tests.federation.tiny import save_model


def test_a_toy_run_ends_with_its_figures_and_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = save_model(tmp_path / "bert", "classification", width=64), tmp_path / "data" / "banking77"
    data.mkdir(parents=True)
    words = ["red", "green", "blue", "cat", "dog"]
    for name, times in (("train", 40), ("test", 12)):
        rows = [{"text": f"{word} {words[i % 5]} {words[i % 3]}", "label": word} for i in range(times) for word in words]
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"), "--model", model, "--clients", "3"]
    told += ["--newcomers", "2", "--counts", "2,4", "--seeds", "0", "--rounds", "1", "--steps", "2", "--threads", "1"]
    newcomer.main(told)
    result = last_line(capsys)
    check(result, "newcomer", {f"{way}_{count}" for way in newcomer.WAYS if way != "lopa" for count in (2, 4)})
    own = {path.name: (path / "train.jsonl").read_text().splitlines() for path in (tmp_path / "out" / "data-0").iterdir()}
    assert len(own) == 3 + 4 and len(own["new-0-2"]) == 2 and own["new-0-4"][:2] == own["new-0-2"]
    monkeypatch.setattr(newcomer, "scored", lambda *_: pytest.fail("nothing was missing"))
    newcomer.main(told)
    assert last_line(capsys)["figures"] == result["figures"]


def test_tasks_of_a_causal_model_have_lopa_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_model(tmp_path / "llama", width=64)
    for task, answer in (("one", "red"), ("two", "blue")):
        (tmp_path / "data" / task).mkdir(parents=True)
        for name, count in (("train", 30), ("test", 10)):
            rows = [{"prompt": f"cat {'dog ' * (i % 3)}up", "completion": answer} for i in range(count)]
            (tmp_path / "data" / task / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"), "--model", model, "--tasks", "one,two"]
    told += ["--clients", "2", "--newcomers", "1", "--counts", "2", "--seeds", "0", "--rounds", "1", "--fraction", "1"]
    newcomer.main([*told, "--steps", "2", "--threads", "1"])
    check(last_line(capsys), "newcomer", {f"{way}_2" for way in newcomer.WAYS})
