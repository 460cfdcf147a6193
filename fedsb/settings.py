"""All settings of a run, and which of them do not go together.

What is refused here is refused before anything is read or trained, in one sentence that says what to change.
"""

import math
import os
from typing import Any

from pydantic import Field, model_validator

from fedsb.abilities import (
    FOLDING,
    IN_TURN,
    MEANS,
    NO_RECORDS,
    OWN_SETTINGS,
    PROMPTING,
    RANKED,
    RANKED_LORA,
    RANKS,
    ROBUST,
    SOURCES,
    WHOLE,
)
from fedsb.adapter_section import AdapterSection
from fedsb.sections import (
    CLIENT,
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
    TrackSection,
    TrainSection,
)


class Settings(Section):
    """What a run is told."""

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
    track: TrackSection = Field(default_factory=lambda: TrackSection.model_validate({}))

    @model_validator(mode="before")
    @classmethod
    def _with_the_methods_own(cls, table: Any) -> Any:
        """Let `basis.source` and `adapter.rank` be by default what the method has."""
        try:
            adapter, method = table["adapter"], table["adapter"]["method"]
            if method in RANKS:
                table = {**table, "adapter": {"rank": RANKS[method], **adapter}}
            if method in SOURCES:
                table = {**table, "basis": {"source": SOURCES[method][0], **table.get("basis", {})}}
        except (KeyError, TypeError):  # no method, or a table that the fields will refuse
            pass
        return table

    @model_validator(mode="after")
    def _consistent(self) -> "Settings":
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
        sources = SOURCES.get(self.adapter.method, ("random",))
        if self.basis.source not in sources:
            raise ValueError(
                f'adapter.method = "{self.adapter.method}" has no basis for basis.source = "{self.basis.source}"; set it to '
                f'{" or ".join(sources)}, or adapter.method = "lora-sb"'
            )
        if (self.basis.source == "pool") != (self.basis.pool is not None):
            raise ValueError('basis.source = "pool" and basis.pool go together; set both or neither')
        if self.adapter.method in (*FOLDING, "lora-ga") and self.model.dtype == "bf16":
            raise ValueError(
                f'adapter.method = "{self.adapter.method}" adds to the base model\'s weights what model.dtype = "bf16" would '
                'round away; leave model.dtype out, or set adapter.method = "lora-sb"'
            )
        if self.adapter.method in FOLDING and self.federation.wire_dtype == "bf16":
            raise ValueError(
                f'adapter.method = "{self.adapter.method}" is exact only with federation.wire_dtype = "fp32"; leave it out'
            )
        if self.adapter.method in PROMPTING and self.model.kind != "causal":
            raise ValueError(
                f'adapter.method = "{self.adapter.method}" puts a prompt before what a causal model reads; '
                'set model.kind = "causal", or another method'
            )
        if self.basis.source != "public" and (self.basis.r0 == "paper" or self.basis.sign):
            raise ValueError('basis.r0 = "paper" and basis.sign need basis.source = "public"; drop them or change the source')
        if self.data.partition == "task" and self.federation.clients < len(self.data.tasks):
            raise ValueError('data.partition = "task" needs at least as many clients as tasks; raise federation.clients')
        if self.model.kind == "classification" and len(self.data.tasks) > 1:
            raise ValueError("classification takes one task, whose labels the head has; keep one of data.tasks")
        if self.evaluation.split == "validation" and not self.data.validation:
            raise ValueError('evaluation.split = "validation" needs data.validation, the share of train to hold out; set it')
        return self

    @model_validator(mode="after")
    def _consistent_with_ranks(self) -> "Settings":
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
        if adapter.nested and privacy.unit != "none":
            raise ValueError(
                "adapter.nested lets each client draw ranks for itself, which privacy.unit does not allow; drop one of the two"
            )
        if adapter.nested and adapter.method != "nested-sb":
            raise ValueError(f'adapter.nested is of adapter.method = "nested-sb" and not of "{adapter.method}"; drop it')
        if adapter.method in RANKED_LORA and (privacy.secure_sum or privacy.unit == "client"):
            raise ValueError(
                f'adapter.method = "{adapter.method}" needs each client\'s own factors, which privacy.secure_sum and '
                'privacy.unit = "client" hide in a sum; set adapter.method = "nested-sb" or another, or drop them'
            )
        if adapter.method != "nested-sb" and adapter.ranks and privacy.unit == "record":
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
    def _consistent_with_own_data(self) -> "Settings":
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
        if named and not (own and all(source.startswith(("jsonl:", "commonvoice:")) for source in named)):
            raise ValueError(
                f'{CLIENT} in {named[0]} needs a folder as source and data.partition = "own"; set both or leave it out'
            )
        return self

    @model_validator(mode="after")
    def _consistent_with_privacy(self) -> "Settings":
        privacy, federation = self.privacy, self.federation
        targets = [name for name in ("epsilon", "noise_multiplier") if getattr(privacy, name) is not None]
        if privacy.unit == "none" and targets:
            raise ValueError(
                f'privacy.{targets[0]} protects nothing with privacy.unit = "none"; set the unit to "record" or "client"'
            )
        if privacy.head_clip_norm is not None and (privacy.unit != "record" or self.model.kind != "classification"):
            raise ValueError(
                "privacy.head_clip_norm clips the head's part of records' gradients; set privacy.unit = \"record\" with "
                'model.kind = "classification", or leave it out'
            )
        if privacy.unit != "none" and len(targets) != 1:
            raise ValueError(f'privacy.unit = "{privacy.unit}" needs privacy.epsilon or privacy.noise_multiplier, and not both')
        if privacy.unit != "none" and self.adapter.method == "dylora" and self.adapter.draw == "step":
            raise ValueError(
                'privacy.unit needs adapter.draw = "round": ranks that each client draws for itself ("step") break it; set it'
            )
        if privacy.unit != "none" and federation.weighting != "uniform":
            raise ValueError(
                'privacy.unit needs federation.weighting = "uniform", since how many examples a client has is private too; set it'
            )
        if privacy.unit == "record" and self.adapter.method in NO_RECORDS:
            raise ValueError(
                f'privacy.unit = "record" needs gradients of single records, which adapter.method = "{self.adapter.method}" does '
                'not give; set privacy.unit = "client", or adapter.method = "lora-sb", "ffa-lora" or "lora"'
            )
        sources = [task.source for task in self.data.tasks if not task.source.startswith("gym:")]
        if privacy.unit != "none" and len({os.path.normpath(source) for source in sources}) < len(sources):
            raise ValueError("with privacy two of data.tasks may not have one source: each record would be in the data twice")
        if privacy.unit != "none" and self.data.partition == "own" and any(task.train for task in self.data.tasks):
            raise ValueError("with privacy data.tasks of a site's own take no `train`: which rows it draws depends on all")
        if privacy.unit != "none" and self.data.partition == "own" and self.data.validation:
            raise ValueError("with privacy a site's own data take no data.validation: which rows it holds out depends on all")
        if self.basis.source == "sketch" and privacy.unit != "none" and privacy.epsilon is None:
            raise ValueError('basis.source = "sketch" with privacy needs privacy.epsilon, of which it takes its share; set it')
        if self.adapter.method in FOLDING and (privacy.secure_sum or privacy.unit == "client"):
            raise ValueError(
                f'adapter.method = "{self.adapter.method}" adds to the weights after each round from each client\'s own state, '
                'which privacy.secure_sum and privacy.unit = "client" hide; set adapter.method = "lora-sb", or '
                'privacy.unit = "record"'
            )
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
    def _consistent_with_strategy(self) -> "Settings":
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
    def _consistent_method_and_strategy(self) -> "Settings":
        adapter, strategy, privacy = self.adapter, self.strategy, self.privacy
        for key, strategies in OWN_SETTINGS.items():
            chosen = getattr(strategy, key) != StrategySection.model_fields[key].default
            if chosen and strategy.name not in strategies:
                raise ValueError(f'strategy.{key} is of {", ".join(strategies)}, and not of "{strategy.name}"; drop it')
        if self.basis.r0 == "paper" and adapter.method == "lora-ga":
            raise ValueError('basis.r0 = "paper" is a core\'s, and adapter.method = "lora-ga" has none; drop it')
        if adapter.method in (*RANKED_LORA, *FOLDING) and strategy.name not in MEANS:
            raise ValueError(
                f'adapter.method = "{adapter.method}" makes a mean of its own, of factors that are no updates of those before, '
                f'and strategy.name = "{strategy.name}" needs such; set strategy.name to {" or ".join(MEANS)}, or another method'
            )
        if adapter.method in IN_TURN and strategy.name not in MEANS:
            raise ValueError(
                f'adapter.method = "{adapter.method}" trains one head a round, and strategy.name = "{strategy.name}" is about '
                f'all of them; set strategy.name to {" or ".join(MEANS)}, or adapter.method = "ravan"'
            )
        if adapter.method in IN_TURN and (privacy.secure_sum or privacy.unit == "client"):
            raise ValueError(
                f'adapter.method = "{adapter.method}" trains one head a round, and privacy.secure_sum and privacy.unit = '
                '"client" are about all of them; leave both out, or set adapter.method = "ravan"'
            )
        if adapter.method in IN_TURN and (adapter.heads or 1) > self.federation.rounds:
            raise ValueError(
                f"adapter.heads = {adapter.heads} are trained one after another, and there are federation.rounds = "
                f"{self.federation.rounds}; lower adapter.heads"
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
