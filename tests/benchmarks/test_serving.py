"""The benchmark of serving on a toy: every figure is there, and is the ratio that it says it is."""

import pytest

from benchmarks import serving
from tests.benchmarks.samples import check, last_line

KEYS = {"against_peft", "of_base_r16", "of_base_r64", "flat_1000", "gib_10000", "load_ms", "load_packed_ms"}


def test_a_toy_run_ends_with_its_figures(capsys: pytest.CaptureFixture[str]) -> None:
    serving.main(["--layers", "1", "--vocabulary", "64", "--turns", "1", "--tenants", "20", "--loads", "3"])
    result = last_line(capsys)
    check(result, "serving", KEYS)
    for key in KEYS - {"gib_10000", "load_ms", "load_packed_ms"}:
        found = result["figures"][key]
        assert found["value"] == pytest.approx(found["ours"] / found["peer"], rel=1e-3)
    assert result["figures"]["load_ms"]["value"] > result["figures"]["load_packed_ms"]["value"] > 0
