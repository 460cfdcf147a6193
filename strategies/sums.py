"""What server and clients agree on about a secure sum before it begins, and how its messages look.

Both derive it from what they have: the configuration, the round, the basis, and how many clients are asked. A server that
told two clients different things of these would find that they cannot open each other's shares.
"""

import math

import torch
from flwr.app import Array, ArrayRecord, RecordDict
from torch import Tensor

from fedsb.adapters.methods import METHODS
from fedsb.config import RunConfig
from fedsb.errors import FederationError, ReplyError
from fedsb.privacy.fixed_point import FixedPoint
from fedsb.privacy.mechanism import mechanism_of, sketch_mechanism
from fedsb.privacy.roster import Context, two_thirds
from fedsb.training.loop import largest_update, round_plan

ADVERTISE, SHARE, REVEAL = "query.advertise", "query.share", "query.reveal"
SECRETS, PAYLOAD = "secrets", "payload"
LEAST = 3  # clients in a secure sum: of two each knows the other's vector from the sum
ROUNDING = 1.001  # of a bound on what was computed in fp32
TAIL = 12.0  # standard deviations beyond which a client's part of the noise is cut off; it ends before (`KeyStream.normal`)


def context_of(config: RunConfig, basis: str, server_round: int, size: int, members: int) -> Context:
    """What one round's secure sum is bound to, `members` clients being asked.

    The threshold is ⌊2n/3⌋ + 1: with less, a server that tells clients different lists of survivors learns more than it
    should. Round 0 is the sum of sketches. Raises FederationError for fewer than three clients.
    """
    if members < LEAST:
        raise FederationError(
            f"round {server_round}: {members} clients are too few for privacy.secure_sum, which takes {LEAST} or more, since of "
            "two each knows the other's update from the sum; wait for more clients, or raise federation.fraction"
        )
    return Context(f"{config.digest()} {basis}", server_round, size, two_thirds(members))


def noise_share(config: RunConfig, server_round: int, members: int) -> float:
    """Standard deviation of the noise that each client adds for itself, with privacy by client; else 0. Round 0: to its sketch.

    So that the parts of the others, when `threshold` clients stay, the fewest that a sum can have, add up to the whole: a client
    knows its own part, and takes it off. σ·C/√(threshold - 1).
    """
    if config.privacy.unit != "client":
        return 0.0
    mechanism = (mechanism_of if server_round else sketch_mechanism)(config, config.federation.clients)
    return mechanism.noise_multiplier * mechanism.clip_norm / math.sqrt(two_thirds(members) - 1)


def fixed_point_of(config: RunConfig, server_round: int, members: int, sent: Tensor | None = None) -> FixedPoint:
    """How updates become whole numbers: bounded by how far the round's steps can move a number from the state that was `sent`
    (None: from zero), and by the clip norm if there is one, with room for the noise that a client adds. Round 0: sketches,
    which are always clipped."""
    bound = clip_norm = config.privacy.clip_norm
    if server_round:
        core, head = largest_update(round_plan(config, server_round))
        reach = METHODS[config.adapter.method].reach(core, torch.zeros(1) if sent is None else sent)
        bound = max(float(reach.max()), head) * ROUNDING
    if config.privacy.unit == "client":
        bound = min(bound, clip_norm) + TAIL * noise_share(config, server_round, members)
    return FixedPoint(members, bound)


def pack_payload(data: bytes) -> ArrayRecord:
    """Bytes of a secure sum → their record."""
    return ArrayRecord({PAYLOAD: Array("uint8", (len(data),), "fedsb.bytes", data)})


def unpack_payload(content: RecordDict, key: str = SECRETS) -> bytes:
    """The inverse. Raises ReplyError if there is none."""
    record = content.get(key)
    if not isinstance(record, ArrayRecord) or list(record.keys()) != [PAYLOAD]:
        raise ReplyError("sent nothing for the secure sum")
    return bytes(record[PAYLOAD].data)
