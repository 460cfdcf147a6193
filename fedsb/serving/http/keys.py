"""Who may ask what: keys, of which the server knows hashes alone. The file is looked at with each request, so that a key which
is taken out of it opens nothing any more."""

import hashlib
import hmac
import logging
import re
import secrets
import threading
import time
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import tomli_w
from pydantic import Field

from fedsb.errors import ConfigError
from fedsb.sections import Section
from fedsb.store.files import read_file, stamp_of, write_file
from fedsb.validation import read_toml, validated

log = logging.getLogger(__name__)


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

    key: list[KeyEntry] = Field(default_factory=list)


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
    """All keys of a server, as a file has them now; without a file, whoever reaches it may do everything.

    A file that can no longer be read changes nothing, and the log says so; one without keys lets nobody in.

    Raises ConfigError if the file cannot be read, or has no keys yet.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path, self._keys = path, list[Key]()
        self._seen = stamp_of(path) if path else None
        self._open, self._lock = Key(EVERYBODY), threading.Lock()
        if path:
            self._keys = [Key(entry) for entry in entries_of(path)]
            if not self._keys:
                raise ConfigError(f"--keys {path}: has no keys; make one with `fedsb key add NAME --file {path}`")

    @property
    def needed(self) -> bool:
        """Whether a key is asked for."""
        return self._path is not None

    def find(self, token: str | None) -> Key | None:
        """The key that a token is; without a file, one that may do everything. Takes as long whichever it is."""
        if self._path is None:
            return self._open
        self._look(self._path)
        digest = hashlib.sha256((token or "").encode()).hexdigest()
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.entry.sha256, digest):
                found = key
        return found if token else None

    def is_admin(self, key: Key) -> bool:
        """Whether a key may load and unload."""
        return key.entry.admin or not self.needed

    def _look(self, path: Path) -> None:
        """Take what has changed in the file; a key that stays goes on counting its requests."""
        with self._lock:
            seen = stamp_of(path)
            if seen == self._seen:
                return
            self._seen = seen
            try:
                entries = entries_of(path)
            except ConfigError as error:
                log.error("the keys stay as they were: %s", error)
                return
            before = {key.entry.sha256: key for key in self._keys if key.entry in entries}
            self._keys = [before.get(entry.sha256) or Key(entry) for entry in entries]
            log.info("%s was changed: %d keys", path, len(entries))


def entries_of(path: Path) -> list[KeyEntry]:
    """What a key file says. Raises ConfigError with what is wrong and where."""
    file = validated(_File, read_toml(path, f"--keys {path}"), f"--keys {path}", "docs/operations.md")
    if len({entry.sha256 for entry in file.key}) < len(file.key):
        raise ConfigError(f"--keys {path}: has a key twice; give each its own")
    return file.key


def add_key(path: Path, entry: Mapping[str, object]) -> str:
    """Make a key, write its hash and what it may into a file, which is made if it is not there, and return the key.

    Raises ConfigError if the file is broken or has a key of that name, DiskError if it cannot be written; then it is as it was.
    """
    key = f"fedsb-{secrets.token_urlsafe(32)}"
    name = str(entry["name"])
    if path.exists() and name in {each.name for each in entries_of(path)}:
        raise ConfigError(f"--file {path}: has a key {name} already; revoke it first, or choose another name")
    told = {"name": name, "sha256": hashlib.sha256(key.encode()).hexdigest(), **entry}
    validated(KeyEntry, told, f"key {name}", "docs/operations.md")
    before = read_file(path).decode().rstrip("\n") + "\n\n" if path.exists() else ""
    write_file(path, (before + tomli_w.dumps({"key": [told]})).encode())
    return key


def revoke_key(path: Path, name: str) -> None:
    """Take a key out of a file; everything else in it stays as it is written.

    Raises ConfigError if the file is broken or has no such key, DiskError if it cannot be written.
    """
    entries = entries_of(path)
    if name not in {entry.name for entry in entries}:
        raise ConfigError(f"--file {path}: has no key {name}, but {', '.join(e.name for e in entries) or 'none'}; choose one")
    first, *blocks = re.split(r"(?m)^(?=[ \t]*\[\[[ \t]*key[ \t]*\]\])", read_file(path).decode())
    kept = [block for block in blocks if tomllib.loads(block)["key"][0]["name"] != name]
    left = "".join([first, *kept])
    if tomllib.loads(left).get("key", []) != [e.model_dump(exclude_unset=True) for e in entries if e.name != name]:
        raise ConfigError(f"--file {path}: is not written with a [[key]] for each key; take {name} out by hand")
    write_file(path, left.encode())
