"""What comes after the last round: each client's own adapter, and everybody's scores. Called by `server/app.py`."""

import time
from collections.abc import Sequence
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord

from fedsb.adapters.attach import scale_of
from fedsb.adapters.head import linear_head
from fedsb.adapters.methods import METHODS
from fedsb.errors import ReplyError
from fedsb.store import adapters
from fedsb.store.files import read_events
from server.federation import Federation
from strategies.fedsb import FedSB
from strategies.records import KEPT, LOSS, METRICS, PERSONALISE, SECONDS, WHICH, Identity, bytes_of, metric
from strategies.rounds import Exchange, Traffic


def personalise(run: Federation, strategy: FedSB, state: ArrayRecord) -> None:
    """Step 3: every client that has not yet published from this state goes on alone; its core enters the store."""
    rounds, store = run.config.federation.rounds, run.folder / "adapters"
    published = adapters.clients(store)
    for moved in _personal_traffic(run, published):
        run.traffic.add(moved)
    missing = {node: name for node, name in run.roster.items() if name not in published}
    if not missing:
        return
    started = time.monotonic()
    run.journal.tell("stage", title="personalising", clients=len(missing))
    exchange = Exchange(run.grid, run.config.federation.round_seconds)
    order = strategy.order(rounds)
    messages = {
        name: strategy.question(node, PERSONALISE, order, strategy.sent_to(name, state, rounds + 1))
        for name, node in sorted((n, i) for i, n in missing.items())
    }
    beyond: dict[str, Any] = {}
    if METHODS[run.config.adapter.method].expand:
        beyond = {"seed": run.config.seed, "sides": run.shapes}
    if run.encoder is not None:
        beyond = {"encoder": adapters.ModelId(name=run.encoder.name, sha256=run.encoder.sha256)}
    strategy.expect_personal(state, run.trained)
    for client, reply in strategy.accepted(rounds, exchange(messages.values())):
        try:
            seconds = {} if strategy.private else {"seconds": metric(reply, SECONDS)}
            loss = {"loss": metric(reply, LOSS)} if run.config.personal.steps and not strategy.private else {}
            kept = KEPT in (reply.content.get(METRICS) or {})
            personal = None if kept else strategy.usable(client, reply)[0]
        except ReplyError as error:
            strategy.refuse(rounds, client, error)
            continue
        if personal is None:  # the site's policy
            run.journal.tell("kept", round=rounds, client=client, **loss, **seconds)
            continue
        share = strategy.returned(client)
        up, down = bytes_of(reply), bytes_of(messages[client])  # read back by _personal_traffic
        run.journal.tell("personal", round=rounds, client=client, **loss, **seconds, up=up, down=down)
        adapters.publish(
            store,
            client,
            share.layout.unflatten(share.take(personal)),
            base_model=adapters.ModelId(name=run.source.name, sha256=run.source.sha256),
            method=run.config.adapter.method,
            rank=run.config.rank_of(client),
            basis_fingerprint=strategy.basis,
            scale=scale_of(run.config),
            round=rounds,
            task=Identity.of(reply).task,
            **beyond,
            kind=run.config.model.kind,
            standardised=linear_head(name for name, _ in run.trained.shapes) is not None,
        )
    run.traffic.add(exchange.traffic)
    run.name_nodes("silent", rounds, exchange.silent)
    run.journal.tell(
        "personalised",
        clients=len(adapters.clients(store)),
        up=exchange.traffic.up,
        down=exchange.traffic.down,
        seconds=round(time.monotonic() - started, 3),
    )


def evaluate(
    run: Federation, strategy: FedSB, state: ArrayRecord, which: Sequence[str] = WHICH
) -> dict[str, dict[str, dict[str, Any]]]:
    """Step 4: base, global and personal on every client's own test set; base | global | personal → client → score.

    Where nobody has gone on alone, the personal scores are the global ones, and are not asked for.
    """
    rounds, keeps = run.config.federation.rounds, METHODS[run.config.adapter.method].kept
    same = not (run.config.personal.steps or keeps) and {"global", "personal"} <= set(which)
    asked = [each for each in which if not (same and each == "personal")]
    if strategy.private and run.config.privacy.scores == "withheld":
        return {each: {} for each in which}
    run.journal.tell("stage", title=f"scoring {', '.join(asked)}", clients=len(run.roster) * len(asked))
    exchange = Exchange(run.grid, run.config.federation.round_seconds)
    messages = strategy.configure_evaluate(rounds, state, ConfigRecord({"which": ",".join(asked)}), run.grid)
    found: dict[str, dict[str, dict[str, Any]]] = {each: {} for each in which}
    for client, scores in strategy.scores(rounds, exchange(messages)):
        for each in [each for each in asked if each in scores]:
            found[each][client] = scores[each]
            run.journal.tell("scored", which=each, client=client, **scores[each])
    run.traffic.add(exchange.traffic)
    run.name_nodes("silent", rounds, exchange.silent)
    return found | {"personal": dict(found["global"])} if same else found


def _personal_traffic(run: Federation, published: list[str]) -> list[Traffic]:
    """What was moved for clients that published before this run was resumed; told before they published."""
    told = {e["client"]: e for e in read_events(run.journal.path) if e["event"] == "personal"}
    return [Traffic(up=told[name]["up"], down=told[name]["down"]) for name in published if name in told]
