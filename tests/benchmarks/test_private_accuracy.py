"""The comparison of methods under privacy, on the tiny model: every method runs, once; the peers are what they are called."""

import json
from pathlib import Path

import pytest

from benchmarks import private_accuracy
from tests.benchmarks.samples import check, last_line
from tests.federation.tiny import save_model, save_task


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A run with every method on a task of three labels."""
    save_task(tmp_path / "data" / "words", "classification", train=60)
    monkeypatch.setattr(private_accuracy, "RANK", 4)
    monkeypatch.setattr(private_accuracy, "PEER_RANK", 2)
    monkeypatch.setattr(private_accuracy, "PUBLIC", 9)
    monkeypatch.setattr(private_accuracy, "HELD_OUT", 6)
    monkeypatch.setattr(private_accuracy, "SIZES", {3: {"batch": 4, "sketched": 6}})
    monkeypatch.setattr(private_accuracy, "BEST", {("words", method): 1e-2 for method in private_accuracy.METHODS})
    model = save_model(tmp_path / "model", "classification")
    own = ["--model", model, "--tasks", "words", "--clients", "3", "--rounds", "2", "--steps", "2"]
    return ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"), *own]


def test_every_method_runs_once_with_and_without_privacy(
    command: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private_accuracy.main([*command, "--epsilons", "none,8", "--seeds", "0"])
    rates = {method: "1e-09" if method == "head" else "0.01" for method in private_accuracy.METHODS}
    names = {f"words, 3 clients, ε={e}, {method}, lr={rate}" for e in ("none", "8.0") for method, rate in rates.items()}
    result = last_line(capsys)
    check(result, "private_accuracy", names)
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert len(lines) == len(names)
    assert len({line["loss"] for line in lines}) == len(names), "two methods did the very same"
    monkeypatch.setattr(private_accuracy.grid, "run", lambda *_, **__: pytest.fail("run again"))
    private_accuracy.main([*command, "--epsilons", "none,8", "--seeds", "0"])
    assert last_line(capsys)["figures"] == result["figures"]


def test_tuning_scores_on_rows_that_no_client_and_no_test_has(command: list[str], tmp_path: Path) -> None:
    private_accuracy.main([*command, "--epsilons", "none", "--methods", "ffa-lora", "--tune"])
    folder = tmp_path / "out" / "data" / "words"
    rows = {
        (part, name): (folder / part / f"{name}.jsonl").read_text().splitlines()
        for part in ("clients", "public", "tuning")
        for name in ("train", "test")
    }
    assert [len(rows[part]) for part in (("clients", "train"), ("public", "train"), ("tuning", "test"))] == [45, 9, 6]
    whole = (tmp_path / "data" / "words" / "train.jsonl").read_text().splitlines()
    held = [*rows["clients", "train"], *rows["public", "train"], *rows["tuning", "test"]]
    assert sorted(held) == sorted(whole)
    assert rows["tuning", "train"] == rows["clients", "train"]
    assert rows["clients", "test"] == (tmp_path / "data" / "words" / "test.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [line["rate"] for line in lines] == list(private_accuracy.RATES["ffa-lora"])


def test_a_missing_folder_or_rate_is_named(command: list[str]) -> None:
    with pytest.raises(SystemExit, match="absent: cannot be read .* --data"):
        private_accuracy.main([*command, "--tasks", "absent", "--tune"])
    with pytest.raises(SystemExit, match="sb-weights on absent; run --tune"):
        private_accuracy.main([*command, "--tasks", "absent"])
