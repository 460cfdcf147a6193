"""What is held out of train is nobody's to train on, the same for every seed, and scored like a test set."""

from pathlib import Path
from typing import Any

import pytest

from fedsb.config import RunConfig
from fedsb.data.examples import Example
from fedsb.data.fingerprint import data_fingerprint
from fedsb.data.holdout import hold_out
from fedsb.data.sites import all_parts, client_data, public_examples
from fedsb.data.tasks import Split, load_task
from fedsb.errors import DataError
from tests.data.test_sites import folder, run


def prompts(config: RunConfig, split: Split) -> list[str]:
    return [example.prompt for part in all_parts(config, split) for example in part]


def gym(**data: Any) -> RunConfig:
    task = {"name": "sums", "source": "gym:chain_sum", "train": 40, "test": 20}
    return RunConfig.model_validate({"name": "x", "data": {"tasks": [task], **data}, "federation": {"clients": 2}})


@pytest.mark.parametrize("partition", ["iid", "task", "size", "own"])
def test_the_three_splits_are_apart_and_nothing_is_lost(tmp_path: Path, partition: str) -> None:
    own = partition == "own"
    for name in ("client-0", "client-1"):
        folder(tmp_path / name, 40)
    config = run(f"jsonl:{tmp_path}/{'{client}' if own else 'client-0'}", clients=2, partition=partition, validation=0.2)
    train, held, test = (prompts(config, split) for split in ("train", "validation", "test"))  # type: ignore[arg-type]
    assert not set(train) & set(held) and not set(test) & {*train, *held}
    assert (len(train), len(held), len(test)) == ((64, 16, 40) if own else (32, 8, 20))
    assert all(" train " in prompt for prompt in held)
    assert [client_data(config, f"client-{i}", i, "validation") for i in range(2)] == all_parts(config, "validation")
    if own:
        assert [{e.prompt.split()[0] for e in part} for part in all_parts(config, "validation")] == [{"client-0"}, {"client-1"}]


def test_a_made_up_task_holds_out_of_its_train_questions() -> None:
    whole, config = gym(), gym(validation=0.25)
    train, held = prompts(config, "train"), prompts(config, "validation")
    assert (len(train), len(held)) == (30, 10) and {*train, *held} == set(prompts(whole, "train"))
    assert prompts(config, "test") == prompts(whole, "test")


def test_all_seeds_hold_out_the_same_and_a_cap_takes_from_the_rest(tmp_path: Path) -> None:
    config = run(folder(tmp_path / "a", 100), validation=0.1)
    seeded = config.model_copy(update={"seed": 7})
    assert sorted(prompts(config, "validation")) == sorted(prompts(seeded, "validation"))
    assert all_parts(config, "train") != all_parts(seeded, "train")
    capped = config.data.tasks[0].model_copy(update={"train": 50, "test": 6})
    held = [e.prompt for e in load_task(capped, "validation", 0, (), 0.1)]
    train = [e.prompt for e in load_task(capped, "train", 3, (), 0.1)]
    assert held == [e.prompt for e in load_task(capped, "validation", 9, (), 0.1)]
    assert len(held) == 6 and len(train) == 50 and set(held) < set(prompts(config, "validation"))
    assert not set(train) & set(prompts(config, "validation"))


def test_it_follows_the_labels_that_a_client_trains_on(tmp_path: Path) -> None:
    config = run(folder(tmp_path / "a", 2000, labels=10), partition="dirichlet", alpha=0.1, validation=0.5)
    held = all_parts(config, "validation")
    totals = [sum(e.label == label for part in held for e in part) for label in range(10)]
    dealt = all_parts(config, "train")
    for label in range(10):
        trained = sum(e.label == label for part in dealt for e in part)
        for train, scored in zip(dealt, held, strict=True):
            share = sum(e.label == label for e in train) / trained
            assert abs(sum(e.label == label for e in scored) - share * totals[label]) <= 1


def test_a_prompt_that_stands_twice_is_on_one_side() -> None:
    examples = [Example("t", f"p{i % 10}", str(i), "") for i in range(40)]
    kept, held = hold_out(examples, 0.1, "jsonl:x")
    assert held and not {e.prompt for e in kept} & {e.prompt for e in held}


def test_too_few_to_hold_out_or_to_deal(tmp_path: Path) -> None:
    source = folder(tmp_path / "a", 20)
    with pytest.raises(DataError, match=r"of its 20 train examples none is held out by data.validation = 0.01; change it"):
        all_parts(run(source, validation=0.01), "train")
    with pytest.raises(DataError, match="none is left to train on"):
        all_parts(run(source, validation=0.99), "train")
    with pytest.raises(DataError, match="2 validation examples cannot be dealt to 4 clients; .* or raise data.validation"):
        all_parts(run(source, validation=0.1), "validation")


def test_scoring_on_validation_needs_no_test_file(tmp_path: Path) -> None:
    config = run(folder(tmp_path / "a", 40), validation=0.2)
    (tmp_path / "a" / "test.jsonl").unlink()
    assert len(prompts(config, "validation")) == 8


def test_a_public_basis_is_not_made_of_what_is_held_out(tmp_path: Path) -> None:
    source = folder(tmp_path / "a", 40)
    basis = {"source": "public", "public": {"name": "open", "source": source}, "examples": 40}
    for validation, count in ((0.0, 40), (0.25, 30)):
        config = RunConfig.model_validate(run(source, validation=validation).model_dump() | {"basis": basis})
        public = {example.prompt for example in public_examples(config)}
        assert len(public) == count
        assert not validation or not public & set(prompts(config, "validation"))


def test_a_fingerprint_is_of_the_examples_and_of_who_has_them(tmp_path: Path) -> None:
    source = folder(tmp_path / "a", 40)
    config = run(source, validation=0.2)
    known = data_fingerprint(config)
    assert data_fingerprint(run(folder(tmp_path / "b" / "a", 40), validation=0.2)) == known, "whatever the folder is called"
    scored = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"split": "validation"})})
    others = [
        data_fingerprint(config.model_copy(update={"seed": 1})),
        data_fingerprint(run(source)),
        data_fingerprint(run(source, validation=0.2, clients=5)),
        data_fingerprint(scored),
    ]
    path = tmp_path / "c" / "a"
    changed = folder(path, 40)
    (path / "test.jsonl").write_text((path / "test.jsonl").read_text().replace('"completion": "c"', '"completion": "d"', 1))
    others.append(data_fingerprint(run(changed, validation=0.2)))
    assert len({known, *others}) == 1 + len(others)
