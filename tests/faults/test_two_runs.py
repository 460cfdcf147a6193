"""Two commands at once on one federation: they take turns where they write, and their runs do not disturb each other."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.harness import SECONDS, SITES, Federation, Run

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1200)]


def _at_once(*runs: Run) -> list[tuple[int, str]]:
    """Exit code and standard error of `fedsb run --detach`, all started together."""
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "fedsb.cli.main", "run", str(run.toml), "--home", str(run.federation.home.folder), "--detach"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for run in runs
    ]
    said = [process.communicate(timeout=SECONDS)[1] for process in started]
    return [(process.returncode, text) for process, text in zip(started, said, strict=True)]


def test_two_runs_started_at_once_both_end_right(federation: Federation, tmp_path: Path) -> None:
    """And a second one of the same name is told so, in one sentence."""
    one, other = federation.open("one"), federation.open("other")
    *same, third = _at_once(one, one, other)
    first, second = sorted(same)
    assert first == (0, "") and third == (0, "")
    assert second[0] == 2 and second[1].count("\n") == 1
    assert "one is still running" in second[1] or "holds a run already" in second[1]
    for run in (one, other):
        run.whole()
        assert run.heard() == {1: set(SITES), 2: set(SITES)}
        run.assert_equals_simulation(tmp_path / run.config.name)
    assert {"one", "other"} <= set(federation.home.started())
