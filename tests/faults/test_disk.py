"""A disk that is full when a checkpoint is to be written: a small one of its own, in memory, under the runs' folder."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.harness import SECONDS, SITES, Federation

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1200)]
PAGE = 4096
ROOM = 2 * PAGE  # enough for a dozen events, and not for a state of four pages


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A file system of 1 MB over a folder. Needs root, as the processes of CI have it."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(ballast: Path) -> None:
    """Leave no more than ROOM on a disk."""
    with ballast.open("wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while file.write(b"\0" * PAGE) == PAGE:
                pass
        file.truncate(file.tell() // PAGE * PAGE - ROOM)


def test_disk_full_while_a_checkpoint_is_written(federation: Federation, scratch: Path) -> None:
    with small_disk(federation.home.runs):
        run = federation.open("full", adapter={"rank": 16}, federation={"rounds": 3})
        ballast = federation.home.runs / "ballast"
        with federation.shown(run) as shown:
            run.wait("round", round=1)
            fill(ballast)
            _, said = shown.communicate(timeout=SECONDS)
        assert shown.returncode == 2 and said.count("\n") == 1
        assert "No space left on device" in said and "free some space on that disk" in said and "fedsb resume full" in said
        done = len(list((run.folder / "checkpoints").glob("round-*")))
        ballast.unlink()
        federation.fedsb("resume", "full")
        assert [event["round"] for event in run.events("resumed")] == [done]
        assert run.whole()["clients"] == len(SITES)
        assert [event["round"] for event in run.events("round")] == [1, 2, 3]
        run.assert_equals_simulation(scratch)
