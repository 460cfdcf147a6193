"""The Flower ClientApp: four questions that a server may ask a client.

`query.prepare`: load the model and get hold of the basis. `train`: one round from the global core. `train.personalise`:
go on alone. `evaluate`: score base, global or personal core on the own test set.
"""

import os
from pathlib import Path

from flwr.app import ArrayRecord, Context, Message
from flwr.clientapp import ClientApp

from clients.session import Session, Site, open_session
from fedsb.config import RunConfig
from fedsb.errors import FedsbError
from fedsb.serving.evaluator import Score
from fedsb.store.files import load_tensors, save_tensors
from fedsb.training.loop import personal_plan, round_plan
from strategies.records import (
    ARRAYS,
    BASIS,
    EXACT_MATCH,
    EXAMPLES,
    LOSS,
    SECONDS,
    Identity,
    Order,
    pack_state,
    reply_message,
    unpack_basis,
    unpack_state,
)

app = ClientApp()


@app.query("prepare")
def prepare(message: Message, context: Context) -> Message:
    """Load the model and get hold of the basis; the reply says which one, and of which layout states are."""
    order = Order.of(message)
    session = open_session(order.run)
    site = site_of(context, session.config)
    sent = message.content.get(BASIS)
    basis = session.prepare(site, order.basis, unpack_basis(sent) if isinstance(sent, ArrayRecord) else None)
    return reply_message(message, Identity(site.name, order.round, basis, session.layout.fingerprint, model=session.model_sha256))


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round: the global core in, the locally trained core out."""
    order, session, site = _opened(message, context)
    trained = session.train(site, unpack_state(message.content[ARRAYS]), round_plan(session.config, order.round))
    metrics = {EXAMPLES: trained.examples, LOSS: trained.loss, SECONDS: trained.seconds}
    state = pack_state(trained.vector, session.config.federation.wire_dtype)
    return reply_message(message, _identity(order, session, site), metrics, state)


@app.train("personalise")
def personalise(message: Message, context: Context) -> Message:
    """Go on from the global core on the own data alone, keep the result, and hand it over for the adapter store."""
    order, session, site = _opened(message, context)
    trained = session.train(site, unpack_state(message.content[ARRAYS]), personal_plan(session.config))
    save_tensors(_personal_file(site, session.config), session.layout.unflatten(trained.vector), {"basis": order.basis})
    metrics = {EXAMPLES: trained.examples, LOSS: trained.loss, SECONDS: trained.seconds}
    return reply_message(message, _identity(order, session, site), metrics, pack_state(trained.vector, "fp32"))


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Score base, global or personal core on the own test set."""
    order, session, site = _opened(message, context)
    if order.which == "global":
        vector = unpack_state(message.content[ARRAYS])
    elif order.which == "personal":
        state, _ = load_tensors(_personal_file(site, session.config))
        vector = session.layout.flatten(state)
    else:
        vector = session.base_vector()
    score: Score = session.score(site, vector)
    metrics = {EXAMPLES: score.n, LOSS: score.loss, EXACT_MATCH: score.exact_match}
    return reply_message(message, _identity(order, session, site), metrics)


def site_of(context: Context, config: RunConfig) -> Site:
    """Who this client is, by its node configuration: `name`, `partition-id`, `num-partitions`, `folder`.

    Raises FedsbError if it is none of the run's clients.
    """
    node = context.node_config
    index, names = int(node.get("partition-id", 0)), config.client_names
    if int(node.get("num-partitions", len(names))) != len(names) or index >= len(names):
        raise FedsbError(
            f"this node is number {index} of {node.get('num-partitions', len(names))} and the run has "
            f"federation.clients = {len(names)}; make the numbers equal"
        )
    folder = node.get("folder") or os.environ.get("FEDSB_HOME") or Path.home() / ".fedsb" / "sites"
    return Site(str(node.get("name", names[index])), index, Path(str(folder)))


def _opened(message: Message, context: Context) -> tuple[Order, Session, Site]:
    order = Order.of(message)
    session = open_session(order.run)
    site = site_of(context, session.config)
    session.require(site, order.basis)
    return order, session, site


def _identity(order: Order, session: Session, site: Site) -> Identity:
    return Identity(site.name, order.round, order.basis, session.layout.fingerprint, session.task_of(site))


def _personal_file(site: Site, config: RunConfig) -> Path:
    return site.folder / site.name / f"personal-{config.digest()[:16]}.safetensors"
