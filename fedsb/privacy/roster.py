"""Who takes part in one secure sum, with which public keys, and the digest that everything in it is bound to.

Bonawitz et al., CCS 2017, eprint 2017/281, figure 4, rounds 0 and 1: the list of users with their keys c_u^PK (shares are
encrypted under them) and s_u^PK (masks are agreed with them). Members are numbered from 1 in the order of their names, which
is also their place in Shamir's scheme.
"""

import functools
import hashlib
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from fedsb.errors import SecureSumError
from fedsb.privacy.masks import KEY

LABEL = b"fedsb secure sum 1"
MOST_MEMBERS, LONGEST_NAME = 2**16 - 1, 255  # of their fields on the wire


@dataclass(frozen=True)
class Context:
    """What server and clients know of a secure sum before it begins; equal everywhere, or no share can be opened.

    Attributes:
        run: names the run, and whatever else must be the same everywhere: its configuration, the basis, the fixed point.
        round: the round of the run.
        size: numbers in a vector.
        threshold: how many clients must stay to the end, and how many shares rebuild a secret (t in the paper).
    """

    run: str
    round: int
    size: int
    threshold: int

    def __post_init__(self) -> None:
        if not (2 <= self.threshold <= MOST_MEMBERS and self.size >= 1 and self.round >= 0):
            raise SecureSumError(
                f"a secure sum needs a threshold of 2 or more, vectors of 1 number or more and a round from 0 on, not "
                f"{self.threshold}, {self.size} and {self.round}; correct the configuration"
            )

    def to_bytes(self) -> bytes:
        """As it enters the digest; it does not travel with the secure sum."""
        run = self.run.encode()
        return struct.pack("<Q", len(run)) + run + struct.pack("<QQH", self.round, self.size, self.threshold)


def two_thirds(members: int) -> int:
    """⌊2n/3⌋ + 1: the threshold that the paper has for a server that lies and has clients on its side (section 6).

    With less, a server that only lies learns more than it should; see `secure_sum`.
    """
    return 2 * members // 3 + 1


@dataclass(frozen=True)
class Keys:
    """The X25519 public keys of one member, 32 bytes each, fresh in every round.

    Attributes:
        share: shares for this member are encrypted under it (c_u^PK).
        mask: masks are agreed with it (s_u^PK).
    """

    share: bytes
    mask: bytes

    def to_bytes(self) -> bytes:
        """64 bytes."""
        return self.share + self.mask

    @classmethod
    def from_bytes(cls, data: bytes) -> "Keys":
        """The inverse of `to_bytes`. Raises SecureSumError for another number of bytes."""
        if len(data) != 2 * KEY:
            raise SecureSumError(f"public keys of {len(data)} bytes came where {2 * KEY} were expected; leave this client out")
        return cls(data[:KEY], data[KEY:])


