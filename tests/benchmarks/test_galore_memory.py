"""GaLore's memory: of a toy run, and that what is counted is what lives."""

from pathlib import Path

import pytest

from benchmarks import galore_memory
from tests.benchmarks.samples import check, in_process, last_line
from tests.federation.tiny import save_model


def test_a_toy_run_ends_with_its_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(galore_memory, "child", in_process(galore_memory, capsys))
    model = save_model(tmp_path / "llama", width=64)
    told = ["--model", model, "--rank", "4", "--steps", "4", "--gap", "2", "--batch", "2", "--turns", "1", "--dtype", "fp32"]
    galore_memory.main(told)
    result = last_line(capsys)
    check(result, "galore_memory", {"memory", "peak", "loss", "time"})
    memory = result["figures"]["memory"]
    sizes = 2 * 64 * 18 + 5 * 64  # embedding, head and norms, which both train alike
    blocks = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)
    assert memory["peer"] == pytest.approx(4 * 3 * (sizes + blocks), rel=0.01), "a gradient and two moments of every number"
    assert memory["value"] < 0.5
