"""The four questions that a server may ask a client, answered: records in, records out. Flower's messages are left outside,
so that the same code runs in a simulation, in Flower's own process for a message, and in a site's trainer.

`query.prepare`: load the model and get hold of the basis. `train`: one round from the global core. `train.personalise`:
go on alone. `evaluate`: score base, global or personal core on the own test set.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

from flwr.app import ArrayRecord, RecordDict

from clients.policy import load_policy
from clients.session import Session, Site, open_session
from fedsb.config import RunConfig
from fedsb.data.tasks import Split
from fedsb.errors import FedsbError, PolicyError
from fedsb.store.tensors import load_tensors, save_tensors
from fedsb.training.loop import personal_plan, round_plan
from strategies.records import (
    ARRAYS,
    BASIS,
    EVALUATE,
    EXACT_MATCH,
    EXAMPLES,
    KEPT,
    LOSS,
    METRICS,
    PERSONALISE,
    PREPARE,
    SECONDS,
    TRAIN,
    Identity,
    Order,
    check_versions,
    pack_state,
    reply_content,
    unpack_basis,
    unpack_state,
)

Node = Mapping[str, Any]  # a SuperNode's --node-config


def answer(kind: str, content: RecordDict, node: Node) -> RecordDict:
    """Answer one message, if the site's policy (`node["policy"]`, a file) allows it.

    Raises FedsbError, which says what is wrong and what to do.
    """
    if kind not in ANSWERS:
        raise FedsbError(f"a client is asked {', '.join(ANSWERS)}, and not {kind}; use the same version of fedsb everywhere")
    order = Order.of(content)
    check_versions(order.versions)
    path = node.get("policy")
    if not path:
        return ANSWERS[kind](content, node)
    policy = load_policy(Path(str(path)))
    config = RunConfig.from_json(order.run)
    policy.check(config)
    if order.round > config.federation.rounds:
        raise PolicyError(f"round {order.round} of a run of {config.federation.rounds} rounds is beyond what was agreed")
    reply = ANSWERS[kind](content, node)
    if kind == PERSONALISE and not policy.personal_adapter_may_leave:
        del reply[ARRAYS]
        reply.metric_records[METRICS][KEPT] = 1
    return reply


def prepare(content: RecordDict, node: Node) -> RecordDict:
    """Load model and data and get hold of the basis; the reply says which one, and of which layout states are."""
    order = Order.of(content)
    session = open_session(order.run)
    site = site_of(node, session.config)
    for split in get_args(Split):
        session.examples(site, split)  # so that a site without its data says so before it is counted on
    sent = content.get(BASIS)
    basis = session.prepare(site, order.basis, unpack_basis(sent) if isinstance(sent, ArrayRecord) else None)
    return reply_content(Identity(site.name, order.round, basis, session.layout.fingerprint, model=session.model_sha256))


def train(content: RecordDict, node: Node) -> RecordDict:
    """One round: the global core in, the locally trained core out."""
    order, session, site = _opened(content, node)
    trained = session.train(site, unpack_state(content.get(ARRAYS)), round_plan(session.config, order.round))
    metrics = {EXAMPLES: trained.examples, LOSS: trained.loss, SECONDS: trained.seconds}
    state = pack_state(trained.vector, session.config.federation.wire_dtype)
    return reply_content(_identity(order, session, site), metrics, state)


def personalise(content: RecordDict, node: Node) -> RecordDict:
    """Go on from the global core on the own data alone, keep the result, and hand it over for the adapter store."""
    order, session, site = _opened(content, node)
    trained = session.train(site, unpack_state(content.get(ARRAYS)), personal_plan(session.config))
    save_tensors(_personal_file(site, session.config), session.layout.unflatten(trained.vector), {"basis": order.basis})
    metrics = {EXAMPLES: trained.examples, LOSS: trained.loss, SECONDS: trained.seconds}
    return reply_content(_identity(order, session, site), metrics, pack_state(trained.vector, "fp32"))


def evaluate(content: RecordDict, node: Node) -> RecordDict:
    """Score base, global and personal core, as asked, on the own test set; without a personal core there is no score of it."""
    order, session, site = _opened(content, node)
    metrics: dict[str, int | float] = {}
    for which in order.which.split(","):
        if which == "global":
            vector = unpack_state(content.get(ARRAYS))
        elif which == "base":
            vector = session.base_vector()
        elif _personal_file(site, session.config).exists():
            vector = session.layout.flatten(load_tensors(_personal_file(site, session.config))[0])
        else:
            continue
        score = session.score(site, vector)
        metrics |= {EXAMPLES: score.n, f"{which}-{LOSS}": score.loss, f"{which}-{EXACT_MATCH}": score.exact_match}
    return reply_content(_identity(order, session, site), metrics)


ANSWERS: dict[str, Callable[[RecordDict, Node], RecordDict]] = {
    PREPARE: prepare,
    TRAIN: train,
    PERSONALISE: personalise,
    EVALUATE: evaluate,
}


def site_of(node: Node, config: RunConfig) -> Site:
    """Who this client is, by its node configuration: `name`, `partition-id`, `num-partitions`, `folder`.

    A named client that holds data of its own needs no place among the others. Raises FedsbError if it is none of the run's
    clients, or its name is none.
    """
    index, names = int(node.get("partition-id", 0)), config.client_names
    count = int(node.get("num-partitions", len(names)))
    placed = config.data.partition != "own" or "name" not in node
    if placed and (count != len(names) or not 0 <= index < count):
        raise FedsbError(
            f"this node is number {index} of {count} and the run deals its data to federation.clients = {len(names)}; make the "
            "numbers equal (of a site: --index and --sites of `fedsb trainer`)"
        )
    folder = node.get("folder") or os.environ.get("FEDSB_HOME") or Path.home() / ".fedsb" / "sites"
    return Site(str(node["name"] if "name" in node else names[index]), index, Path(str(folder)))


def _opened(content: RecordDict, node: Node) -> tuple[Order, Session, Site]:
    order = Order.of(content)
    session = open_session(order.run)
    site = site_of(node, session.config)
    session.require(site, order.basis)
    return order, session, site


def _identity(order: Order, session: Session, site: Site) -> Identity:
    return Identity(site.name, order.round, order.basis, session.layout.fingerprint, session.task_of(site))


def _personal_file(site: Site, config: RunConfig) -> Path:
    return site.folder / site.name / f"personal-{config.digest()[:16]}.safetensors"
