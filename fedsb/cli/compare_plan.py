"""What a comparison consists of: a configuration with `[compare]`, taken apart into runs, and checked before any of them."""

import copy
import difflib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from fedsb.adapters.attach import attach
from fedsb.adapters.instances import encoder_of, identity_of
from fedsb.adapters.methods import METHODS
from fedsb.cli.simulate import check_clients
from fedsb.config import RunConfig, read_table
from fedsb.data.fingerprint import data_fingerprint
from fedsb.data.tasks import labels_of
from fedsb.errors import ConfigError
from fedsb.models import locate, outline_model
from fedsb.sections import CompareSection, Section
from fedsb.training.loop import learning_rate
from fedsb.validation import set_value, validated

OURS = ("name", "seed", "data.validation", "evaluation.split")  # settings that differ between the runs of one comparison
fingerprint_of_data = lru_cache(maxsize=None)(lambda run: data_fingerprint(RunConfig.from_json(run)))


class _File(Section):
    compare: CompareSection


@dataclass(frozen=True)
class Run:
    """One federation of a comparison.

    Attributes:
        name: of the method or variant.
        factor: of the learning rate that the method would take by itself.
        rate: the learning rate.
    """

    name: str
    factor: float
    rate: float
    config: RunConfig

    @property
    def title(self) -> str:
        """What it is called on the screen."""
        trying = f", learning rate {self.rate:g}, on validation" if self.config.evaluation.split == "validation" else ""
        return f"{self.name}, seed {self.config.seed}{trying}"


@dataclass(frozen=True)
class Comparison:
    """Methods and variants, and the seeds with which each runs.

    Attributes:
        name: of the configuration.
        tables: name of a method or variant → its run as a table, without a seed.
    """

    path: Path
    name: str
    section: CompareSection
    tables: Mapping[str, dict[str, Any]]
    seeds: Sequence[int]

    @property
    def factors(self) -> Sequence[float]:
        """Of the learning rates; tried if there are two or more."""
        return self.section.rates or (1.0,)

    @property
    def size(self) -> int:
        """How many runs there are."""
        return sum(len(self.tried(name)) + len(self.seeds) for name in self.tables)

    def tried(self, name: str) -> list[Run]:
        """The runs on the validation split, one a factor; none if there is nothing to choose."""
        if len(self.factors) < 2:
            return []
        more = {
            "data.validation": self.section.validation,
            "evaluation.split": "validation",
            "personal.steps": 0,  # the choice is by the global adapter
        }
        return [self._run(name, self.section.tuning_seed, factor, more) for factor in self.factors]

    def final(self, name: str, factor: float) -> list[Run]:
        """The runs on the test split, one a seed."""
        return [self._run(name, seed, factor, {}) for seed in self.seeds]

    def check(self) -> None:
        """Raise a FedsbError for whatever of any run can be known to be wrong before the first: settings, data, shapes."""
        for name in self.tables:
            for run in (*self.tried(name), *self.final(name, self.factors[0])):
                config = run.config
                check_clients(config, self._where(name))
                if config.privacy.unit != "none" and config.privacy.scores == "withheld":
                    raise ConfigError(f'{self._where(name)}: privacy.scores = "withheld" leaves nothing to compare; set "plain"')
            for run in (*self.tried(name)[:1], *self.final(name, self.factors[0])):
                identify(run.config)
            outline = outline_model(locate(config.model.source), config.model, len(labels_of(config)) or None)
            attach(outline, config)

    def _run(self, name: str, seed: int, factor: float, more: Mapping[str, Any]) -> Run:
        table = copy.deepcopy(self.tables[name])
        for key, value in {"seed": seed, **more}.items():
            set_value(table, key, value, self._where(name))
        config = validated(RunConfig, table, self._where(name))
        rate = learning_rate(config)
        if factor != 1:
            rate = float(f"{factor * rate:.6g}")
            train = config.train.model_copy(update={"learning_rate": rate})
            config = config.model_copy(update={"train": train})
        return Run(name, factor, rate, config)

    def _where(self, name: str) -> str:
        return f"{self.path}, {name}"


def identify(config: RunConfig) -> dict[str, str]:
    """What a result is known by: SHA-256 of settings, base model (with the encoder, if there is one) and data. Raises FedsbError
    for a model or data that fail."""
    model = identity_of(locate(config.model.source), encoder_of(config))
    return {"config": config.digest(), "model": model, "data": fingerprint_of_data(config.to_json())}


def load_comparison(path: Path, overrides: Sequence[str], methods: Sequence[str], seeds: Sequence[int]) -> Comparison:
    """Read a configuration with `[compare]`; `methods` and `seeds`, if any, stand for those in it.

    Raises ConfigError: what is named is unknown or named twice, or a method cannot do what the configuration asks.
    """
    base = read_table(path, overrides)
    section = validated(_File, {"compare": base.pop("compare", {})}, str(path)).compare
    names, seeds = methods or section.methods, seeds or section.seeds
    for what, values, option in (("methods", names, "--methods lora-sb,lora"), ("seeds", seeds, "--seeds 0,1,2")):
        if not values:
            raise ConfigError(f"{path}: no {what} to compare; give {option} or set compare.{what}")
        _once(values, f"{path}: compare.{what}")
    _once(section.rates, f"{path}: compare.rates")
    if len(section.rates) > 1 and section.tuning_seed in seeds:
        raise ConfigError(f"{path}: compare.tuning_seed = {section.tuning_seed} is one of the seeds; choose another one")
    _reserved(base, str(path), OURS[2:])
    tables = {name: _table(base, name, section, path) for name in names}
    found = Comparison(path, str(base.get("name")), section, tables, tuple(seeds))
    for name in names:
        found.final(name, 1.0)  # the ConfigError of each method
    return found


def _table(base: dict[str, Any], name: str, section: CompareSection, path: Path) -> dict[str, Any]:
    """A run's table: the configuration with what a method or variant changes."""
    known = {**{method: {"adapter.method": method} for method in METHODS}, **section.variants}
    if shadowed := sorted(METHODS.keys() & section.variants.keys()):
        raise ConfigError(f"{path}: compare.variants.{shadowed[0]} bears the name of a method; give it one of its own")
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        remedy = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise ConfigError(f"{path}: {name} is neither a method nor one of compare.variants; {remedy}")
    table, where = copy.deepcopy(base), f"{path}: compare.variants.{name}"
    for key, value in _settings(known[name]):
        if key in OURS:
            raise ConfigError(f"{where} sets {key}, which `fedsb compare` itself does; leave it out")
        set_value(table, key, copy.deepcopy(value), where)
    return table


def _settings(variant: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """`section.key` → value, whether the section is a table (`adapter.rank = 8`) or part of the key (`"adapter.rank" = 8`)."""
    for key, value in variant.items():
        if isinstance(value, dict) and "." not in key:
            yield from ((f"{key}.{inner}", each) for inner, each in value.items())
        else:
            yield key, value


def _reserved(base: Mapping[str, Any], path: str, keys: Sequence[str]) -> None:
    for key in keys:
        section, name = key.split(".")
        if isinstance(found := base.get(section), dict) and name in found:
            raise ConfigError(f"{path}: {key} is set by `fedsb compare` itself, from compare.validation; leave it out")


def _once(values: Sequence[object], where: str) -> None:
    if twice := [value for value, count in Counter(values).items() if count > 1]:
        raise ConfigError(f"{where} has {twice[0]} twice; name each once")
