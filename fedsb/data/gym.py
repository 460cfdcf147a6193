"""Questions that reasoning-gym makes up, with train and test disjoint by content."""

import contextlib
import dataclasses
import difflib
import io
import itertools
import logging
import random
import sys
import warnings
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from fedsb.data.examples import Example
from fedsb.data.seeds import derived_seed
from fedsb.errors import DataError
from fedsb.sections import TaskSection

REPEATS = 200  # so many known questions in a row, and the data set counts as used up
HASH_SEEDED = frozenset(  # measured with reasoning-gym 0.1.25: other questions or answers under another PYTHONHASHSEED
    {
        "intermediate_integration",
        "isomorphic_strings",
        "knight_swap",
        "polynomial_multiplication",
        "ransom_note",
        "word_ladder",
    }
)

log = logging.getLogger(__name__)


def gym_examples(task: TaskSection, split: Literal["train", "test"], seed: int) -> list[Example]:
    """Make `task.train` or `task.test` examples of `gym:NAME`, no question twice.

    The test questions come first, from their own seed; a training question that is among them is skipped, so the two
    splits share no question in any process. A data set with too few distinct questions gives what it has, the test
    split first, and says so in the log.

    Raises DataError for an unknown data set, options it does not take, a size that is not set, a data set without
    answers, and when no question is left.
    """
    name = task.source.removeprefix("gym:")
    known = _known_datasets(name)
    _check_options(task, name, known[name][1])
    wanted = _size(task, split)
    with _contained():
        tests = _distinct(task, "test", task.test or 0, seed, frozenset())
        taken = frozenset(example.prompt for example in tests)
        examples = tests if split == "test" else _distinct(task, "train", wanted, seed, taken)
    if not examples:
        raise DataError(f"{task.source}: has no {split} question left; lower data.tasks.test or widen options")
    if len(examples) < wanted:
        log.warning("%s has only %d of %d distinct %s questions", task.source, len(examples), wanted, split)
    return examples


def _known_datasets(name: str) -> dict[str, Any]:
    try:
        with _contained():
            from reasoning_gym.factory import DATASETS
    except ImportError:
        raise DataError(f"gym:{name}: needs the package reasoning-gym; pip install reasoning-gym") from None
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=1)
        remedy = f"did you mean gym:{near[0]}?" if near else "reasoning_gym.factory.DATASETS lists them all"
        raise DataError(f"gym:{name}: reasoning-gym has no such data set; {remedy}")
    if name in HASH_SEEDED and sys.flags.hash_randomization:
        raise DataError(
            f"gym:{name}: its examples depend on Python's hash seed and differ between processes; "
            "start every process with PYTHONHASHSEED=0 or choose another data set"
        )
    return dict(DATASETS)


def _check_options(task: TaskSection, name: str, config: Any) -> None:
    allowed = sorted({field.name for field in dataclasses.fields(config)} - {"seed", "size"})
    for option in task.options:
        if option not in allowed:
            near = difflib.get_close_matches(option, allowed, n=1)
            remedy = f"did you mean {near[0]}?" if near else f"it takes {', '.join(allowed) or 'none'}"
            raise DataError(f"gym:{name}: has no option {option}; {remedy}")


def _size(task: TaskSection, split: Literal["train", "test"]) -> int:
    size = task.train if split == "train" else task.test
    if size is None:
        raise DataError(f"{task.source}: makes as many examples as it is told to; set data.tasks.{split} (task {task.name})")
    return size


@contextlib.contextmanager
def _contained() -> Iterator[None]:
    """Some data sets print, some warn, some draw from or seed the global generators: none of it gets out."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def _distinct(task: TaskSection, split: str, wanted: int, seed: int, taken: frozenset[str]) -> list[Example]:
    seen, repeats = set(taken), 0
    found: list[Example] = []
    questions = _questions(task, split, wanted, seed)
    while len(found) < wanted and repeats < REPEATS:
        example = _example(task, next(questions))
        repeats = repeats + 1 if example.prompt in seen else 0
        if not repeats:
            seen.add(example.prompt)
            found.append(example)
    return found


def _questions(task: TaskSection, split: str, size: int, seed: int) -> Iterator[dict[str, Any]]:
    """Endless: one data set of `size` questions after another, each with a seed of 31 bits (some take no more)."""
    import reasoning_gym

    name = task.source.removeprefix("gym:")
    for part in itertools.count():
        part_seed = derived_seed(seed, task.name, task.source, split, part) % 2**31
        random.seed(part_seed)
        np.random.seed(part_seed)
        try:
            dataset = reasoning_gym.create_dataset(name, seed=part_seed, size=size, **task.options)
            for i in range(size):
                yield dataset[i]
        except Exception as error:  # assertions and type errors of 100 data sets about their options
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(f"{task.source}: makes no questions with options {task.options} ({reason}); change them") from error


def _example(task: TaskSection, item: dict[str, Any]) -> Example:
    question, answer = item["question"], item["answer"]
    if answer is None or not str(answer):
        raise DataError(f"{task.source}: gives no answer to train on, only a way to score one; choose another data set")
    return Example(task.name, question, str(answer), str(answer))
