"""`make bench`: goes on where it was stopped, keeps what it has, and hides no claim that was missed."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import everything
from benchmarks.everything import CLAIMS, NAMES, file_of, run, table_of

WHERE = {"cpu": "Some CPU (R)", "cpus": 2, "system": "Linux 6.1"}


def result(name: str, value: float) -> dict[str, Any]:
    """A benchmark's last line, with all its claims at one value."""
    figures = {
        claim.key: {"value": value, "ours": 3.0, "peer": 1.5, "unit": "ratio"} for claim in CLAIMS if claim.benchmark == name
    }
    return {"benchmark": name, "figures": figures, "machine": {"cpu": "x"}, "versions": {"torch": "2"}}


def row_of(table: str, key: str) -> list[str]:
    """The cells of a claim's row."""
    return [cell.strip() for cell in next(line for line in table.splitlines() if f"(`{key}`)" in line).strip("|").split("|")]


def test_what_was_run_is_not_run_again(tmp_path: Path) -> None:
    file, asked = tmp_path / "r.json", list[str]()

    def one(name: str) -> dict[str, Any]:
        asked.append(name)
        if name == "basis" and asked.count("basis") == 1:
            raise SystemExit("no disk")
        if len(asked) == 4:
            raise KeyboardInterrupt
        return result(name, 1.0)

    with pytest.raises(KeyboardInterrupt):
        run(file, ["train_step", "basis", "aggregate", "serving"], 1, one)
    assert asked == ["train_step", "basis", "aggregate", "serving"]
    assert set(json.loads(file.read_text())["results"]) == {"train_step", "aggregate"}
    assert run(file, ["train_step", "basis", "aggregate", "serving"], 1, one) == []
    assert asked[4:] == ["basis", "serving"]
    assert run(file, ["basis"], 3, one) == [] and asked[6:] == ["basis", "basis"]


def test_one_that_fails_is_named_and_the_others_run(tmp_path: Path) -> None:
    def one(name: str) -> dict[str, Any]:
        if name == "basis":
            raise SystemExit("no disk")
        return result(name, 1.0)

    assert run(tmp_path / "r.json", ["basis", "aggregate"], 1, one) == ["basis"]
    assert set(json.loads((tmp_path / "r.json").read_text())["results"]) == {"aggregate"}


def test_a_missed_claim_stands_in_plain_sight() -> None:
    runs = [result("serving", value) for value in (0.91, 0.89, 0.5)]
    table = table_of({"serving": runs, "basis": [result("basis", 1.0)]}, "r.json")
    cells = row_of(table, "of_base_r16")
    assert cells[2:9] == ["**0.89**", "≥ 0.9", "**missed**", "3", "1.5", "0.5 to 0.91", "3"]
    assert "serving.of_base_r16: 0.89, to be ≥ 0.9" in table.partition("## Missed")[2]
    assert row_of(table, "of_base_r64")[4] == "met" and row_of(table, "estimate_memory")[4] == "met"
    assert row_of(table, "speedup")[2] == "not measured"
    assert len([line for line in table.splitlines() if "`python -m benchmarks." in line]) == len(CLAIMS)


def test_a_file_for_each_machine_and_day(tmp_path: Path) -> None:
    first = file_of(tmp_path, WHERE, new=False)
    assert first.name.startswith("some-cpu-r-2-linux-2")
    first.write_text("{}")
    assert file_of(tmp_path, WHERE, new=False) == first
    second = file_of(tmp_path, WHERE, new=True)
    assert second.name == first.name.removesuffix(".json") + "-2.json"
    assert file_of(tmp_path, WHERE | {"cpu": "Other"}, new=False) not in (first, second)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def child(module: str) -> dict[str, Any]:
        name = module.removeprefix("benchmarks.")
        if name == "capacity":
            raise SystemExit("no disk")
        return result(name, 1.0)

    monkeypatch.setattr(everything, "child", child)
    arguments = ["--results", str(tmp_path), "--table", str(tmp_path / "T.md")]
    with pytest.raises(SystemExit, match="failed: capacity"):
        everything.main(arguments)
    assert row_of((tmp_path / "T.md").read_text(), "flat_1000")[4] == "met"
    with pytest.raises(SystemExit) as left:
        everything.main([*arguments, "--only", "speed"])
    assert left.value.code == 2 and "there is no benchmark speed" in capsys.readouterr().err


def test_every_claim_is_of_a_figure_that_its_benchmark_has() -> None:
    """By the words of its source, since running them takes hours."""
    folder = Path(everything.__file__).parent
    for claim in CLAIMS:
        words = claim.key.removesuffix("_paper").removesuffix("_BUG")
        assert words in (folder / f"{claim.benchmark}.py").read_text(), claim
    assert len({(claim.benchmark, claim.key) for claim in CLAIMS}) == len(CLAIMS) and set(NAMES) <= {
        p.stem for p in folder.glob("*.py")
    }
