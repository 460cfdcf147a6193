"""`fedsb evaluate`: score a finished run again, from what lies on disk."""

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from clients import own
from clients.session import Session, Site
from fedsb.errors import StoreError
from fedsb.report.table import evaluation_table, languages_table
from fedsb.store import adapters, checkpoint
from fedsb.store.basis_files import load_basis
from server.run_folder import load_run


def evaluate(
    run: Annotated[Path, typer.Argument(help="folder of a run")],
    json_: Annotated[bool, typer.Option("--json", help="print one JSON object instead of a table")] = False,
) -> None:
    """Score base, global and personal adapters of a run on each client's own test set."""
    scores = evaluate_run(run)
    if json_:
        print(json.dumps(scores))
    else:
        console = Console(width=None if Console().is_terminal else 120)
        console.print(evaluation_table(scores, load_run(run).evaluation.split))
        if languages := languages_table(scores):
            console.print(languages)


def evaluate_run(run: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """base | global | personal → client → {loss, exact_match, n, task}, and of programs `languages`: language → [passed, of].

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
    blank = torch.zeros(session.layout.size)
    everything = session.layout.flatten(session.layout.unflatten(blank) | last.state)
    stored = set(adapters.clients(run / "adapters"))
    scores: dict[str, dict[str, dict[str, Any]]] = {"base": {}, "global": {}, "personal": {}}
    for index, name in enumerate(config.client_names):
        site = Site(name, index, run / "sites")
        share, published = session.received(site, last.round + 1).take(everything), session.published(site)
        vectors = {"global": own.whole(session, site, share, last.round + 1)}
        if name in stored:
            mine = adapters.load(run / "adapters", name)
            if mine.manifest.basis_fingerprint != basis.fingerprint:
                raise StoreError(f"{run}/adapters/{name}: is of another basis than the run; publish it again")
            vectors["personal"] = published.put(published.layout.flatten(mine.state), blank)
        found = {"base": session.score_base(site)} | {which: session.score(site, vector) for which, vector in vectors.items()}
        for which, score in found.items():
            scores[which][name] = score.told(session.task_of(site))
    return scores
