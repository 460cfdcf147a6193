"""`fedsb personalise`: a personal adapter for a client that comes after a run."""

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from clients import newcomer
from clients.session import Session, Site
from fedsb.adapters.attach import scale_of
from fedsb.adapters.head import linear_head
from fedsb.adapters.methods import METHODS
from fedsb.config import RunConfig
from fedsb.data.tasks import labels_of
from fedsb.errors import ConfigError, StoreError
from fedsb.report.table import evaluation_table
from fedsb.store import adapters, checkpoint
from fedsb.store.basis_files import load_basis
from fedsb.validation import validated
from server.run_folder import alone, load_run

FEW = 32  # examples up to which `auto` mixes what there is (docs/log.md, "A client that comes late")
TASK = "newcomer"  # of what this command publishes, by which it knows its own again


class How(str, Enum):
    """What is trained."""

    auto = "auto"
    fusion = "fusion"
    core = "core"
    scratch = "scratch"


def personalise(
    run: Annotated[Path, typer.Argument(help="folder of a finished run")],
    client: Annotated[str, typer.Option(help="the new client's name")],
    data: Annotated[str, typer.Option(help="its examples: a folder with train.jsonl and test.jsonl")],
    how: Annotated[
        How,
        typer.Option(
            help="fusion: mix the global and the personal cores of the run; core: go on from the global one; scratch: from "
            f"zero; auto: fusion up to {FEW} examples, core beyond"
        ),
    ] = How.auto,
    steps: Annotated[int, typer.Option(min=1, help="optimiser steps")] = 30,
) -> None:
    """Give a client that comes after a run an adapter of its own, publish it in the run's store, and score it."""
    scores, said = personalised(run, client, data, how, steps)
    print(said)
    Console(width=None if Console().is_terminal else 120).print(evaluation_table(scores, "test"))


def personalised(run: Path, client: str, data: str, how: How, steps: int) -> tuple[dict[str, dict[str, Any]], str]:
    """Train, score, publish: base | global | personal → client → {loss, exact_match, n, task}, and one sentence.

    Raises StoreError if the run is not finished or the client has an adapter of it, ConfigError for a run whose privacy this
    would break, or that has nothing to mix; then nothing is published.
    """
    told = load_run(run)
    if not (run / "summary.json").exists():
        raise StoreError(f"{run} is not finished; `fedsb simulate … --resume` goes on with it")
    with alone(run):
        return _personalised(run, told, client, data, how, steps)


def _personalised(
    run: Path, told: RunConfig, client: str, data: str, how: How, steps: int
) -> tuple[dict[str, dict[str, Any]], str]:
    last = checkpoint.latest(run, told.digest())
    assert last is not None  # of a finished run
    method, store = METHODS[told.adapter.method], run / "adapters"
    if told.privacy.unit != "none" or told.privacy.secure_sum:
        raise ConfigError(f"{run}: has privacy, and what a client trains here has none; train with privacy in a run of its own")
    if method.frames != ("B", "A") or method.heads:
        raise ConfigError(f"{run}: adapter.method = {told.adapter.method} has no single core; run one with lora-sb")
    stored = {name: adapters.load(store, name) for name in (adapters.clients(store) if store.is_dir() else [])}
    if client in told.client_names or (client in stored and stored[client].manifest.task != TASK):
        raise StoreError(f"{client} took part in {run}, which gave it an adapter; name a new client with --client")
    config = own_config(told, client, data)
    session, site = Session(config), Site(client, 0, run / "sites")
    checkpoint.check_model(last, session.identity, told.model.source)
    basis = load_basis(run, last.basis_fingerprint)
    session.use(basis)
    session.require_scores(site)  # now, so that nothing is trained where test examples cannot be read or scored
    shapes = dict(session.layout.shapes)
    pool = {newcomer.SHARED: last.state} | {
        name: each.state
        for name, each in stored.items()
        if name != client
        and each.manifest.basis_fingerprint == basis.fingerprint
        and {tensor: tuple(t.shape) for tensor, t in each.state.items()} == shapes
    }
    count = len(session.rows(site, "train"))
    chosen = how if how is not How.auto else (How.fusion if count <= FEW and len(pool) > 1 else How.core)
    if chosen is How.fusion and len(pool) < 2:
        raise ConfigError(f"{run}: its store holds no personal cores to mix; take --how core")
    vector, did = newcomer.personalised(session, site, pool, chosen.value, steps)
    found = {
        "base": session.score_base(site),
        "global": session.score(site, session.layout.flatten(last.state)),
        "personal": session.score(site, vector),
    }
    version = adapters.publish(
        store,
        client,
        session.layout.unflatten(vector),
        base_model=adapters.ModelId(name=config.model.source, sha256=session.source.sha256),
        method=config.adapter.method,
        rank=config.adapter.rank,
        basis_fingerprint=basis.fingerprint,
        scale=scale_of(config),
        round=last.round,
        task=TASK,
        kind=session.config.model.kind,
        standardised=linear_head(shapes) is not None,
    )
    scores = {which: {client: score.told(TASK)} for which, score in found.items()}
    return scores, f"{client}: version {version} from {count} examples, {did} → {store / client}"


def own_config(told: RunConfig, client: str, data: str) -> RunConfig:
    """The run's configuration for one client that holds its own data, and aggregates nothing."""
    table = told.model_dump(mode="json", exclude_none=True)
    own = {"partition": "own", "tasks": [{"name": TASK, "source": f"jsonl:{data}"}], "labels": list(labels_of(told))}
    table["data"] = {**table["data"], **own, "validation": 0.0}
    alone = {"clients": 1, "min_clients": 1, "names": [client], "fraction": 1.0, "over_sample": 1.0}
    table["federation"] = {**table["federation"], **alone}
    table["adapter"] = {**table["adapter"], "ranks": {}}
    table["evaluation"] = {**table["evaluation"], "split": "test"}
    return validated(RunConfig, {name: section for name, section in table.items() if name != "strategy"}, f"--client {client}")