@dataclass(frozen=True)
class Roster:
    """The members of one secure sum.

    Attributes:
        context: what the sum is for.
        names: of the members, ascending; member i has the place i - 1.
        keys: theirs, in the same order.

    Guarantees:
        A roster that exists has no name or key twice, at least `threshold` members, and a threshold above half of them.
        Rosters that differ in anything, their context included, have other digests (SHA-256).

    Edge cases, all SecureSumError:
        | roster                                    | why                                                              |
        |-------------------------------------------|------------------------------------------------------------------|
        | fewer members than the threshold          | no secret could be rebuilt                                       |
        | a threshold of half or less               | two groups without a common member could give both shares of one |
        | a name twice, or names out of order       | one client would count as two                                    |
        | a key twice                               | one client would pass for another                                |
        | torn bytes, or bytes after the end        | nobody who keeps to the protocol sends them                      |
    """

    context: Context
    names: tuple[str, ...]
    keys: tuple[Keys, ...]

    def __post_init__(self) -> None:
        count, threshold = len(self.names), self.context.threshold
        if not threshold <= count <= MOST_MEMBERS:
            raise SecureSumError(
                f"{count} clients take part in the secure sum of round {self.context.round} where its threshold is {threshold}; "
                "wait for more clients, or lower the threshold"
            )
        if 2 * threshold <= count:
            raise SecureSumError(
                f"the threshold {threshold} is not more than half of the {count} clients of a secure sum; raise it to "
                f"{two_thirds(count)}"
            )
        if len(set(self.names)) < count:
            raise SecureSumError("the roster of the secure sum has a name twice; take no part in this round")
        if list(self.names) != sorted(self.names):
            raise SecureSumError("the roster of the secure sum is not in the order of its names; take no part in this round")
        if len({key for keys in self.keys for key in (keys.share, keys.mask)}) < 2 * count:
            raise SecureSumError("the roster of the secure sum has a key twice; take no part in this round")

    @classmethod
    def of(cls, context: Context, keys: Mapping[str, Keys]) -> "Roster":
        """From name → keys."""
        names = tuple(sorted(keys))
        return cls(context, names, tuple(keys[name] for name in names))

    @functools.cached_property
    def digest(self) -> bytes:
        """32 bytes that stand for context, names and keys."""
        return hashlib.sha256(LABEL + self.context.to_bytes() + self.to_bytes()).digest()

    @property
    def members(self) -> range:
        """All members' numbers, from 1."""
        return range(1, len(self.names) + 1)

    def member(self, name: str) -> int:
        """The number of a name. Raises SecureSumError if it is not on the roster."""
        if name not in self.names:
            raise SecureSumError(f"{name} is not on the roster of the secure sum of round {self.context.round}; leave it out")
        return self.names.index(name) + 1

    def name(self, member: int) -> str:
        """The name of a number."""
        return self.names[member - 1]

    def keys_of(self, member: int) -> Keys:
        """The keys of a number."""
        return self.keys[member - 1]

    def info(self, use: str, *members: int) -> bytes:
        """What a derived key is bound to: its use, the members that it is for, and this roster."""
        return LABEL + use.encode() + struct.pack(f"<{len(members)}H", *members) + self.digest

    def to_bytes(self) -> bytes:
        """As it travels: the number of members, and of each the length of its name, its name and its keys (65 + n bytes)."""
        entries = [(name.encode(), keys.to_bytes()) for name, keys in zip(self.names, self.keys, strict=True)]
        if any(not 0 < len(name) <= LONGEST_NAME for name, _ in entries):
            raise SecureSumError(f"a secure sum takes names of 1 to {LONGEST_NAME} bytes; rename the client")
        return struct.pack("<H", len(entries)) + b"".join(bytes([len(name)]) + name + keys for name, keys in entries)

    @classmethod
    def from_bytes(cls, context: Context, data: bytes) -> "Roster":
        """The inverse of `to_bytes`, for bytes of an untrusted sender. Raises SecureSumError."""
        names, keys, at = [], [], 2
        try:
            for _ in range(struct.unpack_from("<H", data)[0]):
                start = at + 1 + data[at]
                names.append(data[at + 1 : start].decode())
                at = start + 2 * KEY
                keys.append(Keys.from_bytes(data[start:at]))
        except (struct.error, IndexError, UnicodeDecodeError, SecureSumError):
            at = -1
        if at != len(data):
            raise SecureSumError(f"a roster of {len(data)} bytes cannot be read; take no part in this round")
        return cls(context, tuple(names), tuple(keys))

    def pack_members(self, members: Collection[int]) -> bytes:
        """Some of the members as they travel: one bit each, ⌈n/8⌉ bytes."""
        return sum(1 << (member - 1) for member in members).to_bytes(self.bitmap_size, "little")

    def unpack_members(self, data: bytes) -> frozenset[int]:
        """The inverse of `pack_members`, for bytes of an untrusted sender. Raises SecureSumError."""
        bits = int.from_bytes(data, "little")
        if len(data) != self.bitmap_size or bits >> len(self.names):
            raise SecureSumError(f"a list of members in {len(data)} bytes is none of this roster; take no part in this round")
        return frozenset(member for member in self.members if bits >> (member - 1) & 1)

    @property
    def bitmap_size(self) -> int:
        """Bytes of a list of members."""
        return -(-len(self.names) // 8)
