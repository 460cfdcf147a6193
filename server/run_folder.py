"""The folder of a run: made new, or gone on with."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from fedsb.config import RunConfig
from fedsb.errors import CheckpointError, FederationError, FedsbError, StoreError
from fedsb.store.files import STAGED, clean_leftovers, read_file, write_file, writing

CONFIG = "config.toml"


@contextlib.contextmanager
def run_folder(folder: Path, config: RunConfig, resume: bool) -> Iterator[None]:
    """Open a run's folder (`open_run`) for what happens inside.

    A run that turns out to be impossible (a model that is not there, a row that cannot be read, a full disk) before its
    first checkpoint leaves nothing behind, so that the same command works once that is mended. A FederationError leaves
    the folder: its events.jsonl tells which clients failed, and `--resume` goes on.
    """
    there = folder.exists()
    with contextlib.ExitStack() as stack:
        if folder.is_dir():
            stack.enter_context(alone(folder))
        new = open_run(folder, config, resume)
        if not there:
            stack.enter_context(alone(folder))
        try:
            yield
        except FederationError:
            raise
        except FedsbError:
            if new and not any(folder.glob("checkpoints/round-*")):
                _remove(folder, keep=there)
            raise


def at_work(folder: Path) -> bool:
    """Whether a process is at work on the run in a folder."""
    try:
        with alone(folder):
            return False
    except StoreError:
        return True


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Be the only process at work on a run, for as long as this process lives. Raises StoreError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise StoreError(f"{folder}: another process is at work on this run; let it end, or stop it first") from None
    finally:
        os.close(descriptor)


def open_run(folder: Path, config: RunConfig, resume: bool) -> bool:
    """Make a run's folder and write its configuration down; returns whether the run is a new one.

    Raises:
        StoreError: something is there already and `resume` is not set, so nothing is overwritten.
        CheckpointError: `resume` with another configuration than the one the run began with.
        DiskError: the folder cannot be made; then nothing of it is left.
    """
    path = folder / CONFIG
    new = not path.exists()
    if not new and not resume:
        raise StoreError(f"{folder} holds a run already; add --resume to go on with it, or choose another --out")
    if not new and load_run(folder).digest() != config.digest():
        raise CheckpointError(
            f"{path} is another configuration than the one given; resume with that one, or choose another --out"
        )
    if folder.exists() and not folder.is_dir():
        raise StoreError(f"{folder} is a file; choose another --out")
    there = folder.exists()
    if new and there and any(not entry.name.endswith(STAGED) for entry in folder.iterdir()):
        raise StoreError(f"{folder} holds files that are no run; choose another --out")
    try:
        write_file(path, config.to_toml().encode())
        with writing(folder):
            (folder / "adapters").mkdir(exist_ok=True)
    except FedsbError:
        if new:
            _remove(folder, keep=there)
        raise
    clean_leftovers(folder)
    return new


def load_run(folder: Path) -> RunConfig:
    """The configuration of a run. Raises StoreError if the folder is none."""
    path = folder / CONFIG
    if not path.exists():
        raise StoreError(f"{folder} is not a run folder (it has no {CONFIG}); `fedsb simulate CONFIG` makes one")
    read_file(path)
    return RunConfig.load(path)


def _remove(folder: Path, *, keep: bool) -> None:
    """Remove a run's files, and the folder itself unless it was there before."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink(missing_ok=True)
    if not keep:
        with contextlib.suppress(OSError):
            folder.rmdir()
