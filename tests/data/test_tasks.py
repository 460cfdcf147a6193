import json
from pathlib import Path
from typing import Any

import pytest

from fedsb.config import RunConfig
from fedsb.data.examples import Example
from fedsb.data.tasks import label_names, labels_of, load_task
from fedsb.errors import DataError
from fedsb.sections import TaskSection


def jsonl_task(folder: Path, train_rows: Any, test_rows: Any = (), **caps: Any) -> TaskSection:
    """Write the two files: lists of rows, or the text itself."""
    for split, rows in (("train", train_rows), ("test", test_rows)):
        text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text)
    return TaskSection(name="wards", source=f"jsonl:{folder}", **caps)


def labelled(*labels: str | int) -> list[dict[str, str | int]]:
    return [{"text": f"text {i}", "label": label} for i, label in enumerate(labels)]


def test_generation_rows_answer_defaults_to_completion(tmp_path: Path) -> None:
    rows = [{"prompt": "2+2?", "completion": "so 4", "answer": "4", "more": 1}, {"prompt": "1+1?", "completion": "2"}]
    assert load_task(jsonl_task(tmp_path, rows), "train", 0) == [
        Example("wards", "2+2?", "so 4", "4"),
        Example("wards", "1+1?", "2", "2"),
    ]


def test_test_split_comes_from_its_own_file(tmp_path: Path) -> None:
    task = jsonl_task(tmp_path, [{"prompt": "a", "completion": "b"}], [{"prompt": "c", "completion": "d"}])
    assert load_task(task, "test", 0) == [Example("wards", "c", "d", "d")]


def test_relative_folder_starts_at_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    jsonl_task(tmp_path / "data", [{"prompt": "a", "completion": "b"}])
    monkeypatch.chdir(tmp_path)
    assert len(load_task(TaskSection(name="t", source="jsonl:data"), "train", 0)) == 1


