"""The whole configuration of a run: TOML in, a frozen and checked `RunConfig` out.

Defaults live in `sections.py` and nowhere else. A file in `configs/` holds only what differs.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli_w

from fedsb.abilities import BASES, HEADED, HEADS, IN_TURN
from fedsb.errors import ConfigError
from fedsb.settings import Settings
from fedsb.validation import read_toml, set_key, validated


class RunConfig(Settings):
    """A whole run. Immutable; equal configurations have equal digests."""

    @property
    def client_names(self) -> tuple[str, ...]:
        """Names of the simulated clients, in order."""
        width = len(str(self.federation.clients - 1))
        return self.federation.names or tuple(f"client-{i:0{width}d}" for i in range(self.federation.clients))

    def rank_of(self, client: str) -> int:
        """The rank at which a client trains."""
        return self.adapter.ranks.get(client, self.adapter.rank)

    @property
    def head_count(self) -> int:
        """How many heads a layer has; 1 for methods without."""
        if self.adapter.method not in HEADED:
            return 1
        return self.adapter.heads or (min(HEADS, self.federation.rounds) if self.adapter.method in IN_TURN else HEADS)

    @property
    def base_count(self) -> int:
        """How many random matrices each factor of NOLA is made of."""
        return self.adapter.bases or BASES

    def turn(self, server_round: int) -> int:
        """Which head, from 0, is trained in a round, from 1, by a method that has them in turn; after the last round the last."""
        done = min(server_round, self.federation.rounds) - 1
        return max(done, 0) * self.head_count // self.federation.rounds

    def digest(self) -> str:
        """SHA-256 over all that decides the result of clients that answer as they should: so over everything but `[runtime]`
        and `[track]`, the longest waits, and the strikes. What is at its default is left out, so that a later version with more
        settings knows a run again. So a default must never change its meaning: another default takes another name."""
        patience = {"wait_seconds", "round_seconds", "strikes"}
        content = self.model_dump(
            mode="json", exclude={"runtime": True, "track": True, "federation": patience}, exclude_defaults=True
        )
        chosen = {name: value for name, value in content.items() if value != {}}
        if self.model.kind == "classification":
            chosen["head"] = "standardised"  # once it was not, and such a run's state means something else
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()

    def to_toml(self) -> str:
        """The configuration as resolved, every default written out."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))

    def to_json(self) -> str:
        """One line, for messages between server and clients."""
        return self.model_dump_json(exclude_none=True)

    @classmethod
    def from_json(cls, text: str) -> "RunConfig":
        """Read what `to_json` wrote. Raises ConfigError."""
        return validated(cls, json.loads(text), "the server's configuration")

    @classmethod
    def load(cls, path: Path, overrides: Sequence[str] = ()) -> "RunConfig":
        """`read_table`, checked. Raises ConfigError with the key, the file and what to do."""
        return validated(cls, read_table(path, overrides), str(path))


def read_table(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a TOML file and apply `section.key=value` overrides, whose values are TOML or plain words. Raises ConfigError."""
    if not path.exists():
        raise ConfigError(f"{path}: there is no such configuration file; `ls configs` shows the ones that come along")
    table = read_toml(path, str(path))
    for override in overrides:
        set_key(table, override)
    return table
