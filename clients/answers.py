"""The questions that a server may ask a client, answered: records in, records out. Flower's messages are left outside,
so that the same code runs in a simulation, in Flower's own process for a message, and in a site's trainer.

`query.sketch`: the first gradient's sketch, where the basis comes from those. `query.prepare`: load the model and get hold of
the basis. `train`: one round from the global core. `train.personalise`: go on alone. `evaluate`: score base, global or personal
core on the own test set. `query.advertise`, `query.share`, `query.reveal`: the stages of a secure sum around `train`.
"""

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, RecordDict
from torch import Tensor

from clients import own, secure, variates
from clients.budget import Budget
from clients.policy import Policy, load_policy
from clients.session import Session, Site, open_session
from fedsb.config import RunConfig
from fedsb.data.tasks import Split
from fedsb.errors import FedsbError, PolicyError, PrivacyError
from fedsb.privacy.clipping import clip
from fedsb.privacy.mechanism import Mechanism, sketch_mechanism
from fedsb.store.tensors import load_tensors, save_tensors
from fedsb.training.drift import Control
from fedsb.training.loop import Plan, personal_plan, round_plan
from strategies.records import (
    ARRAYS,
    BASIS,
    EVALUATE,
    EXACT_MATCH,
    EXAMPLES,
    FOLDS,
    KEPT,
    LOSS,
    PERSONALISE,
    PREPARE,
    SECONDS,
    SKETCH,
    TRAIN,
    VARIATES,
    WER,
    Identity,
    Order,
    check_versions,
    pack_state,
    reply_content,
    unpack_basis,
    unpack_folds,
    unpack_state,
)
from strategies.sums import ADVERTISE, REVEAL, SECRETS, SHARE

Node = Mapping[str, Any]  # a SuperNode's --node-config
ANYTHING = Policy.model_validate({})


def answer(kind: str, content: RecordDict, node: Node) -> RecordDict:
    """Answer one message, if the site's policy (`node["policy"]`, a file) allows it.

    Raises FedsbError, which says what is wrong and what to do.
    """
    if kind not in ANSWERS:
        raise FedsbError(f"a client is asked {', '.join(ANSWERS)}, and not {kind}; use the same version of fedsb everywhere")
    order = Order.of(content)
    check_versions(order.versions)
    path = node.get("policy")
    policy = load_policy(Path(str(path))) if path else ANYTHING
    config = RunConfig.from_json(order.run)
    policy.check(config)
    if order.round > config.federation.rounds:
        raise PolicyError(f"round {order.round} of a run of {config.federation.rounds} rounds is beyond what was agreed")
    try:
        return ANSWERS[kind](content, node, policy)
    except PolicyError:
        raise
    except FedsbError as error:
        if config.privacy.unit != "none":  # sizes, fingerprints, rows: what it says may be about the data
            error.outside = f"does not answer {kind}; its own log says why"  # type: ignore[attr-defined]
        raise


def prepare(content: RecordDict, node: Node, policy: Policy) -> RecordDict:
    """Load model and data and get hold of the basis; the reply says which one, and of which layout states are."""
    order = Order.of(content)
    session = open_session(order.run)
    site = site_of(node, session.config)
    splits: tuple[Split, ...] = ("train", session.config.evaluation.split)
    for split in splits:
        session.examples(site, split)  # so that a site without its data says so before it is counted on
    private = session.config.privacy.unit != "none"
    if policy.test_scores_may_leave and not (private and session.config.privacy.scores == "withheld"):
        session.require_scores(site)  # the same
    if private and not (budget := Budget.of(session, site, policy)).own():
        budget.allow(1)  # so that a site whose budget is spent says so before it is counted on
    sent = content.get(BASIS)
    basis = session.prepare(site, order.basis, unpack_basis(sent) if isinstance(sent, ArrayRecord) else None)
    return reply_content(Identity(site.name, order.round, basis, session.share(site).layout.fingerprint, model=session.identity))


