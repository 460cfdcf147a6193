"""A client's side of the secure sum of a round: its secrets, kept in this process from one message to the next.

A process that is started anew has lost them, and takes no part in that round: on real sites that is the resident trainer's
process, in a simulation the only one there is.
"""

import torch
from flwr.app import ArrayRecord, RecordDict
from torch import Tensor

from clients.session import Session, Site
from fedsb.errors import SecureSumError
from fedsb.privacy.clipping import clip
from fedsb.privacy.member import Member
from fedsb.privacy.noise import KeyStream, add_noise
from fedsb.privacy.roster import Context
from fedsb.training.start import sketch_plan
from strategies.records import ARRAYS, Order, unpack_state
from strategies.sums import context_of, fixed_point_of, noise_share, pack_payload, unpack_payload

_members: dict[tuple[str, str], Member] = {}  # (site's folder and name, run's digest) → its part in the newest round


def advertise(content: RecordDict, session: Session, site: Site) -> ArrayRecord:
    """New secrets for a round, and their public keys."""
    member = _members[_key(session, site)] = Member(site.name, _context(content, session, site))
    return pack_payload(member.advertise())


def share(content: RecordDict, session: Session, site: Site) -> ArrayRecord:
    """Shares of the secrets, encrypted for the others on the roster."""
    return pack_payload(_member(content, session, site).share(unpack_payload(content)))


def ready(content: RecordDict, session: Session, site: Site) -> None:
    """Raise SecureSumError if this process has no part in the round's secure sum, or was told another number of members."""
    order, member = Order.of(content), _member(content, session, site)
    if member.context != _context(content, session, site):
        raise SecureSumError(f"{site.name} was told {order.members} members where its secrets are for another number; start anew")


def mask(content: RecordDict, session: Session, site: Site, update: Tensor) -> ArrayRecord:
    """The masked update or sketch (size,); with privacy by client, its part of the noise is in it."""
    order, privacy = Order.of(content), session.config.privacy
    if privacy.unit == "client" or not order.round:
        update = clip(update, privacy.clip_norm).vector  # nobody else can: the server sees no single one
    sent = unpack_state(content.get(ARRAYS)) if order.round else None
    fixed = fixed_point_of(session.config, order.round, order.members, sent)
    noisy = add_noise(update, noise_share(session.config, order.round, order.members), KeyStream()).clamp(
        -fixed.bound, fixed.bound
    )
    words = fixed.encode(noisy.to(torch.float32).numpy())
    return pack_payload(_member(content, session, site).mask(unpack_payload(content), words))


def reveal(content: RecordDict, session: Session, site: Site) -> ArrayRecord:
    """The shares by which the server takes the masks off the sum."""
    return pack_payload(_member(content, session, site).reveal(unpack_payload(content)))


def _context(content: RecordDict, session: Session, site: Site) -> Context:
    order = Order.of(content)
    size = session.share(site).layout.size if order.round else sketch_plan(session.config, session.model).size
    return context_of(session.config, order.basis, order.round, size, order.members)


def _member(content: RecordDict, session: Session, site: Site) -> Member:
    order = Order.of(content)
    member = _members.get(_key(session, site))
    if member is None or member.context.round != order.round:
        raise SecureSumError(
            f"{site.name} has no secrets for the secure sum of round {order.round}: its process is a new one; it takes part "
            "again in the next round (on Flower's Ray runtime use privacy.secure_sum = false)"
        )
    return member


def _key(session: Session, site: Site) -> tuple[str, str]:
    return str(site.folder / site.name), session.config.digest()
