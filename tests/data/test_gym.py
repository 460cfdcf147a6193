import random
import sys
import warnings
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from reasoning_gym.dataset import ProceduralDataset
from reasoning_gym.factory import DATASETS

import fedsb.data.gym as gym
from fedsb.data.tasks import load_task
from fedsb.errors import DataError
from fedsb.sections import TaskSection


@dataclass
class TinyConfig:
    """`kinds` different questions and nothing else."""

    seed: int | None = None
    size: int = 500
    kinds: int = 10
    answer: str = "yes"

    def validate(self) -> None:
        if self.kinds <= 0:
            raise AssertionError("kinds must\nbe positive")


class TinyDataset(ProceduralDataset):
    def __init__(self, config: TinyConfig) -> None:
        super().__init__(config, config.seed, config.size)

    def __getitem__(self, idx: int) -> dict[str, Any]:
        print("noise")
        warnings.warn("noise", stacklevel=1)
        assert self.seed is not None
        question = f"q{random.Random(self.seed + idx).randrange(self.config.kinds)}"
        answer = {"none": None, "global": f"{random.random()} {np.random.random()}"}.get(self.config.answer, "yes")
        return {"question": question, "answer": answer, "metadata": {}}


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DATASETS, "tiny", (TinyDataset, TinyConfig))


def task(name: str = "tiny", train: int | None = 6, test: int | None = 4, **options: Any) -> TaskSection:
    return TaskSection(name="sums", source=f"gym:{name}", train=train, test=test, options=options)


def prompts(section: TaskSection, split: Any, seed: int = 0) -> list[str]:
    return [example.prompt for example in load_task(section, split, seed)]


def test_real_data_set_gives_text_questions_and_answers() -> None:
    examples = load_task(task("chain_sum", 20, 10, max_terms=3), "train", 0)
    assert len(examples) == 20
    assert all(e.completion == e.answer and int(e.answer) is not None and e.task == "sums" for e in examples)


@pytest.mark.parametrize("seed", range(5))
def test_splits_share_no_question_even_where_there_are_barely_enough(seed: int) -> None:
    train, test = prompts(task(), "train", seed), prompts(task(), "test", seed)
    assert (len(train), len(test)) == (6, 4)
    assert len({*train, *test}) == 10


def test_seed_decides_and_tasks_of_two_names_differ() -> None:
    many = task(kinds=10**6)
    assert prompts(many, "train") == prompts(many, "train")
    assert prompts(many, "train") != prompts(many, "train", seed=1)
    assert prompts(many, "train") != prompts(many.model_copy(update={"name": "other"}), "train")


def test_too_few_questions_give_what_there_is_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    assert len(prompts(task(train=50), "train")) == 6
    assert "has only 6 of 50 distinct train questions" in caplog.text


def test_no_question_left_for_train() -> None:
    with pytest.raises(DataError, match=r"no train question left; lower data\.tasks\.test"):
        load_task(task(test=10), "train", 0)


def test_size_must_be_set() -> None:
    with pytest.raises(DataError, match=r"set data\.tasks\.train "):
        load_task(task(train=None), "train", 0)
    with pytest.raises(DataError, match=r"set data\.tasks\.test "):
        load_task(task(test=None), "test", 0)


def test_train_alone_needs_no_test_size() -> None:
    assert len(prompts(task(test=None), "train")) == 6


def test_unknown_name_gets_the_closest() -> None:
    with pytest.raises(DataError, match=r"no such data set; did you mean gym:chain_sum\?"):
        load_task(task("chain_sun"), "train", 0)


def test_bad_options_are_named() -> None:
    with pytest.raises(DataError, match=r"has no option kind; did you mean kinds\?"):
        load_task(task(kind=3), "train", 0)
    with pytest.raises(DataError, match=r"has no option seed; it takes answer, kinds"):
        load_task(task(seed=3), "train", 0)
    with pytest.raises(DataError, match=r"options \{'kinds': 0\} \(kinds must be positive\)"):
        load_task(task(kinds=0), "train", 0)
    with pytest.raises(DataError, match=r"options \{'kinds': 'x'\}"):
        load_task(task(kinds="x"), "train", 0)


def test_data_set_without_answers() -> None:
    with pytest.raises(DataError, match="gives no answer to train on"):
        load_task(task(answer="none"), "train", 0)


def test_prints_warnings_and_global_generators_do_not_get_out(capsys: pytest.CaptureFixture[str]) -> None:
    random.seed(1)
    np.random.seed(1)
    expected = random.random(), np.random.random()
    random.seed(1)
    np.random.seed(1)
    first = load_task(task(answer="global"), "train", 0)
    assert (random.random(), np.random.random()) == expected
    assert load_task(task(answer="global"), "train", 0) == first  # what leaks in is seeded, too
    assert capsys.readouterr().out == ""


def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    with pytest.raises(DataError, match="pip install reasoning-gym"):
        load_task(task(), "train", 0)


def test_data_sets_that_follow_the_hash_seed_need_it_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gym, "HASH_SEEDED", frozenset({"tiny"}))
    monkeypatch.setattr(gym, "sys", SimpleNamespace(flags=SimpleNamespace(hash_randomization=1)))
    with pytest.raises(DataError, match="PYTHONHASHSEED=0"):
        load_task(task(), "train", 0)
    monkeypatch.setattr(gym, "sys", SimpleNamespace(flags=SimpleNamespace(hash_randomization=0)))
    assert len(prompts(task(), "train")) == 6


def test_hash_seeded_names_exist() -> None:
    assert set(DATASETS) >= gym.HASH_SEEDED
