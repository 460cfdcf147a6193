import pytest

from benchmarks import basis
from tests.benchmarks.samples import check, in_process, last_line


def test_a_toy_run_ends_with_its_figures(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(basis, "child", in_process(basis, capsys))
    basis.main(["--model", "tiny", "--rank", "8", "--tokens", "12", "--labels", "4", "--turns", "1"])
    check(last_line(capsys), "basis", {*basis.SOURCES, "estimate_steps", "estimate_memory"})
