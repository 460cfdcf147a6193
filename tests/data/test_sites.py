import json
from pathlib import Path
from typing import Any

import pytest

import fedsb.data.sites as sites
from fedsb.config import RunConfig
from fedsb.data.examples import Example
from fedsb.data.sites import all_parts, client_data
from fedsb.data.tasks import Split
from fedsb.errors import DataError


def folder(path: Path, rows: int, labels: int | None = None) -> str:
    """A task of `rows` training and rows/2 test examples; each text is unique."""
    path.mkdir(parents=True)
    for split, count in (("train", rows), ("test", rows // 2)):
        texts = [f"{path.name} {split} {i}" for i in range(count)]
        forms = [{"text": t, "label": i % labels} if labels else {"prompt": t, "completion": "c"} for i, t in enumerate(texts)]
        (path / f"{split}.jsonl").write_text("".join(json.dumps(form) + "\n" for form in forms))
    return f"jsonl:{path}"


def run(*sources: str, clients: int = 4, **data: Any) -> RunConfig:
    tasks = [{"name": f"task-{i}", "source": source} for i, source in enumerate(sources)]
    return RunConfig.model_validate({"name": "x", "data": {"tasks": tasks, **data}, "federation": {"clients": clients}})


def test_everything_is_dealt_once_and_client_data_is_one_part(tmp_path: Path) -> None:
    config = run(folder(tmp_path / "a", 20), folder(tmp_path / "b", 12))
    totals: dict[Split, int] = {"train": 32, "test": 16}
    for split, total in totals.items():
        parts = all_parts(config, split)
        assert len({example.prompt for part in parts for example in part}) == total == sum(map(len, parts))
        assert all(f" {split} " in example.prompt for part in parts for example in part)
        assert [client_data(config, "any", i, split) for i in range(4)] == parts


def test_task_partition_keeps_tasks_apart_in_both_splits(tmp_path: Path) -> None:
    config = run(folder(tmp_path / "a", 20), folder(tmp_path / "b", 12), partition="task", clients=5)
    for parts in (all_parts(config, "train"), all_parts(config, "test")):
        assert [{e.task for e in part} for part in parts] == [{f"task-{i % 2}"} for i in range(5)]


def test_task_partition_of_one_labelled_task_does_not_split_by_label(tmp_path: Path) -> None:
    config = run(folder(tmp_path / "a", 40, labels=2), partition="task")
    assert [{e.label for e in part} for part in all_parts(config, "train")] == [{0, 1}] * 4


def test_task_partition_tests_nobody_on_a_foreign_task(tmp_path: Path) -> None:
    config = run(folder(tmp_path / "a", 20), folder(tmp_path / "b", 2), partition="task")
    with pytest.raises(DataError, match="the 1 examples of task number 1 cannot be dealt to its 2 clients"):
        all_parts(config, "test")


def test_dirichlet_skews_labels_and_test_follows_train(tmp_path: Path) -> None:
    config = run(folder(tmp_path / "a", 2000, labels=10), partition="dirichlet", alpha=0.1)
    for train, test in zip(all_parts(config, "train"), all_parts(config, "test"), strict=True):
        for label in range(10):
            held, got = (sum(e.label == label for e in part) for part in (train, test))
            assert abs(got - held / 2) <= 1
    assert any(len({e.label for e in part}) < 10 for part in all_parts(config, "train"))


def test_sources_are_read_once_for_many_clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[str] = []
    real = sites.load_task

    def counted(task: Any, split: Any, *more: Any) -> list[Example]:
        loads.append(split)
        return real(task, split, *more)

    monkeypatch.setattr(sites, "load_task", counted)
    config = run(folder(tmp_path / "a", 40), clients=10)
    for index in range(10):
        client_data(config, "any", index, "train")
        client_data(config, "any", index, "test")
    assert sorted(loads) == ["test", "train"]


def test_a_caller_who_changes_a_part_changes_only_his_own(tmp_path: Path) -> None:
    config = run(folder(tmp_path / "a", 8))
    all_parts(config, "train")[0].clear()
    assert len(all_parts(config, "train")[0]) == 2


def test_seed_clients_and_working_directory_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = run(folder(tmp_path / "a", 20))
    assert all_parts(base, "train") != all_parts(base.model_copy(update={"seed": 1}), "train")
    relative = run("jsonl:data")
    for name, rows in (("x", 8), ("y", 12)):
        folder(tmp_path / name / "data", rows)
        monkeypatch.chdir(tmp_path / name)
        assert sum(map(len, all_parts(relative, "train"))) == rows


def test_train_needs_no_test_file(tmp_path: Path) -> None:
    config = run(folder(tmp_path / "a", 8))
    (tmp_path / "a" / "test.jsonl").unlink()
    assert len(all_parts(config, "train")) == 4


@pytest.mark.parametrize("index", [-1, 4])
def test_number_that_no_client_has(tmp_path: Path, index: int) -> None:
    with pytest.raises(DataError, match=f"no client number {index} among 4"):
        client_data(run(folder(tmp_path / "a", 8)), "any", index, "train")


def test_own_data_is_all_of_the_folder_that_bears_the_clients_name(tmp_path: Path) -> None:
    for name, rows in (("alpha", 6), ("beta", 10)):
        folder(tmp_path / "notes" / name, rows)
    config = run(f"jsonl:{tmp_path}/notes/{{client}}", folder(tmp_path / "more", 4), partition="own")
    for split, own, more in (("train", 6, 4), ("test", 3, 2)):
        texts = [f"alpha {split} {i}" for i in range(own)] + [f"more {split} {i}" for i in range(more)]
        found = client_data(config, "alpha", 7, split)  # whatever its number
        assert [example.prompt for example in found] == texts
    assert [len(client_data(config, name, 0, "train")) for name in ("alpha", "beta")] == [10, 14]
    with pytest.raises(DataError, match=r"notes/gamma: there is no such folder; a jsonl: task is a folder with train.jsonl"):
        client_data(config, "gamma", 0, "train")


def test_own_data_of_all_simulated_clients_and_a_cap(tmp_path: Path) -> None:
    for name, rows in (("client-0", 6), ("client-1", 10)):
        folder(tmp_path / name, rows)
    config = run(f"jsonl:{tmp_path}/{{client}}", clients=2, partition="own")
    assert [len(part) for part in all_parts(config, "train")] == [6, 10]
    assert [part[0].prompt for part in all_parts(config, "test")] == ["client-0 test 0", "client-1 test 0"]
    (tmp_path / "client-1" / "train.jsonl").write_text('{"prompt": "new", "completion": "c"}\n')
    assert [len(part) for part in all_parts(config, "train")] == [6, 1]  # a site's data grows while its trainer runs
    capped = config.data.tasks[0].model_copy(update={"train": 3})
    config = config.model_copy(update={"data": config.data.model_copy(update={"tasks": (capped,)})})
    assert [len(part) for part in all_parts(config, "train")] == [3, 1]


@pytest.mark.parametrize("partition", ["own", "iid"])
def test_labels_of_the_configuration_number_everybodys_examples(tmp_path: Path, partition: str) -> None:
    for name in ("client-0", "client-1"):
        folder(tmp_path / name, 8, labels=2 if name == "client-0" else 3)
    source = f"jsonl:{tmp_path}/{'{client}' if partition == 'own' else 'client-1'}"
    tasks = {"tasks": [{"name": "t", "source": source}], "partition": partition, "labels": ["9", "2", "1", "0"]}
    table = {"name": "x", "model": {"kind": "classification"}, "data": tasks, "federation": {"clients": 2}}
    config = RunConfig.model_validate(table)
    parts = all_parts(config, "train")
    texts = {example.prompt: example.label for part in parts for example in part}
    assert [texts[f"client-1 train {i}"] for i in range(3)] == [3, 2, 1]
    if partition == "own":
        assert [example.label for example in parts[0]][:3] == [3, 2, 3]