def sketch(content: RecordDict, node: Node, policy: Policy) -> RecordDict:
    """The sketch of this client's first gradient, from which the server makes the basis; with privacy it is a release."""
    order = Order.of(content)
    session = open_session(order.run)
    site = site_of(node, session.config)
    _check_stage(order, session.config, sketching=True)
    if session.config.privacy.secure_sum:
        secure.ready(content, session, site)  # before anything is paid for
    if session.config.privacy.unit == "none":
        vector = session.sketch(site)
    else:
        budget = Budget.of(session, site, policy)
        if any(entry.what != SKETCH for entry in budget.own()):
            raise PrivacyError(f"{site.name} has trained in this run already, and a sketch comes before that; start another run")
        work = session.sketch_private if session.config.privacy.unit == "record" else session.sketch_clipped
        vector = budget.release(SKETCH, content, 1, partial(work, site), sketch_mechanism(session.config, budget.units))
    identity = Identity(site.name, order.round, "", session.share(site).layout.fingerprint, model=session.identity)
    summed = session.config.privacy.secure_sum
    return reply_content(identity, {}, secure.mask(content, session, site, vector) if summed else pack_state(vector, "fp32"))


def train(content: RecordDict, node: Node, policy: Policy) -> RecordDict:
    """One round: the global core in, the locally trained core out."""
    order, session, site = _opened(content, node)
    _check_stage(order, session.config, sketching=False)
    if session.config.privacy.secure_sum:
        secure.ready(content, session, site)  # before anything is paid for
    control = variates.control(content, session, site) if session.config.strategy.name == "scaffold" else None
    plan = round_plan(session.config, order.round)
    vector, metrics = _train(content, TRAIN, session, site, policy, plan, order.round, control)
    own.keep(session, site, vector, order.round)
    vector = session.returned(site, order.round).take(vector)
    if session.config.privacy.secure_sum:
        masked = secure.mask(content, session, site, vector - unpack_state(content.get(ARRAYS)))
        return reply_content(_identity(order, session, site), metrics, masked)
    state = pack_state(vector, session.config.federation.wire_dtype)
    reply = reply_content(_identity(order, session, site), metrics, state)
    if control:
        reply[VARIATES] = variates.change(content, session, site, control)
    return reply


def personalise(content: RecordDict, node: Node, policy: Policy) -> RecordDict:
    """Go on from the global core on the own data alone, keep the result, and hand it over for the adapter store.

    It stays here if the policy says so; and with privacy by client or a secure sum, which protect what is summed and not one
    client's own, unless its records are protected by noise.
    """
    order, session, site = _opened(content, node)
    vector, metrics = _train(content, PERSONALISE, session, site, policy, personal_plan(session.config), order.round + 1)
    save_tensors(_personal_file(site, session.config), session.layout.unflatten(vector), {"basis": order.basis})
    privacy = session.config.privacy
    covered = privacy.unit == "record" or (privacy.unit == "none" and not privacy.secure_sum)
    leaves = policy.personal_adapter_may_leave and covered and not policy.secure_sum_only
    if privacy.unit == "client":
        Budget.of(session, site, policy).catch_up(order.round)
    state = pack_state(session.published(site).take(vector), "fp32") if leaves else None
    return reply_content(_identity(order, session, site), metrics if leaves else metrics | {KEPT: 1}, state)


def evaluate(content: RecordDict, node: Node, policy: Policy) -> RecordDict:
    """Score base, global and personal core, as asked, on the own test set; without a personal core there is no score of it."""
    order, session, site = _opened(content, node)
    if not policy.test_scores_may_leave:
        raise PolicyError("the site's policy does not let scores on its test set leave (test_scores_may_leave = false)")
    if session.config.privacy.unit != "none" and session.config.privacy.scores == "withheld":
        raise PrivacyError('privacy.scores = "withheld": scores on test sets are not told in this run')
    metrics: dict[str, int | float] = {}
    for which in order.which.split(","):
        if which == "base":
            score = session.score_base(site)
        elif which == "global":
            score = session.score(site, own.whole(session, site, unpack_state(content.get(ARRAYS)), order.round + 1))
        elif _personal_file(site, session.config).exists():
            score = session.score(site, session.layout.flatten(load_tensors(_personal_file(site, session.config))[0]))
        else:
            continue
        metrics |= {EXAMPLES: score.n, f"{which}-{LOSS}": score.loss, f"{which}-{EXACT_MATCH}": score.exact_match}
        metrics |= {} if score.wer is None else {f"{which}-{WER}": score.wer}
    return reply_content(_identity(order, session, site), metrics)


