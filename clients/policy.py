"""What a site allows: a TOML file that its own operator writes, read anew for every question, so a change acts at once.

The server sends its configuration with each question; one that goes beyond the policy is refused with a reason, and the run
goes on without this site. What is not named in the file is not limited.
"""

import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

from pydantic import Field

from fedsb.abilities import PROMPTING
from fedsb.config import RunConfig
from fedsb.errors import PolicyError
from fedsb.sections import PositiveFloat, PositiveInt, Section
from fedsb.validation import read_toml, validated

Names = Annotated[tuple[str, ...] | None, Field(strict=False)]


EXAMPLES = {
    "methods": '["lora-sb"]',
    "models": '["smollm2-*"]',
    "tasks": '["jsonl:/data/*"]',
    "max_rank": "64",
    "max_steps": "100",
    "max_rounds": "50",
    "max_epsilon": "8.0",
    "at_delta": "1e-6",
    "data_may_change": "true",
    "secure_sum_only": "true",
    "test_scores_may_leave": "false",
    "personal_adapter_may_leave": "false",
}


class Policy(Section):
    """The policy of a site. Patterns are those of a shell: `*` stands for any characters."""

    methods: Names = Field(None, description="adapter.method must be one of these")
    models: Names = Field(None, description="model.source must match one of these patterns")
    tasks: Names = Field(None, description="the source of every task must match one of these patterns")
    max_rank: PositiveInt | None = Field(None, description="largest adapter.rank, times the heads if there are any")
    max_steps: PositiveInt | None = Field(None, description="most optimiser steps in one round, or in personalisation")
    max_rounds: PositiveInt | None = Field(None, description="most rounds of a run")
    max_epsilon: PositiveFloat | None = Field(
        None,
        description="largest ε that all runs together may spend of this site's data, by its ledger; without privacy none may",
    )
    at_delta: Annotated[float, Field(gt=0, lt=1)] = Field(
        1e-5, description="δ at which max_epsilon is counted; at the most one over the number of this site's examples"
    )
    data_may_change: bool = Field(
        False,
        description="true: training data other than those that the site's ledger knows are taken; what is spent of both adds up",
    )
    secure_sum_only: bool = Field(
        False, description="true: only runs in which the server sees no single site's update (privacy.secure_sum)"
    )
    test_scores_may_leave: bool = Field(True, description="false: how well a model does on this site's test set is not told")
    personal_adapter_may_leave: bool = Field(
        True, description="false: the personal adapter stays on this site's disk and is not published"
    )

    def check(self, config: RunConfig) -> None:
        """Raise PolicyError, which names the setting, its value and the limit, if a run goes beyond this policy."""
        adapter, steps = config.adapter, max(config.train.steps, config.personal.steps)
        if self.methods is not None and adapter.method not in self.methods:
            raise _beyond("adapter.method", adapter.method, f"methods = {list(self.methods)}")
        if self.models is not None and not _matches(config.model.source, self.models):
            raise _beyond("model.source", config.model.source, f"models = {list(self.models)}")
        if self.models is not None and adapter.method in PROMPTING and not _matches(adapter.encoder, self.models):
            raise _beyond("adapter.encoder", adapter.encoder, f"models = {list(self.models)}")
        for task in config.data.tasks:
            if self.tasks is not None and not _matches(task.source, self.tasks):
                raise _beyond("data.tasks", task.source, f"tasks = {list(self.tasks)}")
        if self.max_epsilon is not None and config.privacy.unit == "client":
            raise PolicyError(
                f"the site's policy allows only privacy by record (max_epsilon = {self.max_epsilon}): on noise that the server "
                "promises this site cannot count"
            )
        if self.max_epsilon is not None and config.privacy.unit == "none":
            raise PolicyError(
                f"the site's policy allows no run without differential privacy (max_epsilon = {self.max_epsilon}); this is one"
            )
        if self.secure_sum_only and not config.privacy.secure_sum:
            raise _beyond("privacy.secure_sum", "false", "secure_sum_only = true")
        for key, value, limit in (
            ("adapter.rank" + " × heads" * (config.head_count > 1), adapter.rank * config.head_count, "max_rank"),
            ("train.steps or personal.steps", steps, "max_steps"),
            ("federation.rounds", config.federation.rounds, "max_rounds"),
        ):
            most = getattr(self, limit)
            if most is not None and value > most:
                raise _beyond(key, value, f"{limit} = {most}")


def template() -> str:
    """A policy file that allows everything, with every setting explained."""
    lines = ["# What this site allows. A line without # limits; * stands for any characters."]
    for name, field in Policy.model_fields.items():
        lines += [f"# {field.description}", f"#{name} = {EXAMPLES[name]}"]
    return "\n".join(lines) + "\n"


def load_policy(path: Path) -> Policy:
    """Read a site's policy. Raises ConfigError with the key, the file and what to do."""
    table = read_toml(path, str(path), "without the site's policy nothing is answered")
    return validated(Policy, table, str(path), "docs/operations.md")


def _matches(source: str, patterns: tuple[str, ...]) -> bool:
    """A path out of a pattern's folder (`jsonl:/data/../home`) matches nothing."""
    return ".." not in re.split(r"[:/\\]", source) and any(fnmatchcase(source, pattern) for pattern in patterns)


def _beyond(key: str, value: object, limit: str) -> PolicyError:
    return PolicyError(f"the site's policy does not allow {key} = {value} ({limit})")
