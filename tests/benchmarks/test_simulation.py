import os
import time

import pytest

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from benchmarks import simulation
from tests.benchmarks.samples import check, last_line


def test_a_toy_run_ends_with_its_figures(capsys: pytest.CaptureFixture[str]) -> None:
    simulation.main(["--only", "speedup", "--no-peer", "--clients", "5", "--rounds", "2"])
    result = last_line(capsys)
    check(result, "simulation", {"speedup"})
    assert result["figures"]["speedup"]["ours"] > 0


def test_the_peer_is_the_same_app_on_ray(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(simulation, "child", lambda *_: {"total": 100.0, "rounds": 90.0})
    simulation.main(["--only", "speedup", "--clients", "5", "--rounds", "2"])
    check(last_line(capsys), "simulation", {"speedup", "speedup_loop", "speedup_flower_loop"})


class Clockwork:
    def outer(self) -> None:
        time.sleep(0.02)
        self.inner()

    def inner(self) -> None:
        time.sleep(0.04)


def test_time_counts_for_the_innermost_function_and_watching_ends() -> None:
    shares = simulation.Shares()
    original = Clockwork.inner
    undo = [shares.watch(Clockwork, "outer", "outer"), shares.watch(Clockwork, "inner", "inner")]
    shares.start()
    started = time.perf_counter()
    Clockwork().outer()
    spent = shares.stop()
    wall = time.perf_counter() - started
    assert spent["inner"] >= 0.04
    assert spent["outer"] >= 0.02
    assert sum(spent.values()) == pytest.approx(wall, abs=0.01)
    for step in undo:
        step()
    assert Clockwork.inner is original
