"""NOLA's sizes: of a toy run, held against its files."""

from pathlib import Path

import pytest

from benchmarks import nola_size
from tests.benchmarks.samples import check, last_line
from tests.federation.tiny import config_of, save_model, save_task, table


def test_a_toy_run_ends_with_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, task = save_model(tmp_path / "llama"), save_task(tmp_path / "words")
    (tmp_path / "run.toml").write_text(config_of(table(model, task, adapter={"method": "nola"})).to_toml())
    small = ["--set", "adapter.rank=2", "--set", "train.steps=2", "--set", "personal.steps=2", "--set", "federation.rounds=1"]
    nola_size.main(["--config", str(tmp_path / "run.toml"), *small])
    result = last_line(capsys)
    check(result, "nola_size", {f"{what}_{bits}" for what in ("size", "loss") for bits in (32, 16, 8, 4)} | {"wire", "store"})
    found = {name: each["value"] for name, each in result["figures"].items()}
    assert found["loss_32"] == 1 and found["loss_4"] != 1
    assert all(1 < found[f"size_{bits}"] < 2 for bits in (32, 16)) and found["wire"] > 1, "a tiny model has little but frames"
