"""The folder of a run: made new, or gone on with."""

from pathlib import Path

from fedsb.config import RunConfig
from fedsb.errors import CheckpointError, StoreError
from fedsb.store.files import read_file, write_file, writing

CONFIG = "config.toml"


def open_run(folder: Path, config: RunConfig, resume: bool) -> None:
    """Make a run's folder and write its configuration down.

    Raises:
        StoreError: something is there already and `resume` is not set, so nothing is overwritten.
        CheckpointError: `resume` with another configuration than the one the run began with.
    """
    path = folder / CONFIG
    if path.exists():
        if not resume:
            raise StoreError(f"{folder} holds a run already; add --resume to go on with it, or choose another --out")
        if load_run(folder).digest() != config.digest():
            raise CheckpointError(
                f"{path} is another configuration than the one given; resume with that one, or choose another --out"
            )
    elif folder.exists() and any(folder.iterdir()):
        raise StoreError(f"{folder} holds files that are no run; choose another --out")
    with writing(folder):
        (folder / "adapters").mkdir(parents=True, exist_ok=True)
    write_file(path, config.to_toml().encode())


def load_run(folder: Path) -> RunConfig:
    """The configuration of a run. Raises StoreError if the folder is none."""
    path = folder / CONFIG
    if not path.exists():
        raise StoreError(f"{folder} is not a run folder (it has no {CONFIG}); `fedsb simulate CONFIG` makes one")
    read_file(path)
    return RunConfig.load(path)
