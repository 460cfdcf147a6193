"""A round on disk: `<run>/checkpoints/round-0007/` with `state.safetensors` and `round.json`, and `memory.safetensors` where
the strategy remembers something."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from fedsb.errors import CheckpointError, StoreError
from fedsb.store.files import clean_leftovers, read_json, sha256_of, staged_folder, write_json
from fedsb.store.tensors import load_tensors, save_tensors

STATE, MEMORY, ROUND = "state.safetensors", "memory.safetensors", "round.json"
FOLDER = re.compile(r"round-(\d{4,})")


@dataclass(frozen=True)
class Checkpoint:
    """The server after a round, enough to go on from.

    Attributes:
        round: the number of the last finished round, from 1.
        state: the aggregated state: cores (r, r) under `<layer>.core`, head parameters under `head.<module path>.…`.
        config_digest: `RunConfig.digest()` of the run.
        basis_fingerprint: of the basis on which the cores were trained.
        model_sha256: of the base model under them.
        progress: running totals that JSON can hold (bytes so far, history, …).
        memory: what the strategy remembers from round to round, by name.
    """

    round: int
    state: dict[str, Tensor]
    config_digest: str
    basis_fingerprint: str
    model_sha256: str
    progress: dict[str, Any]
    memory: dict[str, Tensor] = field(default_factory=dict)


class _Record(BaseModel):
    """`round.json`."""

    model_config = ConfigDict(frozen=True, strict=True)

    round: int
    config_digest: str
    basis_fingerprint: str
    model_sha256: str
    state_sha256: str
    memory_sha256: str | None = None
    progress: dict[str, Any]


def save(run: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint atomically and return its folder; leftovers of killed processes are cleaned away.

    Raises DiskError; then the checkpoints before are untouched.
    """
    folder = run / "checkpoints" / f"round-{checkpoint.round:04d}"
    clean_leftovers(folder.parent)
    with staged_folder(folder) as staged:
        save_tensors(staged / STATE, checkpoint.state)
        if checkpoint.memory:
            save_tensors(staged / MEMORY, checkpoint.memory)
        record = _Record(
            round=checkpoint.round,
            config_digest=checkpoint.config_digest,
            basis_fingerprint=checkpoint.basis_fingerprint,
            model_sha256=checkpoint.model_sha256,
            state_sha256=sha256_of(staged / STATE),
            memory_sha256=sha256_of(staged / MEMORY) if checkpoint.memory else None,
            progress=checkpoint.progress,
        )
        write_json(staged / ROUND, dict(record))
    return folder


def latest(run: Path, config_digest: str) -> Checkpoint | None:
    """The newest checkpoint of a run, or None if it has none.

    Raises CheckpointError if that one is torn, or belongs to another configuration; it never falls back silently to an
    older round.
    """
    rounds = _rounds(run / "checkpoints")
    return _load(rounds[max(rounds)], max(rounds), config_digest) if rounds else None


def check_model(checkpoint: Checkpoint, sha256: str, source: str) -> None:
    """Raise CheckpointError if the base model is not the one that the cores were trained on."""
    if checkpoint.model_sha256 != sha256:
        raise CheckpointError(
            f"model.source = {source}: its weights (or its encoder's; SHA-256 {sha256[:12]}) are not those that this run was "
            f"trained on ({checkpoint.model_sha256[:12]}); restore them, or start anew with another --out"
        )


def _rounds(folder: Path) -> dict[int, Path]:
    if not folder.is_dir():
        return {}
    matches = ((FOLDER.fullmatch(path.name), path) for path in folder.iterdir())
    return {int(match[1]): path for match, path in matches if match}


def _load(folder: Path, number: int, config_digest: str) -> Checkpoint:
    try:
        record = _Record.model_validate(read_json(folder / ROUND))
    except (StoreError, ValidationError):
        raise _torn(folder / ROUND) from None
    if record.config_digest != config_digest:
        raise CheckpointError(
            f"{folder}: belongs to another configuration ({record.config_digest[:12]}, now {config_digest[:12]}); "
            f"resume with the original {folder.parent.parent / 'config.toml'}, or start anew with another --out"
        )
    if record.round != number:
        raise _torn(folder / ROUND)
    state = _tensors(folder / STATE, record.state_sha256)
    memory = _tensors(folder / MEMORY, record.memory_sha256) if record.memory_sha256 else {}
    return Checkpoint(number, state, record.config_digest, record.basis_fingerprint, record.model_sha256, record.progress, memory)


def _tensors(file: Path, sha256: str) -> dict[str, Tensor]:
    try:
        if sha256_of(file) == sha256:
            return load_tensors(file)[0]
    except StoreError:
        pass
    raise _torn(file)


def _torn(file: Path) -> CheckpointError:
    return CheckpointError(
        f"{file}: is missing, torn, or not what was saved; delete the folder {file.parent} to resume from the round before"
    )
