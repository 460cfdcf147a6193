"""Tenants by name: whose adapters there are in stores; loaded when first asked for, in their newest version, and kept while they
are used. A request keeps the version that it began with."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from fedsb.errors import FedsbError, StoreError
from fedsb.serving.bank import Bank, BankFull, Place
from fedsb.serving.forms import Formed
from fedsb.serving.sources import Source


@dataclass
class _Held:
    """A version in the bank: where, how many requests use it, and whether a newer one or an unloading has taken its place.

    mark: the source that it came from, and that source's mark of it.
    """

    version: int
    mark: object
    place: Place
    users: int = 0
    stale: bool = False


@dataclass(frozen=True)
class Lease:
    """One request's right to a version of an adapter; `Tenants.give_back` ends it."""

    name: str
    version: int
    place: Place
    held: _Held


class Tenants:
    """What a server can serve. Safe to use from several threads.

    Args:
        sources: of a name that several have the first one's counts.
        bank: where adapters are held; when it is full, those go that were used longest ago and are not in use.
    """

    def __init__(self, sources: Sequence[Source], bank: Bank) -> None:
        self.sources, self.bank = sources, bank
        self._held: OrderedDict[str, _Held] = OrderedDict()  # used longest ago first
        self._hidden: set[str] = set()
        self._lock = threading.RLock()

    def names(self) -> list[str]:
        """Of all tenants that can be asked for, sorted. Raises StoreError if a source is gone."""
        return sorted({name for source in self.sources for name in source.names()} - self._hidden)

    @property
    def loaded(self) -> int:
        """Adapters that lie in the bank."""
        return len(self._held)

    def has(self, name: str) -> bool:
        """Whether there is such a tenant; a name that is none is simply not there."""
        return name not in self._hidden and self._source(name) is not None

    def take(self, name: str) -> Lease:
        """The newest version of a tenant's adapter, loaded if it is not yet, for one request.

        Raises StoreError if there is no such tenant, BankFull if all that are loaded are in use, AdapterError or BasisError if
        its files cannot be used with this model. Then whatever was loaded stays.
        """
        with self._lock:
            source = self._source(name)
            if source is None or name in self._hidden:
                raise StoreError(f"there is no adapter of {name}; `fedsb serve` has those of its stores")
            mark, held = (source, source.mark(name)), self._held.get(name)
            if held is None or held.mark != mark:
                held = self._load(source, name, mark)
            self._held.move_to_end(name)
            held.users += 1
            return Lease(name, held.version, held.place, held)

    def give_back(self, lease: Lease) -> None:
        """End a lease; what was stale and is used no more goes."""
        with self._lock:
            lease.held.users -= 1
            if lease.held.stale and not lease.held.users:
                self.bank.remove(lease.held.place)

    def load(self, name: str) -> int:
        """Have a tenant's newest adapter at hand, also one that was unloaded; returns its version. Raises as `take`."""
        with self._lock:
            hidden = name in self._hidden
            self._hidden.discard(name)
            try:
                lease = self.take(name)
            except FedsbError:
                if hidden:
                    self._hidden.add(name)
                raise
            self.give_back(lease)
            return lease.version

    def unload(self, name: str) -> bool:
        """Let a tenant be asked for no more until it is loaded again; requests that have it go on. False: it is not there."""
        with self._lock:
            if not self.has(name):
                return False
            self._hidden.add(name)
            self._retire(name)
            return True

    def _source(self, name: str) -> Source | None:
        return next((source for source in self.sources if source.has(name)), None)

    def _load(self, source: Source, name: str, mark: object) -> _Held:
        version = source.version(name)
        place = self._put(name, source.load(name, version))
        self._retire(name)
        self._held[name] = _Held(version, mark, place)
        return self._held[name]

    def _put(self, name: str, told: Formed) -> Place:
        while True:
            try:
                return self.bank.put(told, name)
            except BankFull as full:
                idle = next((n for n, held in self._held.items() if not held.users and held.place.group == full.group), None)
                if idle is None:
                    raise
                self._retire(idle)

    def _retire(self, name: str) -> None:
        held = self._held.pop(name, None)
        if held is None:
            return
        held.stale = True
        if not held.users:
            self.bank.remove(held.place)
