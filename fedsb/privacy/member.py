"""A client's side of a secure sum (Bonawitz et al., CCS 2017, eprint 2017/281, figure 4).

Client u adds to its vector x_u a mask of its own, from a seed b_u, and with every other client v one mask that u adds and v
subtracts, from the key that s_u and s_v agree on. b_u and s_u are shared t-of-n, so that the server can take away the own
masks of those who stayed, and the common masks of those who did not (section 4). The messages are in `secure_sum`.
"""

import secrets

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from fedsb.errors import SecureSumError
from fedsb.privacy.fixed_point import Words, to_bytes
from fedsb.privacy.masks import KEY, add_mask, agree, derive, public_bytes
from fedsb.privacy.roster import Context, Keys, Roster
from fedsb.privacy.shares import commitment, split

BOX = 2 * KEY + 16  # bytes of an encrypted pair of shares: of the seed b_u, of the key s_u, and the tag
NONCE = bytes(12)  # every key encrypts one message
OVER = "stop"


class Member:
    """One client's side of one secure sum; a new round takes a new one.

    The four stages are called once each, in order: `advertise`, `share`, `mask`, `reveal`. A member that has refused anything
    answers nothing more. Secrets are made by the operating system, live in this object only, and cannot be pickled.

    Args:
        name: of this client, as on the roster.
        context: what the sum is for, from the client's own configuration and the server's question.

    Guarantees:
        - What `mask` returns is computationally indistinguishable from uniform numbers for whoever has fewer than `threshold`
          shares of the seed b_u, whatever else it has; and, for whoever has b_u, as long as a member that keeps to the protocol
          shares a mask with this one that is not taken away.
        - One member gives, of each other member, the share of b_v or that of s_v, never both. Since the threshold is above
          half of the roster, no server can gather both from members who keep to this, whatever it tells each of them. With c
          members that give it everything, the same holds for thresholds above (n + c) / 2.
        - Nothing tells this member that the server tells all members the same of who shared and who survived; see `secure_sum`.
        - All keys are bound to the digest of the roster and its context. Members who were shown different ones cannot open
          each other's shares, and say so.

    Edge cases, all SecureSumError:
        | asked for                                              | why it is refused                                       |
        |--------------------------------------------------------|---------------------------------------------------------|
        | a roster without this client, or with other keys of it | somebody else would be masked with in its place         |
        | what `Roster` refuses                                  | names or keys twice; a threshold too high or too low    |
        | a stage out of order, or a second time                 | two vectors under the same masks give their difference  |
        | shares of fewer members than the threshold             | the sum would be one of too few                         |
        | shares that leave out this client                      | it would be masked with by nobody                       |
        | a share that cannot be opened                          | another roster was shown to its sender, or it was changed |
        | fewer survivors than the threshold                     | as above                                                |
        | a survivor that has not shared                         | it has no masks that could be taken away                |
        | survivors without this client                          | the server denies having this client's vector           |
        | other survivors than the first time                    | it would give both shares of one member                 |
    """

    def __init__(self, name: str, context: Context) -> None:
        self.name, self.context = name, context
        self._share_key, self._mask_key = X25519PrivateKey.generate(), X25519PrivateKey.generate()
        self._keys = Keys(public_bytes(self._share_key), public_bytes(self._mask_key))
        self._seed = secrets.token_bytes(KEY)
        self._awaits = "advertise"
        self._held: dict[int, bytes] = {}  # member → its share of b and its share of s, 32 bytes each
        self._revealed: tuple[bytes, bytes] | None = None  # survivors, and what was said

    def __reduce__(self) -> str:
        raise TypeError("a member of a secure sum holds secrets, which stay in memory")

    @property
    def digest(self) -> str:
        """Of the roster that this member was shown, from `share` on: 64 hexadecimal digits, to be compared past the server."""
        return self._roster.digest.hex()

    def advertise(self) -> bytes:
        """Stage 0: this round's public keys, 64 bytes."""
        self._begin("advertise")
        self._awaits = "share"
        return self._keys.to_bytes()

    def share(self, roster: bytes) -> bytes:
        """Stage 1: a commitment to b_u, and an encrypted share of b_u and of s_u for each other member. Raises SecureSumError."""
        self._begin("share")
        self._roster = Roster.from_bytes(self.context, roster)
        self._number = self._roster.member(self.name)
        if self._roster.keys_of(self._number) != self._keys:
            raise SecureSumError(f"the roster has other keys for {self.name} than it sent; take no part in this round")
        seeds, keys = (self._split(secret) for secret in (self._seed, self._mask_key.private_bytes_raw()))
        pairs = {member: seed + key for member, seed, key in zip(self._roster.members, seeds, keys, strict=True)}
        self._held[self._number] = pairs.pop(self._number)
        boxes = [self._channel(self._number, member).encrypt(NONCE, pair, None) for member, pair in pairs.items()]
        self._awaits = "mask"
        return commitment(self._seed) + b"".join(boxes)

    def mask(self, shares: bytes, vector: Words) -> bytes:
        """Stage 2: open what the others have shared, and mask `vector` (size,), which is left as it is.

        Raises SecureSumError.
        """
        if vector.shape != (self.context.size,) or vector.dtype != np.uint32:
            raise ValueError(f"a vector of {self.context.size} uint32 is needed, not {vector.dtype} of shape {vector.shape}")
        self._begin("mask")
        self._open(shares)
        masked = vector.copy()
        add_mask(masked, self_mask(self._roster, self._number, self._seed), 1)
        for other in self._held.keys() - {self._number}:
            add_mask(masked, *pair_mask(self._roster, self._number, self._mask_key, other))
        self._awaits = "reveal"
        return to_bytes(masked)

    def reveal(self, survivors: bytes) -> bytes:
        """Stage 3: of each member that shared, in order, the share of b if it survived and that of s if not, 32 bytes each.

        Asked again with the same survivors, it answers the same. Raises SecureSumError.
        """
        if self._revealed is not None and self._revealed[0] == survivors:
            return self._revealed[1]
        self._begin("reveal")
        alive = self._roster.unpack_members(survivors)
        self._check_survivors(alive)
        said = b"".join(pair[:KEY] if member in alive else pair[KEY:] for member, pair in sorted(self._held.items()))
        self._revealed = survivors, said
        self._held.clear()
        del self._seed, self._share_key, self._mask_key
        return said

    def _begin(self, stage: str) -> None:
        """Whatever happens in a stage, nothing is answered after it unless it ends well."""
        awaited, self._awaits = self._awaits, OVER
        if stage != awaited:
            raise SecureSumError(
                f"{self.name} was asked to {stage} in the secure sum of round {self.context.round} where it would {awaited}; "
                "start the round anew"
            )

    def _split(self, secret: bytes) -> list[bytes]:
        return split(secret, self.context.threshold, len(self._roster.names))

    def _channel(self, sender: int, receiver: int) -> ChaCha20Poly1305:
        """What encrypts the one message from `sender` to `receiver`, of whom this member is one."""
        other = self._roster.keys_of(receiver if sender == self._number else sender)
        return ChaCha20Poly1305(agree(self._share_key, other.share, self._roster.info("share", sender, receiver)))

    def _open(self, shares: bytes) -> None:
        """Decrypt the others' shares into `_held`."""
        at = self._roster.bitmap_size
        sharers = self._roster.unpack_members(shares[:at])
        self._check_present(sharers, "shared")
        others = sorted(sharers - {self._number})
        if len(shares) != at + BOX * len(others):
            raise SecureSumError(f"shares of {len(shares):,} bytes are not those of {len(others)} clients; start the round anew")
        for place, other in enumerate(others):
            box = shares[at + BOX * place : at + BOX * (place + 1)]
            try:
                self._held[other] = self._channel(other, self._number).decrypt(NONCE, box, None)
            except InvalidTag:
                raise SecureSumError(
                    f"{self.name} cannot open the share from {self._roster.name(other)}: it was changed, or the server showed "
                    "the two of them different rosters; take no part in this round"
                ) from None

    def _check_survivors(self, alive: frozenset[int]) -> None:
        strangers = alive - self._held.keys()
        if strangers:
            raise SecureSumError(
                f"{self._roster.name(min(strangers))} is said to have sent a vector, and has shared no secrets; take no part in "
                "this round"
            )
        self._check_present(alive, "sent a vector")

    def _check_present(self, members: frozenset[int], what: str) -> None:
        """The server's account of who did something must have this client, and `threshold` members."""
        if self._number not in members:
            raise SecureSumError(f"{self.name} is not among those who {what}, and it has; take no part in this round")
        if len(members) < self.context.threshold:
            raise SecureSumError(too_few(self.context, len(members), what))


def self_mask(roster: Roster, member: int, seed: bytes) -> bytes:
    """The key of a member's own mask, from its seed b."""
    return derive(seed, roster.info("self", member))


def pair_mask(roster: Roster, member: int, private: X25519PrivateKey, other: int) -> tuple[bytes, int]:
    """The key of the mask that two members have in common, from the first one's private key, and its sign in its vector."""
    info = roster.info("pair", min(member, other), max(member, other))
    return agree(private, roster.keys_of(other).mask, info), 1 if member < other else -1


def too_few(context: Context, count: int, what: str) -> str:
    """The sentence for fewer members than the threshold."""
    return (
        f"{count} clients {what} in the secure sum of round {context.round} where its threshold is {context.threshold}; wait "
        "longer for clients, or lower the threshold"
    )
