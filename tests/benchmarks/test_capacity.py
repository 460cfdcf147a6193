"""A SuperLink with a few no-op sites: they join, poll, and answer every message of a run."""

import pytest

from benchmarks import capacity
from tests.benchmarks.samples import check, last_line


@pytest.mark.apart
@pytest.mark.timeout(600)
def test_a_few_sites_join_and_answer_every_message(capsys: pytest.CaptureFixture[str]) -> None:
    capacity.main(["--sites", "2,3", "--small", "3", "--large", "2", "--idle", "4", "--rounds", "2"])
    result = last_line(capsys)
    check(result, "capacity", {"idle_2", "large_2", "idle_3", "round_3", "polls", "idle_limit"})
    figures = result["figures"]
    for name, sites, numbers in (("round_3", 3, 2_500), ("large_2", 2, 860_160)):
        found = figures[name]
        assert (found["sites"], found["answered"], found["failed"]) == (sites, sites, 0)
        assert found["state_bytes"] == 4 * numbers and len(found["seconds"]) == 2
        assert found["cpu"] > 0
    pause = capacity.POLL_SECONDS
    assert 0 < figures["idle_3"]["polls_per_second"] <= 2 * 3 / pause
    assert figures["polls"]["value"] > figures["idle_3"]["polls_per_second"]
    assert figures["idle_limit"]["value"] == pytest.approx(pause / figures["polls"]["cpu"], rel=1e-3)
