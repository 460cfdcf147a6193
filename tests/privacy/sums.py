"""Secure sums in one process: some clients, what they send, and who is lost at which stage."""

from collections.abc import Mapping, Sequence

import numpy as np

from fedsb.privacy.fixed_point import Words
from fedsb.privacy.member import Member
from fedsb.privacy.roster import Context
from fedsb.privacy.secure_sum import SecureSum

RUN = "run-1"
SIZE = 5


def names_of(count: int) -> list[str]:
    return [f"site-{number:02d}" for number in range(count)]


def context_of(threshold: int, size: int = SIZE, run: str = RUN, number: int = 3) -> Context:
    return Context(run, number, size, threshold)


def words(count: int, size: int = SIZE, seed: int = 0) -> list[Words]:
    """Vectors over all of the integers modulo 2^32."""
    return list(np.random.default_rng(seed).integers(0, 2**32, (count, size), dtype=np.uint32))


class Federation:
    """Some members and the server of one secure sum, led through its stages one by one.

    Args:
        vectors: one for each client, all of the same size.
        lost: client → the first stage at which it no longer answers.
    """

    def __init__(self, vectors: Sequence[Words], threshold: int, lost: Mapping[int, str] | None = None) -> None:
        self.context = context_of(threshold, vectors[0].size)
        self.members = {name: Member(name, self.context) for name in names_of(len(vectors))}
        self.vectors = dict(zip(self.members, vectors, strict=True))
        self.server = SecureSum(self.context)
        self.lost = {names_of(len(vectors))[client]: stage for client, stage in (lost or {}).items()}

    def advertise(self) -> dict[str, bytes]:
        for name, member in self.members.items():
            if self.lost.get(name) != "advertise":
                self.server.advertise(name, member.advertise())
        return self.server.roster()

    def share(self) -> dict[str, bytes]:
        for name, roster in self.advertise().items():
            if self.lost.get(name) != "share":
                self.server.share(name, self.members[name].share(roster))
        return self.server.shares()

    def mask(self) -> dict[str, bytes]:
        for name, shares in self.share().items():
            if self.lost.get(name) != "mask":
                self.server.add(name, self.members[name].mask(shares, self.vectors[name]))
        return self.server.survivors()

    def reveal(self) -> Words:
        for name, survivors in self.mask().items():
            if self.lost.get(name) != "reveal":
                self.server.reveal(name, self.members[name].reveal(survivors))
        return self.server.total()

    def plain(self) -> Words:
        """The sum of the vectors of those who are counted."""
        return np.sum([self.vectors[name] for name in self.server.names], axis=0, dtype=np.uint32)