def secure_stage(
    stage: Callable[[RecordDict, Session, Site], ArrayRecord], content: RecordDict, node: Node, policy: Policy
) -> RecordDict:
    """One stage of the secure sum of a round, or of sketches, which come before there is a basis."""
    order = Order.of(content)
    session = open_session(order.run)
    site = site_of(node, session.config)
    _check_stage(order, session.config, sketching=not order.round)
    if order.round:
        session.require(site, order.basis)
    identity = Identity(site.name, order.round, order.basis, session.share(site).layout.fingerprint, model=session.identity)
    reply = reply_content(identity, {})
    reply[SECRETS] = stage(content, session, site)
    return reply


ANSWERS: dict[str, Callable[[RecordDict, Node, Policy], RecordDict]] = {
    SKETCH: sketch,
    PREPARE: prepare,
    TRAIN: train,
    PERSONALISE: personalise,
    EVALUATE: evaluate,
    ADVERTISE: partial(secure_stage, secure.advertise),
    SHARE: partial(secure_stage, secure.share),
    REVEAL: partial(secure_stage, secure.reveal),
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


def _train(
    content: RecordDict,
    kind: str,
    session: Session,
    site: Site,
    policy: Policy,
    plan: Plan,
    number: int,
    control: Control | None = None,
) -> tuple[Tensor, dict[str, int | float]]:
    """The whole state after local training, and what is told about it; with privacy nothing is, since it would be about records.

    `number`: of the round; what the client kept to itself is of those before. `control`: corrects gradients, without privacy.
    """
    share, unit = session.share(site), session.config.privacy.unit
    received = own.whole(session, site, unpack_state(content.get(ARRAYS)), number)
    if unit == "none" or (unit == "client" and kind == PERSONALISE):
        trained = session.train(site, received, plan, control)
        told = {EXAMPLES: trained.examples, LOSS: trained.loss, SECONDS: trained.seconds}
        return trained.vector, told if unit == "none" else {}
    budget = Budget.of(session, site, policy)
    if unit == "record":
        work = partial(session.train_private, site, received, plan)
        return budget.release(kind, content, plan.count, work) if plan.count else received, {}

    def clipped(mechanism: Mechanism) -> Tensor:
        trained, begun = session.train(site, received, plan).vector, share.take(received)
        return share.put(begun + clip(share.take(trained) - begun, mechanism.clip_norm).vector, trained)

    if Order.of(content).round > 1:
        budget.catch_up(Order.of(content).round - 1)
    return budget.release(kind, content, 1, clipped), {}


def _check_stage(order: Order, config: RunConfig, *, sketching: bool) -> None:
    """Raise FedsbError, before anything is paid for, unless sketches are of round 0 and all else of the rounds after it."""
    if sketching and (order.round or order.basis or config.basis.source != "sketch"):
        raise FedsbError("is asked for a sketch, which this run does not have; use the same version of fedsb everywhere")
    if not sketching and order.round < 1:
        raise FedsbError(f"is asked to train in round {order.round}, which is none; use the same version of fedsb everywhere")


def _opened(content: RecordDict, node: Node) -> tuple[Order, Session, Site]:
    order = Order.of(content)
    session = open_session(order.run)
    site = site_of(node, session.config)
    folds = content.get(FOLDS)
    session.require(site, order.basis, order.before, unpack_folds(folds) if isinstance(folds, ArrayRecord) else ())
    return order, session, site


def _identity(order: Order, session: Session, site: Site) -> Identity:
    return Identity(site.name, order.round, order.basis, session.share(site).layout.fingerprint, session.task_of(site))


def _personal_file(site: Site, config: RunConfig) -> Path:
    return site.folder / site.name / f"personal-{config.digest()[:16]}.safetensors"
