"""Who may ask what: keys, of which the server knows hashes alone."""

import hashlib
import hmac
import threading
import time
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from pydantic import Field

from fedsb.errors import ConfigError
from fedsb.sections import Section
from fedsb.validation import read_toml, validated


class KeyEntry(Section):
    """One `[[key]]` of a key file."""

    name: str = Field(min_length=1, description="for people; it is in no answer")
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="of the key: `printf %s KEY | sha256sum`")
    tenants: list[str] = Field(default_factory=list, description="whom it may ask; * stands for any characters")
    base: bool = Field(True, description="whether it may ask the base model")
    admin: bool = Field(False, description="whether it may load and unload adapters; it asks nobody then")
    requests_per_minute: int | None = Field(None, gt=0)


class _File(Section):
    """A key file."""

    key: list[KeyEntry] = Field(min_length=1)


@dataclass
class Key:
    """A key and how much it has asked lately."""

    entry: KeyEntry
    _left: float = field(init=False)
    _seen: float = field(init=False)
    _lock: threading.Lock = field(init=False, default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._left, self._seen = float(self.entry.requests_per_minute or 0), time.monotonic()

    def may_ask(self, tenant: str) -> bool:
        """Whether it may ask a tenant."""
        return not self.entry.admin and any(fnmatchcase(tenant, pattern) for pattern in self.entry.tenants)

    @property
    def may_ask_base(self) -> bool:
        """Whether it may ask the base model."""
        return self.entry.base and not self.entry.admin

    def wait(self) -> float:
        """Count a request; seconds until one is allowed, 0 if this one is."""
        rate = self.entry.requests_per_minute
        if rate is None:
            return 0.0
        with self._lock:
            now = time.monotonic()
            self._left = min(float(rate), self._left + (now - self._seen) * rate / 60)
            self._seen = now
            if self._left < 1:
                return (1 - self._left) * 60 / rate
            self._left -= 1
            return 0.0


EVERYBODY = KeyEntry.model_validate({"name": "everybody", "sha256": "0" * 64, "tenants": ["*"]})


class Keys:
    """All keys of a server; without any, whoever reaches it may do everything."""

    def __init__(self, entries: list[KeyEntry]) -> None:
        self._keys = [Key(entry) for entry in entries]
        self._open = Key(EVERYBODY)

    @property
    def needed(self) -> bool:
        """Whether a key is asked for."""
        return bool(self._keys)

    def find(self, token: str | None) -> Key | None:
        """The key that a token is; without keys, one that may do everything. Takes as long whichever it is."""
        if not self._keys:
            return self._open
        digest = hashlib.sha256((token or "").encode()).hexdigest()
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.entry.sha256, digest):
                found = key
        return found if token else None

    def is_admin(self, key: Key) -> bool:
        """Whether a key may load and unload."""
        return key.entry.admin or not self._keys


def load_keys(path: Path) -> Keys:
    """Read a key file. Raises ConfigError with what is wrong and where."""
    file = validated(_File, read_toml(path, f"--keys {path}"), f"--keys {path}", "docs/operations.md")
    if len({entry.sha256 for entry in file.key}) < len(file.key):
        raise ConfigError(f"--keys {path}: has a key twice; give each its own")
    return Keys(file.key)
