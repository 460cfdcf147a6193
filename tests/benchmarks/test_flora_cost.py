import pytest

from benchmarks import flora_cost
from tests.benchmarks.samples import check, last_line


def test_a_toy_run_ends_with_its_figures(capsys: pytest.CaptureFixture[str]) -> None:
    flora_cost.main(["--widths", "16,32", "--ranks", "1,2", "--tokens", "1,3", "--rows", "4", "--turns", "1"])
    result = last_line(capsys)
    cells = {f"tokens_{tokens}_rank_{rank}_width_{width}" for tokens in (1, 3) for rank in (1, 2) for width in (16, 32)}
    check(result, "flora_cost", cells)
    for found in result["figures"].values():
        assert found["value"] == pytest.approx(found["ours"] / found["peer"], rel=1e-3) and found["rule"] > 0
