"""A secure sum: the server learns the sum of the clients' vectors, and no single one of them.

After Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017, eprint 2017/281:
figure 4 without the parts for signed keys and the consistency check, that is, the protocol for a server that keeps to it but
is curious (section 6). What travels, for n members, of whom m have shared:

    stage      client → server                         server → client
    advertise  two public keys: 64 bytes               the roster: 2 + Σ (65 + name) bytes
    share      32 + 80 (n - 1) bytes                   ⌈n/8⌉ + 80 (m - 1) bytes
    mask       the masked vector: 4 · size bytes       who sent one: ⌈n/8⌉ bytes
    reveal     32 m bytes                              -

Here is the server's side; a client's is `member.Member`. Between the stages stands nothing but these bytes, so a round can be
carried by any messages that say whom they are from.

Not promised, since keys are not signed and clients do not compare what they were told (the paper's protocol for servers that
lie does both):
- A server that makes up clients, or hands out keys of its own as those of others, is every other client to each of them, and
  learns each vector. Members whose `Member.digest` is the same, compared past the server, were shown the same keys.
- A server that tells its clients different sharers or survivors can learn the sum of fewer than `threshold` of them: of no
  fewer than (t² + tn - n²) / (2t - n) where nobody helps it, which is more than n / 3 for the threshold `two_thirds`, and may
  be one client for thresholds near n / 2 (`tests/privacy/test_member.py` does it).
- A client can spoil the sum by its vector, within the bound or beyond it, and stop the round by wrong shares.
"""

from collections.abc import Callable, Collection

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedsb.errors import SecureSumError
from fedsb.privacy.fixed_point import Words, from_bytes
from fedsb.privacy.masks import KEY, add_mask, agree, public_bytes
from fedsb.privacy.member import BOX, pair_mask, self_mask, too_few
from fedsb.privacy.roster import Context, Keys, Roster
from fedsb.privacy.shares import COMMITMENT, combine, opens

STAGES = ("advertise", "share", "mask", "reveal", "sum")
DONE = {"advertise": "advertised keys", "share": "shared", "mask": "sent a vector", "reveal": "revealed shares"}


