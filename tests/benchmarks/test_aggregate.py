import pytest

from benchmarks import aggregate
from tests.benchmarks.samples import check, in_process, last_line


def test_a_toy_run_ends_with_its_figures(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(aggregate, "child", in_process(aggregate, capsys))
    aggregate.main(["--updates", "20", "--size", "5000", "--pool", "100000", "--stream", "100000", "--turns", "2"])
    keys = {"memory_growth", "memory_growth_net", "bandwidth_share", "bandwidth_share_read"}
    check(last_line(capsys), "aggregate", keys)
