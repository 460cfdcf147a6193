"""The ledger: what has been released of a client's data, on that client's own disk, appended and never changed.

One JSON object a line. Each holds the SHA-256 of the line before it, so a line that is altered or taken out is noticed.
An entry is on the disk (fsync) before what it speaks of leaves the site: a process killed at any moment can have paid for
what nobody got, and never the other way round.

It adds up everything that a client's data was ever used for, run after run, since a record may be in all of it.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from fedsb.errors import LedgerError
from fedsb.privacy.accounting import Epsilon, Release, epsilon
from fedsb.store.files import append_line, read_file, writing

NAME = "ledger.jsonl"
FIRST = "0" * 64  # stands for the line before the first


@dataclass(frozen=True)
class Entry:
    """One release.

    Attributes:
        client: whose data.
        dataset, records: fingerprint and number of the training examples.
        run, config: name and digest of the run.
        round: 0 for the sketch of a basis.
        what: `sketch`, `train` or `train.personalise`.
        unit: `record` or `client`.
        noise_multiplier, sample_rate, steps: the mechanism, as accounting counts it.
        clip_norm: what the noise is relative to.
        answer: SHA-256 of the question that it answers; the same answer given again costs nothing.
        time: seconds since the epoch.
    """

    client: str
    dataset: str
    records: int
    run: str
    config: str
    round: int
    what: str
    unit: str
    noise_multiplier: float
    sample_rate: float
    steps: int
    clip_norm: float
    answer: str
    time: float

    @property
    def release(self) -> Release:
        """As accounting takes it."""
        return Release(self.noise_multiplier, self.sample_rate, self.steps)


ENTRY = TypeAdapter(Entry)


class Ledger:
    """The ledger of one client, in a file. Raises LedgerError if it is torn in its middle, altered, or another client's."""

    def __init__(self, path: Path, client: str) -> None:
        self.path, self.client = path, client
        self.entries()

    def entries(self) -> list[Entry]:
        """All entries, oldest first. A torn last line (its release never left) is passed over."""
        found, before = [], FIRST
        *lines, _torn = read_file(self.path).split(b"\n") if self.path.exists() else [b""]
        for number, line in enumerate(lines, 1):
            entry = self._entry(line, number, before)
            found.append(entry)
            before = hashlib.sha256(line).hexdigest()
        return found

    def add(self, entry: Entry) -> None:
        """Put an entry on the disk. When this returns, it is there, and what it speaks of may leave. Raises DiskError."""
        if entry.client != self.client:
            raise ValueError(f"an entry of {entry.client} in the ledger of {self.client}")
        self.entries()
        there = self.path.exists()
        append_line(self.path, json.dumps(asdict(entry) | {"before": self._last()}))
        with writing(self.path):
            for path in (self.path,) if there else (self.path, self.path.parent):
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Be the only one at this ledger: from the look at what is spent to the entry."""
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path.with_name(f".{self.path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _last(self) -> str:
        lines = read_file(self.path).split(b"\n")[:-1] if self.path.exists() else []
        return hashlib.sha256(lines[-1]).hexdigest() if lines else FIRST

    def _entry(self, line: bytes, number: int, before: str) -> Entry:
        try:
            content = json.loads(line)
            link = content.pop("before")
            entry = ENTRY.validate_python(content)
        except (ValueError, KeyError, AttributeError, TypeError, ValidationError):
            raise LedgerError(f"{self.path}: line {number} is no entry of a ledger; {RESTORE}") from None
        if link != before:
            raise LedgerError(f"{self.path}: line {number} does not follow from the one before it; {RESTORE}")
        if entry.client != self.client:
            raise LedgerError(f"{self.path}: line {number} is of the client {entry.client}, and this is {self.client}; {RESTORE}")
        return entry


RESTORE = "restore the file from a backup: without it nobody can say what was spent of this data, and nothing is released"


def spent(entries: Sequence[Entry], delta: float) -> Epsilon:
    """ε at `delta` of all entries together."""
    return epsilon([entry.release for entry in entries], delta)


def now() -> float:
    """The time of an entry."""
    return round(time.time(), 3)
