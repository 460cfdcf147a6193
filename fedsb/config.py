"""The whole configuration of a run: TOML in, a frozen and checked `RunConfig` out.

Defaults live in `sections.py` and nowhere else. A file in `configs/` holds only what differs.
"""

import hashlib
import json
import math
import os
import tomllib
from collections.abc import Sequence
from pathlib import Path

import tomli_w
from pydantic import Field, model_validator

from fedsb.errors import ConfigError
from fedsb.sections import (
    CLIENT,
    FRAMED,
    RANKED,
    RANKED_LORA,
    AdapterSection,
    BasisSection,
    DataSection,
    EvaluationSection,
    FederationSection,
    ModelSection,
    NaturalInt,
    PersonalSection,
    PrivacySection,
    RuntimeSection,
    Section,
    SiteName,
    StrategySection,
    TrainSection,
)
from fedsb.validation import set_key, validated

ROBUST = ("trimmed-mean", "median", "krum", "multi-krum")  # strategies that look at single states
MEANS = ("fedavg", "fedprox")  # strategies whose server takes a round's mean as it is
WHOLE = (*ROBUST, "scaffold", "fedbuff")  # strategies that count every number of a state alike


class RunConfig(Section):
    """A whole run. Immutable; equal configurations have equal digests."""

    name: SiteName = Field(description="the run's name; its folder is runs/NAME unless --out says otherwise")
    seed: NaturalInt = Field(0, description="seed of everything that is drawn: data, partition, sampling, batches, basis")
    model: ModelSection = Field(default_factory=lambda: ModelSection.model_validate({}))
    data: DataSection
    adapter: AdapterSection = Field(default_factory=lambda: AdapterSection.model_validate({}))
    basis: BasisSection = Field(default_factory=lambda: BasisSection.model_validate({}))
    train: TrainSection = Field(default_factory=lambda: TrainSection.model_validate({}))
    federation: FederationSection = Field(default_factory=lambda: FederationSection.model_validate({}))
    strategy: StrategySection = Field(default_factory=lambda: StrategySection.model_validate({}))
    personal: PersonalSection = Field(default_factory=lambda: PersonalSection.model_validate({}))
    privacy: PrivacySection = Field(default_factory=lambda: PrivacySection.model_validate({}))
    evaluation: EvaluationSection = Field(default_factory=lambda: EvaluationSection.model_validate({}))
    runtime: RuntimeSection = Field(default_factory=lambda: RuntimeSection.model_validate({}))

    @model_validator(mode="after")
    def _consistent(self) -> "RunConfig":
        names = [task.name for task in self.data.tasks]
        if len(set(names)) < len(names):
            raise ValueError("data.tasks has two tasks of one name; give each its own")
        if self.federation.names and len(self.federation.names) != self.federation.clients:
            raise ValueError(
                f"federation.names lists {len(self.federation.names)} names for {self.federation.clients} clients; "
                "make the numbers equal or leave names out"
            )
        if len(set(self.federation.names)) < len(self.federation.names):
            raise ValueError("federation.names has a name twice; give each client its own")
        if self.federation.min_clients > self.federation.clients and self.data.partition != "own":
            raise ValueError("federation.min_clients is larger than federation.clients; lower it")
        if self.federation.over_sample > 1 and self.federation.fraction == 1:
            raise ValueError("federation.over_sample has nobody more to ask where fraction = 1; lower federation.fraction")
        if (self.basis.source == "public") != (self.basis.public is not None):
            raise ValueError('basis.source = "public" and a [basis.public] section go together; set both or neither')
        if self.adapter.method not in FRAMED and self.basis.source != "random":
            raise ValueError(
                f'adapter.method = "{self.adapter.method}" has no basis for basis.source = "{self.basis.source}"; leave '
                'basis.source out, or set adapter.method = "lora-sb"'
            )
        if self.adapter.method in FRAMED and self.adapter.alpha is not None:
            raise ValueError(f'adapter.alpha scales LoRA, and adapter.method = "{self.adapter.method}" has no scale; drop it')
        if self.basis.source != "public" and (self.basis.r0 == "paper" or self.basis.sign):
            raise ValueError('basis.r0 = "paper" and basis.sign need basis.source = "public"; drop them or change the source')
        if self.data.partition == "task" and self.federation.clients < len(self.data.tasks):
            raise ValueError('data.partition = "task" needs at least as many clients as tasks; raise federation.clients')
        if self.model.kind == "classification" and len(self.data.tasks) > 1:
            raise ValueError("classification takes one task, whose labels the head has; keep one of data.tasks")
        return self

    @model_validator(mode="after")
    def _consistent_with_ranks(self) -> "RunConfig":
        adapter, privacy = self.adapter, self.privacy
        if adapter.ranks and adapter.method not in RANKED:
            raise ValueError(
                f'adapter.method = "{adapter.method}" gives every client one rank; drop adapter.ranks, or set adapter.method to '
                f"one of {', '.join(RANKED)}"
            )
        for client, rank in adapter.ranks.items():
            if rank > adapter.rank:
                raise ValueError(
                    f"adapter.ranks gives {client} rank {rank} where adapter.rank = {adapter.rank} is the largest; raise "
                    "adapter.rank or lower the client's"
                )
        if adapter.nested and adapter.method != "nested-sb":
            raise ValueError(f'adapter.nested is of adapter.method = "nested-sb" and not of "{adapter.method}"; drop it')
        if adapter.method in RANKED_LORA and (privacy.secure_sum or privacy.unit == "client"):
            raise ValueError(
                f'adapter.method = "{adapter.method}" needs each client\'s own factors, which privacy.secure_sum and '
                'privacy.unit = "client" hide in a sum; set adapter.method = "nested-sb" or another, or drop them'
            )
        if adapter.method in RANKED_LORA and adapter.ranks and privacy.unit == "record":
            raise ValueError(
                f'with adapter.method = "{adapter.method}" privacy.unit = "record" puts noise on factors beyond a client\'s '
                'rank; drop adapter.ranks, or set adapter.method = "nested-sb"'
            )
        if adapter.ranks and privacy.secure_sum:
            raise ValueError(
                "privacy.secure_sum adds up updates of one size, and with adapter.ranks they differ; drop one of the two"
            )
        if adapter.ranks and privacy.unit == "client":
            raise ValueError(
                'privacy.unit = "client" divides by the planned number of clients, and with adapter.ranks not all hold every '
                'number; drop adapter.ranks, or set privacy.unit = "record"'
            )
        return self

    @model_validator(mode="after")
    def _consistent_with_own_data(self) -> "RunConfig":
        own, labels, classifies = self.data.partition == "own", self.data.labels, self.model.kind == "classification"
        if own and classifies and not labels:
            raise ValueError('data.partition = "own" with model.kind = "classification" needs data.labels; list the labels there')
        if labels and not classifies:
            raise ValueError('data.labels are those of a classifier; drop them or set model.kind = "classification"')
        if len(set(labels)) < len(labels):
            raise ValueError("data.labels has a label twice; list each once")
        named = [task.source for task in self.data.tasks if CLIENT in task.source]
        if self.basis.public is not None and CLIENT in self.basis.public.source:
            raise ValueError(f"basis.public.source has {CLIENT}, but the server alone reads it; name one folder")
        if named and not (own and all(source.startswith("jsonl:") for source in named)):
            raise ValueError(f'{CLIENT} in {named[0]} needs a jsonl: source and data.partition = "own"; set them or leave it out')
        return self

    @model_validator(mode="after")
    def _consistent_with_privacy(self) -> "RunConfig":
        privacy, federation = self.privacy, self.federation
        targets = [name for name in ("epsilon", "noise_multiplier") if getattr(privacy, name) is not None]
        if privacy.unit == "none" and targets:
            raise ValueError(
                f'privacy.{targets[0]} protects nothing with privacy.unit = "none"; set the unit to "record" or "client"'
            )
        if privacy.unit != "none" and len(targets) != 1:
            raise ValueError(f'privacy.unit = "{privacy.unit}" needs privacy.epsilon or privacy.noise_multiplier, and not both')
        if privacy.unit != "none" and federation.weighting != "uniform":
            raise ValueError(
                'privacy.unit needs federation.weighting = "uniform", since how many examples a client has is private too; set it'
            )
        sources = [task.source for task in self.data.tasks if not task.source.startswith("gym:")]
        if privacy.unit != "none" and len({os.path.normpath(source) for source in sources}) < len(sources):
            raise ValueError("with privacy two of data.tasks may not have one source: each record would be in the data twice")
        if privacy.unit != "none" and self.data.partition == "own" and any(task.train for task in self.data.tasks):
            raise ValueError("with privacy data.tasks of a site's own take no `train`: which rows it draws depends on all")
        if self.basis.source == "sketch" and privacy.unit != "none" and privacy.epsilon is None:
            raise ValueError('basis.source = "sketch" with privacy needs privacy.epsilon, of which it takes its share; set it')
        if privacy.secure_sum and (federation.weighting != "uniform" or federation.over_sample > 1):
            raise ValueError('privacy.secure_sum needs federation.weighting = "uniform" and federation.over_sample = 1; set them')
        if privacy.secure_sum and federation.clients < 3 and self.data.partition != "own":
            raise ValueError(
                "privacy.secure_sum takes three clients or more (of two each knows the other's); raise federation.clients"
            )
        if privacy.secure_sum and privacy.unit == "client" and federation.fraction < 1:
            raise ValueError('privacy.secure_sum with privacy.unit = "client" needs federation.fraction = 1; set it')
        if privacy.unit == "client" and federation.over_sample > 1:
            raise ValueError(
                'privacy.unit = "client" needs federation.over_sample = 1: who answers first is no sample that accounts'
            )
        return self

    @model_validator(mode="after")
    def _consistent_with_strategy(self) -> "RunConfig":
        strategy, federation, privacy = self.strategy, self.federation, self.privacy
        name = f'strategy.name = "{strategy.name}"'
        if strategy.name in ROBUST and privacy.secure_sum:
            raise ValueError(f"{name} looks at single states, which privacy.secure_sum hides; use another, or no secure sum")
        if strategy.name in ROBUST and privacy.unit == "client":
            raise ValueError(
                f'{name} has no bounded sensitivity, which privacy.unit = "client" builds on; use another, or unit = "record"'
            )
        if strategy.name == "scaffold" and (privacy.secure_sum or privacy.unit != "none"):
            raise ValueError(
                f"{name} sends control variates, about a client's data, which neither noise nor a secure sum covers; "
                "use another, or no privacy.unit and privacy.secure_sum"
            )
        if strategy.name == "fedbuff":
            self._check_buffered(name)
        if strategy.name in (*ROBUST, "scaffold") and federation.weighting != "uniform":
            raise ValueError(f'{name} counts each client once; set federation.weighting = "uniform"')
        least, why = self._least_clients()
        if federation.min_clients < least:
            raise ValueError(
                f"{name} with {why} takes {least} clients or more; set federation.min_clients = {least}, so that no round counts "
                "with fewer, and have as many clients"
            )
        if strategy.name == "multi-krum" and strategy.keep > federation.min_clients - strategy.hostile - 2:
            most = federation.min_clients - strategy.hostile - 2
            raise ValueError(f"{name}: strategy.keep is at most federation.min_clients - strategy.hostile - 2 = {most}; lower it")
        return self

    @model_validator(mode="after")
    def _consistent_method_and_strategy(self) -> "RunConfig":
        adapter, strategy = self.adapter, self.strategy
        if adapter.method in RANKED_LORA and strategy.name not in MEANS:
            raise ValueError(
                f'adapter.method = "{adapter.method}" makes a mean of its own, of factors that are no updates of those before, '
                f'and strategy.name = "{strategy.name}" needs such; set strategy.name to {" or ".join(MEANS)}, or another method'
            )
        if adapter.ranks and strategy.name in WHOLE:
            raise ValueError(
                f'strategy.name = "{strategy.name}" takes states of one size, and with adapter.ranks they differ; drop '
                "adapter.ranks, or use another strategy"
            )
        return self

    def _check_buffered(self, name: str) -> None:
        federation, buffer = self.federation, self.strategy.buffer
        if self.privacy.secure_sum or self.privacy.unit != "none":
            raise ValueError(
                f"{name} takes single updates, some clients' more often than others', which no secure sum can hide and no noise "
                "was planned for; use another, or no privacy.unit and privacy.secure_sum"
            )
        if federation.fraction < 1 or federation.over_sample > 1:
            raise ValueError(
                f"{name} has strategy.concurrency for federation.fraction and federation.over_sample; leave those at 1"
            )
        if federation.min_clients > buffer:
            raise ValueError(f"{name}: federation.min_clients is more than strategy.buffer = {buffer}; lower it, or raise that")
        if buffer > federation.clients and self.data.partition != "own":
            raise ValueError(f"{name}: strategy.buffer = {buffer} is more than federation.clients; lower it")

    def _least_clients(self) -> tuple[int, str]:
        """The fewest states of which the strategy keeps what it promises, and by which setting."""
        strategy = self.strategy
        if strategy.name in ("krum", "multi-krum"):
            return 2 * strategy.hostile + 3, f"strategy.hostile = {strategy.hostile}"
        if strategy.name == "trimmed-mean":
            return max(3, math.ceil(round(1 / strategy.trim, 9))), f"strategy.trim = {strategy.trim}"
        return (3, "one of them hostile") if strategy.name == "median" else (1, "")

    @property
    def client_names(self) -> tuple[str, ...]:
        """Names of the simulated clients, in order."""
        width = len(str(self.federation.clients - 1))
        return self.federation.names or tuple(f"client-{i:0{width}d}" for i in range(self.federation.clients))

    def rank_of(self, client: str) -> int:
        """The rank at which a client trains."""
        return self.adapter.ranks.get(client, self.adapter.rank)

    def digest(self) -> str:
        """SHA-256 over all that decides the result of clients that answer as they should: so over everything but `[runtime]`,
        the longest waits, and the strikes."""
        patience = {"wait_seconds", "round_seconds", "strikes"}
        content = self.model_dump(mode="json", exclude={"runtime": True, "federation": patience})
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

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
        """Read a TOML file and apply `section.key=value` overrides, whose values are TOML or plain words.

        Raises ConfigError with the key, the file and what to do.
        """
        try:
            table = tomllib.loads(path.read_text())
        except FileNotFoundError:
            raise ConfigError(
                f"{path}: there is no such configuration file; `ls configs` shows the ones that come along"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: cannot be read ({error}); name a readable TOML file") from None
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{path}: is not valid TOML ({error}); mend that line") from None
        for override in overrides:
            set_key(table, override)
        return validated(cls, table, str(path))
