"""What all clients of a run share now, and what of it each is known to have."""

import itertools
from dataclasses import dataclass, field

from fedsb.basis.frames import Basis, Fold, fingerprint_of, folded_fingerprint


@dataclass
class Shared:
    """The basis, which grows where a method folds into the weights what a state cannot hold.

    Attributes:
        basis: with all that was folded in so far.
        held: client → how many folds it has said that it holds. Of others nothing is known, and they are sent all.
        before: the basis before the newest fold, if one was folded in since this was made.
    """

    basis: Basis
    held: dict[str, int] = field(default_factory=dict)
    before: Basis | None = None

    def __post_init__(self) -> None:
        """Fingerprints of the basis with 0, 1, … of its folds."""
        frames = fingerprint_of(self.basis.B, self.basis.A)
        self._prints = list(itertools.accumulate(self.basis.folds, folded_fingerprint, initial=frames))

    def fold(self, more: Fold) -> None:
        """Fold in more."""
        self.before = self.basis
        self.basis = self.basis.fold(more)
        self._prints.append(self.basis.fingerprint)

    def has_all(self, client: str) -> None:
        """A client has answered for the basis as it is now."""
        self.held[client] = len(self.basis.folds)

    def lacks(self, client: str) -> tuple[str, tuple[Fold, ...]]:
        """The fingerprint of the basis that a client has, and what must be folded in to make it this one."""
        held = self.held.get(client, 0)
        return self._prints[held], self.basis.folds[held:]
