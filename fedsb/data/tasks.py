"""The examples of a task, from wherever its source says."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from fedsb.config import RunConfig
from fedsb.data.code import human_eval
from fedsb.data.examples import Example
from fedsb.data.gym import gym_examples
from fedsb.data.holdout import hold_out
from fedsb.data.hub import read_hub
from fedsb.data.jsonl import read_jsonl
from fedsb.data.rows import Row, checked_row
from fedsb.data.seeds import generator
from fedsb.data.speech import common_voice
from fedsb.errors import DataError
from fedsb.sections import TaskSection

Split = Literal["train", "validation", "test"]

UNLISTED = "is none of the run's labels; mend the row or list it in data.labels"
UNTRAINED = "does not occur in train; mend the row or add such examples"
SOURCES = "a source is gym:NAME, jsonl:FOLDER, commonvoice:FOLDER, hub:ID or code:humaneval"


def load_task(task: TaskSection, split: Split, seed: int, labels: Sequence[str] = (), validation: float = 0.0) -> list[Example]:
    """Load one split of a task, at most `task.train` or `task.test` examples of it.

    `validation` is the share of the source's train split that is held out of train (`hold_out`), before any cap; it is a split
    of its own, of at most `task.test` examples. A cap takes a sample drawn from the seed (of what is held out, the same
    whatever the seed), in the order of the source. Label ids are indices into `labels`, or where
    there are none into `label_names(task)`, so they are the same for every client, split and cap. Rows that stand in
    both files stay in both; the splits of `gym:` share no question.

    Raises DataError when the source cannot be read, a row is bad, its label is none of `labels` (does not occur in train), or
    too few examples are there to hold any out.
    """
    examples = _source(task, "test" if split == "test" else "train", seed, labels)
    if split == "train" and (empty := next((e for e in examples if e.code and not e.completion.strip()), None)):
        start = f"{' '.join(empty.prompt.split())[:40]}…"
        raise DataError(
            f'{task.source}: its train split has a program without a completion ("{start}"), which would teach a model to say '
            "nothing; add one, or drop the row",
            quoted=start,
        )
    limit = task.train if split == "train" else task.test
    if validation and split != "test":
        examples, held = hold_out(examples, validation, task.source)
        if split == "validation":
            return held[:limit]
    if limit is None or limit >= len(examples):
        return examples
    chosen = generator(seed, "sample", task.name, split).choice(len(examples), size=limit, replace=False)
    return [examples[i] for i in sorted(chosen.tolist())]


def _source(task: TaskSection, split: Literal["train", "test"], seed: int, labels: Sequence[str]) -> list[Example]:
    """All that the source has of a split; of `gym:`, as much as the task asks for."""
    if task.source.startswith("gym:"):
        return gym_examples(task, split, seed)
    rows = _rows(task, split)
    names = {} if rows[0].label is None else {name: i for i, name in enumerate(labels or label_names(task))}
    unknown = UNLISTED if labels else UNTRAINED
    return [_example(task, row, names, unknown) for row in rows]


def labels_of(config: RunConfig) -> Sequence[str]:
    """What the outputs of a run's classifier stand for, in order: `data.labels`, or else `label_names` of its task.

    Empty for a causal model. Raises DataError as `label_names` does, which alone reads data.
    """
    if config.model.kind != "classification":
        return ()
    return config.data.labels or label_names(config.data.tasks[0])


def label_names(task: TaskSection) -> tuple[str, ...]:
    """The labels of a classification task: all of its train split, as text, sorted (as numbers if all are integers).

    Raises DataError when the source cannot be read or has no labels.
    """
    rows = [] if task.source.startswith("gym:") else _rows(task, "train")
    labels = {row.label for row in rows if row.label is not None}
    if not labels:
        raise DataError(f'{task.source}: has no labels; use a task with text and label, or set model.kind = "causal"')
    if all(re.fullmatch("-?[0-9]{1,18}", label) for label in labels):
        return tuple(sorted(labels, key=lambda label: (int(label), label)))
    return tuple(sorted(labels))


def _rows(task: TaskSection, split: Literal["train", "test"]) -> list[Row]:
    kind, _, name = task.source.partition(":")
    readers: dict[str, Callable[[], list[Row]]] = {
        "jsonl": lambda: read_jsonl(Path(name), split),
        "commonvoice": lambda: [checked_row(row, place, Path(name)) for place, row in common_voice(Path(name), split)],
        "code": lambda: _problems(task, split),
        "hub": lambda: read_hub(name, _configuration(task), split),
    }
    if kind not in readers or not name:
        raise DataError(f"task {task.name}: source {task.source!r} is of no known kind; {SOURCES}")
    rows = readers[kind]()
    for row in rows:
        if (row.label is None, row.speech is None) != (rows[0].label is None, rows[0].speech is None):
            raise DataError(f"{row.place}: is of another form than the first row; keep prompts, labels and recordings apart")
    return rows


def _problems(task: TaskSection, split: Literal["train", "test"]) -> list[Row]:
    if task.source != "code:humaneval":
        raise DataError(f"task {task.name}: source {task.source!r} is of no known kind; {SOURCES}")
    return [checked_row(row, f"{task.source}, {split} row {i}") for i, row in enumerate(human_eval(split), 1)]


def _configuration(task: TaskSection) -> str | None:
    unknown = sorted(set(task.options) - {"name"})
    if unknown:
        raise DataError(f"{task.source}: has no option {unknown[0]}; a hub data set takes only options.name")
    return str(task.options["name"]) if "name" in task.options else None


def _example(task: TaskSection, row: Row, names: dict[str, int], unknown: str) -> Example:
    if row.label is None:
        return Example(task.name, row.prompt, row.completion, row.answer, code=row.code, speech=row.speech)
    if row.label not in names:
        raise DataError(f"{row.place}: label {row.label!r} {unknown}", quoted=repr(row.label))
    return Example(task.name, row.prompt, "", "", names[row.label])
