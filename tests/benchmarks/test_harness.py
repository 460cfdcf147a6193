import pytest
import torch

from benchmarks import harness


def test_the_peak_is_that_of_what_ran_within() -> None:
    before = torch.ones(64 << 20, dtype=torch.uint8)
    del before
    with harness.Peak() as peak:
        within = torch.ones(32 << 20, dtype=torch.uint8)
        del within
    assert 28 << 20 <= peak.growth <= 48 << 20


def test_runs_alternate_after_a_warm_up() -> None:
    calls: list[str] = []

    def run(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    results = harness.in_turns({"ours": lambda: run("ours"), "peer": lambda: run("peer")}, 2)
    assert calls == ["ours", "peer"] * 3
    assert results == {"ours": [3.0, 5.0], "peer": [4.0, 6.0]}


def test_a_child_that_fails_stops_the_benchmark() -> None:
    with pytest.raises(SystemExit, match="exit code"):
        harness.child("benchmarks.no_such_module")


def test_a_cache_is_known() -> None:
    assert harness.last_level_cache() > 0
