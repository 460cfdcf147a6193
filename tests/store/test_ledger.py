"""The ledger: what it holds survives kill -9, and what was altered is noticed."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedsb.errors import LedgerError
from fedsb.privacy.accounting import Release, epsilon
from fedsb.store.ledger import Entry, Ledger, now, spent

ENTRY = Entry(
    client="alpha",
    dataset="d" * 64,
    records=1000,
    run="one",
    config="c" * 64,
    round=1,
    what="train",
    unit="record",
    noise_multiplier=1.0,
    sample_rate=0.01,
    steps=100,
    clip_norm=0.5,
    answer="a" * 64,
    time=1.5,
)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "alpha" / "ledger.jsonl", "alpha")


def test_entries_are_read_back_in_order(ledger: Ledger) -> None:
    assert ledger.entries() == [] and not ledger.path.exists()
    entries = [dataclasses.replace(ENTRY, round=number) for number in (1, 2, 3)]
    for entry in entries:
        ledger.add(entry)
    assert ledger.entries() == entries == Ledger(ledger.path, "alpha").entries()
    assert abs(now() - time.time()) < 1


def test_what_is_spent_adds_up_over_runs_and_data_sets(ledger: Ledger) -> None:
    for run, dataset in (("one", "d"), ("two", "e")):
        ledger.add(dataclasses.replace(ENTRY, run=run, dataset=dataset * 64))
    assert spent(ledger.entries(), 1e-5) == epsilon([Release(1.0, 0.01, 200)], 1e-5)
    assert spent([], 1e-5).best == 0


def test_a_torn_last_line_is_no_entry_and_the_next_one_stands(ledger: Ledger) -> None:
    """Its release never left: an entry is on the disk before that."""
    ledger.add(ENTRY)
    with ledger.path.open("ab") as file:
        file.write(b'{"client": "al')
    assert ledger.entries() == [ENTRY]
    ledger.add(ENTRY)
    assert ledger.entries() == [ENTRY, ENTRY]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda lines: [lines[0].replace(b'"steps": 100', b'"steps": 1'), *lines[1:]], "line 2 does not follow"),
        (lambda lines: lines[1:], "line 1 does not follow"),
        (lambda lines: [lines[0], lines[2]], "line 2 does not follow"),
        (lambda lines: [lines[0], b"{}", lines[2]], "line 2 is no entry"),
        (lambda lines: [b"not JSON", *lines[1:]], "line 1 is no entry"),
        (lambda lines: [lines[0], b"[]", lines[2]], "line 2 is no entry"),
        (lambda lines: [lines[0].replace(b'"round": 1', b'"round": "1"'), *lines[1:]], "does not follow|no entry"),
    ],
)
def test_what_was_altered_is_noticed(ledger: Ledger, change: object, said: str) -> None:
    for number in (1, 2, 3):
        ledger.add(dataclasses.replace(ENTRY, round=number))
    lines = ledger.path.read_bytes().splitlines()
    ledger.path.write_bytes(b"".join(line + b"\n" for line in change(lines)))  # type: ignore[operator]
    with pytest.raises(LedgerError, match=said):
        Ledger(ledger.path, "alpha")
    with pytest.raises(LedgerError, match="restore the file from a backup"):
        ledger.add(ENTRY)


def test_a_ledger_of_another_client_is_refused(ledger: Ledger) -> None:
    ledger.add(ENTRY)
    with pytest.raises(LedgerError, match="line 1 is of the client alpha, and this is beta"):
        Ledger(ledger.path, "beta")
    with pytest.raises(ValueError, match="beta in the ledger of alpha"):
        ledger.add(dataclasses.replace(ENTRY, client="beta"))


KILLED = """
import dataclasses, sys
from pathlib import Path
from tests.store.test_ledger import ENTRY
from fedsb.store.ledger import Ledger
ledger, released = Ledger(Path(sys.argv[1]), "alpha"), open(sys.argv[2], "ab", buffering=0)
for number in range(1, 10**6):
    with ledger.turn():
        ledger.add(dataclasses.replace(ENTRY, round=number))
    released.write(b"%d\\n" % number)
"""


@pytest.mark.parametrize("seconds", [0.01, 0.05, 0.13])
def test_kill_9_at_any_moment_leaves_at_least_what_was_released(tmp_path: Path, seconds: float) -> None:
    path, released = tmp_path / "ledger.jsonl", tmp_path / "released"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(path), str(released)], cwd=Path(__file__).parents[2])
    try:
        while not released.exists() or not released.stat().st_size:
            time.sleep(0.005)
        time.sleep(seconds)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    left = len(released.read_bytes().split(b"\n")) - 1
    entries = Ledger(path, "alpha").entries()
    assert [entry.round for entry in entries] == list(range(1, len(entries) + 1))
    assert left <= len(entries) <= left + 1


def test_one_at_a_time_looks_and_pays(ledger: Ledger) -> None:
    """Who waits for its turn sees what the one before it has paid."""
    script = "import sys, time\nfrom pathlib import Path\nfrom fedsb.store.ledger import Ledger\n"
    script += "with Ledger(Path(sys.argv[1]), 'alpha').turn():\n    print('in', flush=True)\n    time.sleep(0.5)\n"
    with subprocess.Popen([sys.executable, "-c", script, str(ledger.path)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"in\n"
        started = time.monotonic()
        with ledger.turn():
            assert time.monotonic() - started > 0.2


def test_an_entry_is_one_line_of_plain_numbers(ledger: Ledger) -> None:
    ledger.add(ENTRY)
    content = json.loads(ledger.path.read_text())
    assert content == dataclasses.asdict(ENTRY) | {"before": "0" * 64}
    assert math.isfinite(content["time"])
