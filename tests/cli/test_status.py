"""The table of runs, whatever their events hold."""

from pathlib import Path
from typing import Any

import pytest

from fedsb.cli import run
from fedsb.deploy.home import Home
from fedsb.report.journal import Journal


class Server:
    """Flower's server, which knows of one run."""

    def __init__(self, home: Home) -> None:
        self.home = home

    def runs(self) -> dict[str, dict[str, Any]]:
        return {"7": {"status": "running"}}


class Nobody:
    """No screen."""

    def show(self, event: dict[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.mark.parametrize(("loss", "shown"), [(None, None), (1.23456, 1.2346)])
def test_a_run_with_and_without_a_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: float | None, shown: float | None
) -> None:
    """With privacy nobody tells a loss."""
    home = Home(tmp_path)
    home.write_started({"a": "7"})
    monkeypatch.setattr(run, "Flower", Server)
    journal = Journal(home.runs / "a" / "events.jsonl", Nobody())
    journal.tell("round", round=2, rounds=5, loss=loss, up=10, down=20)
    (row,) = run._runs(home)
    assert (row["loss"], row["round"], row["bytes_up"], row["status"]) == (shown, "2/5", 10, "running")
