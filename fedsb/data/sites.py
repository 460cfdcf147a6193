"""What each client holds: the tasks of a configuration, loaded and dealt out, or with `partition = "own"` its own sources."""

import functools
import os
from collections.abc import Sequence
from typing import Literal, NamedTuple

from fedsb.config import RunConfig
from fedsb.data.examples import Example
from fedsb.data.partition import partition, partition_like
from fedsb.data.tasks import Split, labels_of, load_task
from fedsb.errors import DataError
from fedsb.sections import CLIENT, DataSection


class _Key(NamedTuple):
    """All that decides the parts; sections hold dicts and cannot be hashed, their JSON can."""

    data: str
    seed: int
    clients: int
    folder: str  # relative jsonl: folders start here


class _Dealt(NamedTuple):
    groups: list[int]
    parts: list[list[int]]
    examples: tuple[tuple[Example, ...], ...]


def all_parts(config: RunConfig, split: Split) -> list[list[Example]]:
    """The examples of every simulated client, in the order of `config.client_names`.

    Under `own` each holds all that its sources have, read anew. Otherwise what is scored on follows train sets: under `task` each
    task's test examples are dealt evenly to its clients, under all other partitions in proportion to the labels (or tasks)
    that a client trains on (`partition_like`); and the last few results are kept, so files are taken not to change while a
    process runs.

    Raises DataError when a source cannot be read or there are too few examples for the clients.
    """
    return [client_data(config, name, index, split) for index, name in enumerate(config.client_names)]


def client_data(config: RunConfig, name: str, index: int, split: Split) -> list[Example]:
    """The examples of one client. Under `own` its name decides, and under all other partitions its number
    (0 ≤ index < federation.clients).

    Raises DataError as `all_parts` does, and for a number that no client has.
    """
    if config.data.partition == "own":
        return _own(config, name, split)
    clients = config.federation.clients
    if not 0 <= index < clients:
        raise DataError(f"there is no client number {index} among {clients}; count from 0 or raise federation.clients")
    dealt = _train(_key(config)) if split == "train" else _scored(_key(config), split)
    return list(dealt.examples[index])


def _own(config: RunConfig, name: str, split: Split) -> list[Example]:
    tasks = [task.model_copy(update={"source": task.source.replace(CLIENT, name)}) for task in config.data.tasks]
    data = config.data
    return [example for task in tasks for example in load_task(task, split, config.seed, data.labels, data.validation)]


def public_examples(config: RunConfig) -> list[Example]:
    """At most `basis.examples` of what the server itself has in `[basis.public]`, drawn, since files are often sorted, and none
    that is held out for validation. Raises DataError as `load_task` does."""
    task, data = config.basis.public, config.data
    assert task is not None  # RunConfig checks it
    wanted = min(config.basis.examples, task.train or config.basis.examples)
    examples = load_task(task.model_copy(update={"train": wanted}), "train", config.seed, labels_of(config))
    if not data.validation or data.partition == "own":
        return examples
    held = {e.prompt for each in data.tasks for e in load_task(each, "validation", config.seed, data.labels, data.validation)}
    return [example for example in examples if example.prompt not in held]


def _key(config: RunConfig) -> _Key:
    return _Key(config.data.model_dump_json(), config.seed, config.federation.clients, os.getcwd())


@functools.lru_cache(maxsize=4)
def _train(key: _Key) -> _Dealt:
    data = DataSection.model_validate_json(key.data)
    assert data.partition != "own"
    examples, groups = _load(data, "train", key.seed)
    return _dealt(examples, groups, partition(data.partition, groups, key.clients, data.alpha, key.seed))


@functools.lru_cache(maxsize=4)
def _scored(key: _Key, split: Literal["validation", "test"]) -> _Dealt:
    data = DataSection.model_validate_json(key.data)
    examples, groups = _load(data, split, key.seed)
    if data.partition == "task":
        return _dealt(examples, groups, partition("task", groups, key.clients, data.alpha, key.seed))
    train = _train(key)
    return _dealt(examples, groups, partition_like(train.parts, train.groups, groups, key.seed, split))


def _dealt(examples: Sequence[Example], groups: list[int], parts: list[list[int]]) -> _Dealt:
    return _Dealt(groups, parts, tuple(tuple(examples[i] for i in part) for part in parts))


def _load(data: DataSection, split: Split, seed: int) -> tuple[list[Example], list[int]]:
    """All examples and their groups: the label where there is one to skew by, the number of the task otherwise."""
    loaded = [
        (number, example)
        for number, task in enumerate(data.tasks)
        for example in load_task(task, split, seed, data.labels, data.validation)
    ]
    by_task = data.partition == "task"
    groups = [number if by_task or example.label is None else example.label for number, example in loaded]
    return [example for _, example in loaded], groups
