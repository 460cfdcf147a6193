import sys
from typing import Any

import datasets
import pytest

from fedsb.data.examples import Example
from fedsb.data.tasks import label_names, load_task
from fedsb.errors import DataError
from fedsb.sections import TaskSection


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str | None, str], Any]:
    """A hub in memory: what `load_dataset` finds under (id, name, split)."""
    content: dict[tuple[str, str | None, str], Any] = {}

    def load_dataset(identity: str, name: str | None, *, split: str) -> Any:
        return content[identity, name, split]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return content


def rows(*labels: int, names: list[str] | None = None) -> datasets.Dataset:
    label = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    features = datasets.Features({"text": datasets.Value("string"), "label": label})
    return datasets.Dataset.from_dict({"text": [f"t{i}" for i in range(len(labels))], "label": labels}, features=features)


def task(**fields: Any) -> TaskSection:
    return TaskSection(name="t", source="hub:org/set", **fields)


def test_generation_rows_of_a_named_configuration(hub: dict[Any, Any]) -> None:
    hub["org/set", "main", "test"] = datasets.Dataset.from_list([{"prompt": "a", "completion": "b", "answer": None}])
    assert load_task(task(options={"name": "main"}), "test", 0) == [Example("t", "a", "b", "b")]


def test_class_names_replace_label_numbers(hub: dict[Any, Any]) -> None:
    hub["org/set", None, "train"] = rows(0, 1, 2, names=["sad", "glad", "mad"])
    hub["org/set", None, "test"] = rows(1, names=["sad", "glad", "mad"])
    assert label_names(task()) == ("glad", "mad", "sad")
    assert [e.label for e in load_task(task(), "train", 0)] == [2, 0, 1]
    assert [e.label for e in load_task(task(), "test", 0)] == [0]


def test_plain_label_numbers(hub: dict[Any, Any]) -> None:
    hub["org/set", None, "train"] = rows(7, 10)
    assert label_names(task()) == ("7", "10")


def test_cap_is_a_sample_by_seed(hub: dict[Any, Any]) -> None:
    hub["org/set", None, "train"] = rows(*range(100))
    chosen = [e.label for e in load_task(task(train=5), "train", 0)]
    assert len(set(chosen)) == 5
    assert chosen == [e.label for e in load_task(task(train=5), "train", 0)] != [0, 1, 2, 3, 4]


def test_unlabelled_split(hub: dict[Any, Any]) -> None:
    hub["org/set", None, "train"] = rows(0, -1, names=["a", "b"])
    with pytest.raises(DataError, match="hub:org/set, train row 2: label -1 has no name"):
        load_task(task(), "train", 0)


def test_bad_row_is_named(hub: dict[Any, Any]) -> None:
    hub["org/set", None, "train"] = datasets.Dataset.from_list([{"question": "a"}])
    with pytest.raises(DataError, match='hub:org/set, train row 1: has no "text"'):
        load_task(task(), "train", 0)


def test_split_without_rows(hub: dict[Any, Any]) -> None:
    hub["org/set", None, "train"] = rows()
    with pytest.raises(DataError, match="its split train holds no rows"):
        load_task(task(), "train", 0)


@pytest.mark.parametrize("failure", [ConnectionError("no\nroute"), ValueError(), FileNotFoundError("gone")])
def test_failure_says_what_to_do(monkeypatch: pytest.MonkeyPatch, failure: Exception) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"^hub:org/set: its split train cannot be loaded \(.+\); check .* the network.*$"):
        load_task(task(), "train", 0)


def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        load_task(task(), "train", 0)


def test_unknown_option() -> None:
    with pytest.raises(DataError, match=r"has no option size; a hub data set takes only options\.name"):
        load_task(task(options={"size": 3}), "train", 0)
