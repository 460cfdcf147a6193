"""Processes killed with kill -9 while a run needs them: what is lost is done again, and the result is the same bits."""

import os
import re
import signal
from pathlib import Path

import psutil
import pytest

from tests.faults.harness import LONG, SECONDS, SITES, Federation, Run, kill, until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1200)]
EVERYBODY = {1: set(SITES), 2: set(SITES)}


def _assert_undisturbed(run: Run, scratch: Path) -> None:
    """Every reply of every round was counted once, nobody was refused, and the bits are those of a simulation."""
    summary = run.whole()
    assert summary["clients"] == len(SITES)
    assert run.heard() == {number: set(SITES) for number in range(1, run.config.federation.rounds + 1)}
    assert not run.events("refused") and not run.events("silent")
    run.assert_equals_simulation(scratch)


def test_a_trainer_killed_in_training_comes_back_and_answers(federation: Federation, scratch: Path) -> None:
    """The site's question is put to the new trainer, so nothing is missing from the round."""
    run = federation.start("trainer", train=LONG)
    with federation.in_training(run, 1, "alpha") as trainer:
        os.kill(trainer["alpha"], signal.SIGKILL)
    assert until(lambda: federation.pid("site-alpha-trainer") != trainer["alpha"], "a new trainer")
    _assert_undisturbed(run, scratch)


def test_a_server_killed_in_a_round_is_back_and_the_run_goes_on(federation: Federation, scratch: Path) -> None:
    """The SuperLink, while all sites train: it comes back with its database; the ServerApp, the sites and `fedsb run` wait."""
    run = federation.open("superlink", train=LONG)
    with federation.shown(run) as shown:
        with federation.in_training(run, 2, *SITES):
            before = federation.pid("superlink")
            os.kill(before, signal.SIGKILL)
            until(lambda: not psutil.pid_exists(before), "it is gone")
        assert federation.pid("superlink") != before
        _, said = shown.communicate(timeout=SECONDS)
    assert (shown.returncode, said) == (0, "")
    assert [event["round"] for event in run.events("round")] == [1, 2] and not run.events("resumed")
    _assert_undisturbed(run, scratch)


def test_a_serverapp_killed_while_it_writes_a_checkpoint(federation: Federation, scratch: Path) -> None:
    """kill -9 while the staged folder is there and not yet in place; then once more between two rounds."""
    run = federation.start("serverapp", federation={"rounds": 3})
    folder = run.folder / "checkpoints"
    run.wait("round", round=1)
    server = run.server()
    staged = re.compile(r"\.round-\d+\..*\.tmp")

    def caught() -> bool:
        """Stop the process whenever it writes; it goes on if it was done by then."""
        if not any(staged.fullmatch(name) for name in os.listdir(folder)):
            return False
        server.suspend()
        if any(staged.fullmatch(name) for name in os.listdir(folder)):
            return True
        server.resume()
        return False

    until(caught, "a checkpoint is being written", poll=0.0002)
    kill(server)
    done = len([name for name in os.listdir(folder) if not name.startswith(".")])
    assert any(staged.fullmatch(name) for name in os.listdir(folder))
    federation.fedsb("resume", "serverapp", "--detach")
    run.wait("round", round=done + 1)
    kill(run.server())
    assert "its ServerApp is gone; stopped" in federation.fedsb("resume", "serverapp").stderr
    assert [event["round"] for event in run.events("resumed")] == [done, done + 1]
    assert [event["round"] for event in run.events("round")] == [1, 2, 3]
    _assert_undisturbed(run, scratch)


def test_a_run_that_is_stopped_goes_on_from_its_last_round(federation: Federation, scratch: Path) -> None:
    run = federation.start("stopped", federation={"rounds": 3})
    run.wait("round", round=1)
    refused = federation.fedsb("resume", "stopped", check=False)
    assert refused.returncode == 2 and "stopped is still running" in refused.stderr
    federation.fedsb("stop", "stopped")
    assert not (run.folder / "summary.json").exists()
    federation.fedsb("resume", "stopped")
    assert run.events("resumed")[0]["round"] in (1, 2)
    assert [event["round"] for event in run.events("round")] == [1, 2, 3]
    run.assert_equals_simulation(scratch)
    assert run.whole()["clients"] == len(SITES)
