"""`fedsb evaluate`: score a finished run again, from what lies on disk."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor

from clients import own
from clients.session import Session, Site
from fedsb.adapters.attach import scale_of, shapes_of
from fedsb.adapters.head import linear_head
from fedsb.basis.frames import Basis
from fedsb.errors import StoreError
from fedsb.report.table import evaluation_table, languages_table
from fedsb.serving.bank import Bank
from fedsb.serving.evaluator import Score, Trial, evaluate_all
from fedsb.serving.forms import form_of
from fedsb.serving.mixed import mix
from fedsb.store import adapters, checkpoint
from fedsb.store.basis_files import load_basis
from server.run_folder import load_run


def evaluate(
    run: Annotated[Path, typer.Argument(help="folder of a run")],
    json_: Annotated[bool, typer.Option("--json", help="print one JSON object instead of a table")] = False,
    sequential: Annotated[bool, typer.Option("--sequential", help="one adapter at a time, and not all in mixed batches")] = False,
) -> None:
    """Score base, global and personal adapters of a run on each client's own test set, all of them in the same batches."""
    found = evaluated(run, sequential=sequential)
    if json_:
        print(json.dumps(found.scores))
        return
    console = Console(width=None if Console().is_terminal else 120)
    console.print(evaluation_table(found.scores, load_run(run).evaluation.split))
    if languages := languages_table(found.scores):
        console.print(languages)
    console.print(f"{found.rows} rows, {found.rows / found.seconds:.4g} a second, {found.how}", highlight=False)


@dataclass(frozen=True)
class Evaluated:
    """scores: base | global | personal → client → {loss, exact_match, n, task}, of recordings wer, of these and of programs
    `languages`; rows that were scored, the seconds that this took, and how."""

    scores: dict[str, dict[str, dict[str, Any]]]
    rows: int
    seconds: float
    how: str


def evaluate_run(run: Path, *, sequential: bool = False) -> dict[str, dict[str, dict[str, Any]]]:
    """The scores of `evaluated`."""
    return evaluated(run, sequential=sequential).scores


def evaluated(run: Path, *, sequential: bool = False) -> Evaluated:
    """Score a run; in mixed batches, if its method can be (`fedsb.serving.bank.form_of`) and `sequential` says nothing else.

    Raises StoreError if the run has no checkpoint, or its clients hold their data at other places.
    """
    config = load_run(run)
    last = checkpoint.latest(run, config.digest())
    if last is None:
        raise StoreError(f"{run} has no finished round yet; `fedsb simulate … --resume` goes on with it")
    if config.data.partition == "own" and not (run / "sites").exists():
        raise StoreError(f"{run}: its sites hold their data themselves; the scores that they gave are in its summary.json")
    session = Session(config)
    if session.kept and not (run / "sites").exists():
        raise StoreError(
            f"{run}: with adapter.method = {config.adapter.method} its sites keep parts of the model themselves; the scores that "
            "they gave are in its summary.json"
        )
    checkpoint.check_model(last, session.identity, config.model.source)
    basis = load_basis(run, last.basis_fingerprint)
    session.use(basis)
    vectors = _vectors(run, session, last)
    if sequential:
        return _one_by_one(session, vectors, "one adapter at a time")
    if form_of(config.adapter.method) is None:
        return _one_by_one(session, vectors, f"one adapter at a time, since {config.adapter.method} has no batched form")
    return _together(session, vectors, basis)


Vectors = list[tuple[str, Site, Tensor]]  # base | global | personal, of whom, and the whole state


def _vectors(run: Path, session: Session, last: checkpoint.Checkpoint) -> Vectors:
    blank = torch.zeros(session.layout.size)
    everything = session.layout.flatten(session.layout.unflatten(blank) | last.state)
    stored = set(adapters.clients(run / "adapters"))
    found: Vectors = []
    for index, name in enumerate(session.config.client_names):
        site = Site(name, index, run / "sites")
        share, published = session.received(site, last.round + 1).take(everything), session.published(site)
        found += [("base", site, session.base_vector()), ("global", site, own.whole(session, site, share, last.round + 1))]
        if name in stored:
            mine = adapters.load(run / "adapters", name)
            if mine.manifest.basis_fingerprint != last.basis_fingerprint:
                raise StoreError(f"{run}/adapters/{name}: is of another basis than the run; publish it again")
            found.append(("personal", site, published.put(published.layout.flatten(mine.state), blank)))
    return found


def _one_by_one(session: Session, vectors: Vectors, how: str) -> Evaluated:
    for _, site, _ in vectors:
        session.rows(site, session.config.evaluation.split)  # before the clock starts
    started = time.monotonic()
    scores = [session.score_base(site) if which == "base" else session.score(site, vector) for which, site, vector in vectors]
    return _told(session, vectors, scores, time.monotonic() - started, how)


def _together(session: Session, vectors: Vectors, basis: Basis) -> Evaluated:
    config = session.config
    bank = Bank(len(vectors) + 1, device=session.device)
    headed = config.model.kind == "classification"
    places = [
        bank.add(_adapter(session, vector, basis), basis) if which != "base" or headed else None for which, _, vector in vectors
    ]
    split, section = config.evaluation.split, config.evaluation
    trials = [
        Trial(session.examples(site, split), session.rows(site, split), place)
        for (_, site, _), place in zip(vectors, places, strict=True)
    ]
    started = time.monotonic()
    scores = evaluate_all(
        mix(session.transformer, bank),
        trials,
        bank,
        kind=config.model.kind,
        tokenizer=session.tokenizer,
        device=session.device,
        batch_size=section.batch_size,
        max_new_tokens=section.max_new_tokens,
    )
    return _told(session, vectors, scores, time.monotonic() - started, f"{len(vectors)} adapters in mixed batches")


def _adapter(session: Session, vector: Tensor, basis: Basis) -> adapters.StoredAdapter:
    """A state as the store would give it."""
    config, state = session.config, session.layout.unflatten(vector)
    manifest = adapters.Manifest(
        client="here",
        version=0,
        base_model=adapters.ModelId(name=session.source.name, sha256=session.source.sha256),
        method=config.adapter.method,
        rank=config.adapter.rank,
        scale=scale_of(config),
        basis_fingerprint=basis.fingerprint,
        shapes={name: tuple(tensor.shape) for name, tensor in state.items()},
        dtypes={},
        sha256="",
        round=0,
        task="",
        created="",
        seed=config.seed,
        sides=shapes_of(session.model),
        standardised=linear_head(state) is not None,
    )
    stored = adapters.StoredAdapter(state, manifest)
    features = session.model.standardised_by
    return stored if features is None else stored.plain(features)


def _told(session: Session, vectors: Vectors, scores: Sequence[Score], seconds: float, how: str) -> Evaluated:
    found: dict[str, dict[str, dict[str, Any]]] = {"base": {}, "global": {}, "personal": {}}
    for (which, site, _), score in zip(vectors, scores, strict=True):
        found[which][site.name] = score.told(session.task_of(site))
    return Evaluated(found, sum(score.n for score in scores), seconds, how)
