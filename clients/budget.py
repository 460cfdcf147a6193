"""What leaves a site under differential privacy: allowed by its budget before it is computed, in its ledger before it leaves.

    budget (this run's ε, the site's cap) → the noisy answer → the answer on disk → the entry in the ledger → the reply

A process killed between any two of these has at worst paid for what nobody got. The same question asked again, after a
crash of either side, gets the same answer from the disk and costs nothing.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flwr.app import RecordDict
from torch import Tensor

from clients.policy import Policy
from clients.session import Session, Site
from fedsb.config import RunConfig
from fedsb.data.examples import Example
from fedsb.data.fingerprint import heard
from fedsb.errors import BudgetError, LedgerError
from fedsb.privacy.mechanism import Mechanism, delta_of, mechanism_of
from fedsb.store.ledger import NAME, Entry, Ledger, now, spent
from fedsb.store.tensors import load_tensors, save_tensors
from strategies.envelope import to_bytes
from strategies.records import ARRAYS, Order
from strategies.sums import SECRETS

STATE = "state"


@dataclass(frozen=True)
class Budget:
    """What one client may release in one run, and where it is written down."""

    config: RunConfig
    site: Site
    policy: Policy
    dataset: str
    records: int

    @classmethod
    def of(cls, session: Session, site: Site, policy: Policy) -> "Budget":
        """The budget of a site's training data in a session's run."""
        examples = session.examples(site, "train")
        return cls(session.config, site, policy, fingerprint(examples), len(examples))

    @property
    def ledger(self) -> Ledger:
        """This client's ledger."""
        return Ledger(self.site.folder / self.site.name / NAME, self.site.name)

    @property
    def units(self) -> int:
        """How many there are of what is protected: this client's records, or the planned clients."""
        return self.config.federation.clients if self.config.privacy.unit == "client" else self.records

    @property
    def mechanism(self) -> Mechanism:
        """The mechanism of this run for this client."""
        return mechanism_of(self.config, self.units)

    def own(self, entries: Sequence[Entry] | None = None) -> list[Entry]:
        """The entries of this run."""
        found = self.ledger.entries() if entries is None else entries
        return [entry for entry in found if entry.config == self.config.digest()]

    def catch_up(self, server_round: int) -> None:
        """With privacy by client, write down the rounds that this client was not drawn for: it might have been."""
        with self.ledger.turn():
            missed = server_round - max((entry.round for entry in self.own()), default=0)
            if missed > 0:
                self.ledger.add(self._entry(self.mechanism, missed, "not drawn", server_round, ""))

    def allow(self, steps: int, mechanism: Mechanism | None = None) -> None:
        """Raise BudgetError if `steps` more, of this run's mechanism or another, would cross the run's ε or the site's cap, and
        LedgerError for other data."""
        entries = self.ledger.entries()
        known = {entry.dataset for entry in entries}
        if known and self.dataset not in known and not self.policy.data_may_change:
            raise LedgerError(
                f"{self.site.name}: its ledger counts what was released of another data set ({sorted(known)[0][:12]}) than the "
                f"one there now ({self.dataset[:12]}); put that data back, or let its operator set data_may_change = true in the "
                "site's policy, so that both count together"
            )
        own = self.own(entries)
        for limit, before, at, accountant, name in (
            (self.config.privacy.epsilon, own, delta_of(self.config, self.units), "best", "privacy.epsilon of this run"),
            (
                self.policy.max_epsilon,
                entries,
                min(self.policy.at_delta, 1 / self.records),
                "rdp",  # which holds too where what is asked depends on what was answered, over runs that nobody planned together
                "max_epsilon of the site's policy",
            ),
        ):
            if limit is None:
                continue
            planned = getattr(spent([*before, self._entry(mechanism or self.mechanism, steps)], at), accountant)
            if planned > limit:
                raise BudgetError(
                    f"{self.site.name}: {steps} more steps would spend ε = {planned:.3f} at δ = {at:.1e} where "
                    f"{name} = {limit}, and {getattr(spent(before, at), accountant):.3f} is spent; nothing is released"
                )

    def release(
        self,
        kind: str,
        content: RecordDict,
        steps: int,
        work: Callable[[Mechanism], Tensor],
        mechanism: Mechanism | None = None,
    ) -> Tensor:
        """The answer to a question (size,): `work`'s, paid for, or the one that was paid for before.

        With privacy by client and a secure sum each mask brings noise of its own, so each is paid for.
        """
        order = Order.of(content)
        names = (ARRAYS,) if self.config.privacy.unit == "record" else (ARRAYS, SECRETS)  # masks are new each time
        records = to_bytes(RecordDict({name: content[name] for name in names if name in content}))
        asked = json.dumps([kind, self.config.digest(), order.round, order.basis])  # what a resumed run may change is not in it
        question = hashlib.sha256(asked.encode() + records).hexdigest()
        path = self.site.folder / self.site.name / "released" / self.config.digest()[:16] / f"{question}.safetensors"
        with self.ledger.turn():
            if path.exists() and question in {entry.answer for entry in self.ledger.entries()}:
                return load_tensors(path)[0][STATE]
            mechanism = mechanism or self.mechanism
            self.allow(steps, mechanism)
            answer = work(mechanism)
            _forget(path.parent)
            save_tensors(path, {STATE: answer}, {"question": question})
            self.ledger.add(self._entry(mechanism, steps, kind, order.round, question))
            return answer

    def _entry(self, mechanism: Mechanism, steps: int, what: str = "", round: int = 0, answer: str = "") -> Entry:
        return Entry(
            client=self.site.name,
            dataset=self.dataset,
            records=self.records,
            run=self.config.name,
            config=self.config.digest(),
            round=round,
            what=what,
            unit=self.config.privacy.unit,
            noise_multiplier=mechanism.noise_multiplier,
            sample_rate=mechanism.sample_rate,
            steps=steps,
            clip_norm=mechanism.clip_norm,
            answer=answer,
            time=now(),
        )


def fingerprint(examples: Sequence[Example]) -> str:
    """SHA-256 over examples, whatever their order."""
    lines = sorted(json.dumps([e.task, e.prompt, e.completion, e.label, *heard(e)]) for e in examples)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _forget(folder: Path) -> None:
    """Only the newest answer of a run is kept: the one before it has arrived, or its round is over."""
    for old in folder.glob("*.safetensors"):
        old.unlink()