class SecureSum:
    """The server's side of one secure sum; a new round takes a new one.

    In each stage what a client answered goes to `advertise`, `share`, `add` or `reveal`, as it comes; then `roster`, `shares`,
    `survivors` or `total` end the stage and give what each client that is still in gets next, by name. Whoever has not
    answered by then is left out from there on. An error of `advertise`, `share`, `add` or `reveal` concerns that client
    alone: it counts as one that did not answer. One of `roster`, `shares` or `survivors` says that it is too early, and one
    of `total` after enough answers ends the round.

    Args:
        context: what the sum is for.

    Guarantees:
        - `total` is exactly the sum modulo 2^32 of the vectors of those whom `survivors` named, if they kept to the protocol.
        - Memory: one vector, the sum, whatever the number of clients; masks are made and taken away in stretches.
        - A secret that was rebuilt is tested before it is used: b_u by its commitment, s_u by its public key. A wrong share
          cannot make a wrong sum.

    Edge cases, all SecureSumError:
        | what comes                                        | what happens                                      |
        |---------------------------------------------------|---------------------------------------------------|
        | fewer clients than the threshold, at any stage    | the stage cannot be ended; nothing was learned    |
        | a client that has not answered the stage before   | it is refused                                     |
        | a client's second answer, or a late one           | it is refused; the first counts                   |
        | keys that are none, or those of another           | it is refused                                     |
        | bytes too many or too few                         | it is refused                                     |
        | shares that do not give what they should          | the round ends: its sum cannot be unmasked        |
    """

    def __init__(self, context: Context) -> None:
        self.context = context
        self._stage = "advertise"
        self._keys: dict[str, Keys] = {}
        self._shared: dict[int, bytes] = {}  # member → its commitment and its boxes for the others
        self._alive: set[int] = set()
        self._revealed: dict[int, bytes] = {}  # member → 32 bytes of each sharer
        self._sum: Words = np.zeros(context.size, np.uint32)

    @property
    def names(self) -> list[str]:
        """Who is still in: the clients that this stage asks, and after the last one those whose vectors are in the sum."""
        if self._stage == "advertise":
            return sorted(self._keys)
        return [self._roster.name(member) for member in sorted(self._asked())]

    def advertise(self, name: str, keys: bytes) -> None:
        """Stage 0: a client's public keys."""
        self._check_stage("advertise", name)
        if name in self._keys:
            raise SecureSumError(f"{name} advertised keys for the secure sum twice; the first ones count")
        pair = Keys.from_bytes(keys)
        for key in (pair.share, pair.mask):
            agree(X25519PrivateKey.generate(), key, b"test")
        others = {key for other in self._keys.values() for key in (other.share, other.mask)}
        if pair.share == pair.mask or {pair.share, pair.mask} & others:
            raise SecureSumError(f"{name} advertised one key twice, or another client's, for the secure sum; leave it out")
        self._keys[name] = pair

    def roster(self) -> dict[str, bytes]:
        """Ends stage 0: to all who advertised, who they are."""
        if self._stage == "advertise":
            self._roster = Roster.of(self.context, self._keys)
            self._stage = "share"
        return dict.fromkeys(self._roster.names, self._roster.to_bytes())

    def share(self, name: str, shares: bytes) -> None:
        """Stage 1: a client's commitment and its encrypted shares for the others."""
        member = self._check_answer("share", name, self._shared)
        expected = COMMITMENT + BOX * (len(self._roster.names) - 1)
        if len(shares) != expected:
            raise SecureSumError(f"{name} sent shares of {len(shares):,} bytes where {expected:,} were expected; leave it out")
        self._shared[member] = shares

    def shares(self) -> dict[str, bytes]:
        """Ends stage 1: to each of those who shared, what all others of them have encrypted for it."""
        self._end("share", self._shared)
        sharers = sorted(self._shared)
        present = self._roster.pack_members(sharers)
        boxes = {to: b"".join(self._box(sender, to) for sender in sharers if sender != to) for to in sharers}
        return {self._roster.name(to): present + box for to, box in boxes.items()}

    def add(self, name: str, masked: bytes) -> None:
        """Stage 2: a client's masked vector (size,), as `Member.mask` returns it; it is added and dropped."""
        member = self._check_answer("mask", name, self._alive)
        self._sum += from_bytes(masked, self.context.size)
        self._alive.add(member)

    def survivors(self) -> dict[str, bytes]:
        """Ends stage 2: to all who sent a vector, who they are."""
        self._end("mask", self._alive)
        names = [self._roster.name(member) for member in sorted(self._alive)]
        return dict.fromkeys(names, self._roster.pack_members(self._alive))

    def reveal(self, name: str, shares: bytes) -> None:
        """Stage 3: a client's shares of those who shared."""
        member = self._check_answer("reveal", name, self._revealed)
        expected = KEY * len(self._shared)
        if len(shares) != expected:
            raise SecureSumError(f"{name} revealed {len(shares):,} bytes where {expected:,} were expected; leave it out")
        self._revealed[member] = shares

    def total(self) -> Words:
        """Ends stage 3: the sum (size,) of the vectors of `names`, modulo 2^32."""
        if self._stage != "sum":
            self._check_enough("reveal", self._revealed)
            masks = [mask for place, member in enumerate(sorted(self._shared)) for mask in self._masks(place, member)]
            self._stage = "sum"  # all secrets are there: nothing can go wrong any more
            for key, sign in masks:
                add_mask(self._sum, key, sign)
        return self._sum

    def _masks(self, place: int, member: int) -> list[tuple[bytes, int]]:
        """What to add to the sum for a member: against its own mask if it survived, else against those it shares with survivors.

        Each with its sign. `place` is where its shares stand in what each member has revealed.
        """
        shares = {other: said[KEY * place : KEY * (place + 1)] for other, said in self._revealed.items()}
        if member in self._alive:
            committed = self._shared[member][:COMMITMENT]
            seed = self._rebuild(member, shares, lambda secret: opens(secret, committed))
            return [(self_mask(self._roster, member, seed), -1)]
        advertised = self._roster.keys_of(member).mask
        secret = self._rebuild(member, shares, lambda secret: public_bytes(_private_key(secret)) == advertised)
        # in a survivor's vector a mask has the opposite sign of that in the lost one's, so this takes it away
        return [pair_mask(self._roster, member, _private_key(secret), other) for other in self._alive]

    def _rebuild(self, member: int, shares: dict[int, bytes], valid: Callable[[bytes], bool]) -> bytes:
        try:
            return combine(shares, self.context.threshold, valid)
        except SecureSumError as error:
            raise SecureSumError(f"{self._roster.name(member)} cannot be unmasked in the secure sum: {error}") from None

    def _box(self, sender: int, receiver: int) -> bytes:
        """What `sender` has encrypted for `receiver`; it has made no box for itself."""
        start = COMMITMENT + BOX * (receiver - 1 - (receiver > sender))
        return self._shared[sender][start : start + BOX]

    def _asked(self) -> Collection[int]:
        """The members that this stage asks."""
        return {"share": self._roster.members, "mask": self._shared, "reveal": self._alive, "sum": self._alive}[self._stage]

    def _check_answer(self, stage: str, name: str, answered: Collection[int]) -> int:
        """The number of a client that may answer now, and has not."""
        self._check_stage(stage, name)
        member = self._roster.member(name)
        if member not in self._asked():
            before = STAGES[STAGES.index(stage) - 1]
            raise SecureSumError(f"{name} goes on with the secure sum, but has not {DONE[before]}; leave it out")
        if member in answered:
            raise SecureSumError(f"{name} has {DONE[stage]} for the secure sum already; the first answer counts")
        return member

    def _check_stage(self, stage: str, name: str) -> None:
        if stage != self._stage:
            raise SecureSumError(
                f"{name} answered to {stage} where the secure sum of round {self.context.round} is at {self._stage}; leave it out"
            )

    def _check_enough(self, stage: str, answered: Collection[int]) -> None:
        if STAGES.index(self._stage) < STAGES.index(stage) or len(answered) < self.context.threshold:
            raise SecureSumError(too_few(self.context, len(answered), DONE[stage]))

    def _end(self, stage: str, answered: Collection[int]) -> None:
        """Go on to the next stage, unless that was done before. Raises SecureSumError if too few have answered."""
        self._check_enough(stage, answered)
        if self._stage == stage:
            self._stage = STAGES[STAGES.index(stage) + 1]


def _private_key(secret: bytes) -> X25519PrivateKey:
    return X25519PrivateKey.from_private_bytes(secret)
