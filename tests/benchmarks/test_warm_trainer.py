from pathlib import Path

import pytest

from benchmarks import warm_trainer
from tests.benchmarks.samples import check, last_line
from tests.federation.tiny import config_of, save_model, save_task, table


def test_a_toy_run_ends_with_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = table(save_model(tmp_path / "model"), save_task(tmp_path / "words"))
    (tmp_path / "tiny.toml").write_text(config_of(content).to_toml())
    warm_trainer.main(["--config", str(tmp_path / "tiny.toml"), "--turns", "1"])
    result = last_line(capsys)
    check(result, "warm_trainer", {"reload_share", "start"})
    share = result["figures"]["reload_share"]
    assert 0 < share["ours"] < share["peer"]