def test_byte_order_mark_blank_lines_windows_ends_and_line_separators_are_no_rows(tmp_path: Path) -> None:
    text = '\ufeff{"prompt": "a\u2028b", "completion": "c"}\r\n\r\n{"prompt": "d", "completion": ""}'
    examples = load_task(jsonl_task(tmp_path, text), "train", 0)
    assert [e.prompt for e in examples] == ["a\u2028b", "d"]
    assert examples[1].answer == ""


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "is not JSON"),
        ("[1]", "is not an object"),
        ('{"completion": "b"}', 'has no "prompt"'),
        ('{"prompt": "a"}', 'has no "completion"'),
        ('{"prompt": 1, "completion": "b"}', '"prompt" is of type int'),
        ('{"prompt": "a", "completion": null}', '"completion" is null'),
        ('{"prompt": "a", "completion": "b", "answer": 4}', '"answer" is of type int'),
        ('{"prompt": " ", "completion": "b"}', '"prompt" is empty'),
        ('{"prompt": "\\ud800", "completion": "b"}', "not Unicode"),
        ('{"question": "a"}', 'has no "text"'),
        ('{"text": "a"}', 'has no "label"'),
        ('{"text": "", "label": 1}', '"text" is empty'),
        ('{"text": "a", "label": true}', '"label" is of type bool'),
        ('{"text": "a", "label": 1.5}', '"label" is of type float'),
        ('{"text": "a", "label": ""}', '"label" is empty'),
        ('{"prompt": "a", "tests": "b"}', 'has no "language"'),
        ('{"prompt": "a", "tests": " ", "language": "py"}', '"tests" is empty'),
        ('{"prompt": "a", "tests": "b", "language": "py", "stop_tokens": "c"}', '"stop_tokens" is no list of texts'),
        ('{"prompt": "a", "tests": "b", "language": "py", "stop_tokens": [""]}', '"stop_tokens" is no list of texts'),
        ('{"prompt": "a", "tests": "b", "language": "py", "completion": 1}', '"completion" is of type int'),
        ('{"text": "a", "label": "x"}', "another form than the first row"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_bad_row_is_named_with_file_and_line(tmp_path: Path, line: str, complaint: str) -> None:
    task = jsonl_task(tmp_path, '{"prompt": "a", "completion": "b"}\n\n' + line + "\n")
    with pytest.raises(DataError) as caught:
        load_task(task, "train", 0)
    assert str(caught.value).startswith(f"{tmp_path}/train.jsonl:3: ")
    assert complaint in str(caught.value)


def test_bytes_that_are_not_utf8_are_named_with_file_and_line(tmp_path: Path) -> None:
    task = jsonl_task(tmp_path, "")
    (tmp_path / "train.jsonl").write_bytes(b'{"prompt": "a", "completion": "b"}\n{"prompt": "\xe4"}\n')
    with pytest.raises(DataError, match=r"train\.jsonl:2: is not UTF-8"):
        load_task(task, "train", 0)


def test_missing_folder_missing_file_and_empty_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: there is no such folder"):
        load_task(TaskSection(name="t", source=f"jsonl:{tmp_path}/nowhere"), "train", 0)
    with pytest.raises(DataError, match=r"test\.jsonl: is missing"):
        load_task(TaskSection(name="t", source=f"jsonl:{tmp_path}"), "test", 0)
    with pytest.raises(DataError, match=r"train\.jsonl: holds no rows"):
        load_task(jsonl_task(tmp_path, "\n"), "train", 0)


@pytest.mark.parametrize("source", ["csv:data", "data", "jsonl:", "hub:"])
def test_source_of_no_known_kind(source: str) -> None:
    with pytest.raises(DataError, match="a source is gym:NAME, jsonl:FOLDER, commonvoice:FOLDER, hub:ID or code:humaneval"):
        load_task(TaskSection(name="t", source=source), "train", 0)


def test_label_names_are_sorted_integers_as_numbers(tmp_path: Path) -> None:
    assert label_names(jsonl_task(tmp_path, labelled(10, 9, 2, 10))) == ("2", "9", "10")
    assert label_names(jsonl_task(tmp_path, labelled("b", "10", "a", "9"))) == ("10", "9", "a", "b")


def test_label_ids_agree_in_both_splits_and_under_a_cap(tmp_path: Path) -> None:
    task = jsonl_task(tmp_path, labelled("c", "a", "b", "c"), labelled("b", "c"), train=1)
    assert label_names(task) == ("a", "b", "c")
    assert [e.label for e in load_task(task, "test", 0)] == [1, 2]
    whole = load_task(task.model_copy(update={"train": None}), "train", 0)
    assert [e.label for e in whole] == [2, 0, 1, 2]
    assert load_task(task, "train", 0)[0] in whole
    assert whole[0] == Example("wards", "text 0", "", "", 2)


def test_test_label_that_train_does_not_have(tmp_path: Path) -> None:
    task = jsonl_task(tmp_path, labelled("a", "b"), labelled("a", "z"))
    with pytest.raises(DataError, match=r"test\.jsonl:2: label 'z' does not occur in train"):
        load_task(task, "test", 0)


def test_labels_that_are_given_need_no_train_file(tmp_path: Path) -> None:
    task = jsonl_task(tmp_path, [], labelled("c", "a"))
    (tmp_path / "train.jsonl").unlink()
    assert [e.label for e in load_task(task, "test", 0, ("c", "b", "a"))] == [0, 2]
    with pytest.raises(
        DataError, match=r"test\.jsonl:1: label 'c' is none of the run's labels; mend the row or list it"
    ) as caught:
        load_task(task, "test", 0, ("a", "b"))
    assert str(tmp_path) in caught.value.outside and "'c'" not in caught.value.outside


def test_labels_of_a_run(tmp_path: Path) -> None:
    task = jsonl_task(tmp_path, labelled("b", "a"))
    table: dict[str, Any] = {"name": "x", "model": {"kind": "classification"}, "data": {"tasks": [task.model_dump()]}}
    assert labels_of(RunConfig.model_validate(table)) == ("a", "b")
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(DataError, match=r"train\.jsonl: is missing"):
        labels_of(RunConfig.model_validate(table))
    table["data"]["labels"] = ["z", "b", "a"]
    assert labels_of(RunConfig.model_validate(table)) == ("z", "b", "a")
    assert not labels_of(RunConfig.model_validate(table | {"model": {}, "data": {"tasks": [task.model_dump()]}}))


@pytest.mark.parametrize("source", ["gym:chain_sum", "jsonl:{}"])
def test_label_names_of_a_generation_task(tmp_path: Path, source: str) -> None:
    jsonl_task(tmp_path, [{"prompt": "a", "completion": "b"}])
    with pytest.raises(DataError, match="has no labels"):
        label_names(TaskSection(name="t", source=source.format(tmp_path)))


def test_cap_is_a_sample_by_seed_in_file_order(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i:03}", "completion": "x"} for i in range(100)]
    task = jsonl_task(tmp_path, rows, rows, train=10, test=10)
    prompts = [e.prompt for e in load_task(task, "train", 0)]
    assert len(set(prompts)) == 10
    assert prompts == sorted(prompts) != [f"{i:03}" for i in range(10)]
    assert prompts == [e.prompt for e in load_task(task, "train", 0)]
    assert prompts != [e.prompt for e in load_task(task, "train", 1)]
    assert prompts != [e.prompt for e in load_task(task, "test", 0)]


def test_cap_above_the_size_takes_everything(tmp_path: Path) -> None:
    assert len(load_task(jsonl_task(tmp_path, labelled("a", "b"), train=9), "train", 0)) == 2
