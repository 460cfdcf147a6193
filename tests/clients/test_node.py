"""The SuperNode's wait between two questions for work: Flower's, which has no setting for it, replaced."""

import inspect
import re
import time

import pytest
from flwr.supernode import start_client_internal

from clients import node


def test_flower_sleeps_as_it_did_when_this_was_written() -> None:
    """In that module `time` is used for these sleeps alone; another version of Flower must be looked at."""
    used = re.findall(r"(?<![\w.])time\.\w+\([^)]*\)", inspect.getsource(start_client_internal))
    assert set(used) == {f"time.sleep({node.FLOWER_SECONDS})", "time.sleep(0.5)"}


def test_work_is_asked_for_as_often_as_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start_client_internal, "time", time)
    node.poll_every(0.05)
    started = time.monotonic()
    start_client_internal.time.sleep(node.FLOWER_SECONDS)
    assert 0.05 <= time.monotonic() - started < 1
    start_client_internal.time.sleep(0.5)
    assert time.monotonic() - started > 0.5
