"""Whatever is wrong: one sentence that names the key or file and what to do, exit code 2, and nothing half-written."""

import errno
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from clients import session
from fedsb.config import RunConfig
from tests.cli.front_door import call, complaint
from tests.federation.tiny import assert_same_result, events, save_model, save_task

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("train.lerning_rate=0.1", ["train.lerning_rate is not a setting", "did you mean train.learning_rate?"]),
        ("federation.cliens=5", ["federation.cliens is not a setting", "did you mean federation.clients?"]),
        ("datta.alpha=1.0", ["datta is not a setting", "did you mean data?"]),
        ("train.zzz=1", ["train.zzz is not a setting", "docs/configuration.md lists them all"]),
        ("train.steps=many", ["train.steps = 'many' will not do", "valid integer"]),
        ("train.steps=2.5", ["train.steps = 2.5 will not do"]),
        ("train.steps=0", ["train.steps = 0 will not do", "greater than 0"]),
        ('federation.rounds="3"', ["federation.rounds = '3' will not do"]),
        ("federation.fraction=1.5", ["federation.fraction = 1.5 will not do"]),
        (
            "train.learning_rate=fast",
            ["train.learning_rate = 'fast' will not do", "valid number or Input should be 'auto'"],
        ),
        ("train.learning_rate=-1.0", ["train.learning_rate = -1.0 will not do"]),
        ("federation.round_seconds=inf", ["federation.round_seconds = inf will not do", "finite"]),
        ("basis.source=magic", ["basis.source = 'magic' will not do", "'random', 'weights', 'public', 'sketch' or 'pool'"]),
        ("basis.source=public", ['basis.source = "public"', "[basis.public]", "set both or neither"]),
        ("federation.min_clients=9", ["federation.min_clients is larger than federation.clients; lower it"]),
        (
            "adapter.rank=33",
            ["adapter.rank = 33 is larger than the smallest side", "which is 16", "lower the rank to 16"],
        ),
        ('adapter.target_modules=["qq_proj"]', ["adapter.target_modules", "matches no layer", "q_proj"]),
        ("federation.clients=22", ["21 examples cannot be dealt to 22 clients", "lower federation.clients"]),
        ("data.max_length=3", ["task words, example", "raise data.max_length or drop it"]),
        ("model.source=no/such-model", ["model.source = no/such-model", "is no folder or file here"]),
        ("model.source=package:no_such_package", ["no_such_package", "pip install"]),
        ("train.steps", ["--set train.steps: has no value; write --set section.key=value"]),
        ("=3", ["--set =3: has no value"]),
        ("name.x=3", ["--set name.x=3: name is not a section"]),
        ("name=Tiny Run", ["name = 'Tiny Run' will not do"]),
    ],
)
def test_a_wrong_setting(toml: Path, out: Path, capsys: Capture, setting: str, said: list[str]) -> None:
    sentence = complaint(capsys, "simulate", str(toml), "--out", str(out), "--set", setting)
    for words in said:
        assert words in sentence
    assert not out.exists()


def test_a_mistake_in_the_file_names_the_file(toml: Path, tmp_path: Path, out: Path, capsys: Capture) -> None:
    bad = tmp_path / "bad.toml"
    bad.write_text(toml.read_text().replace("batch_size", "batchsize", 1))
    assert complaint(capsys, "simulate", str(bad), "--out", str(out)).startswith(f"{bad}: train.batchsize is not a setting")
    bad.write_text("name = \n")
    assert f"{bad}: is not valid TOML" in complaint(capsys, "simulate", str(bad), "--out", str(out))
    bad.write_bytes(b"name = '\xff'")
    assert f"{bad}: cannot be read" in complaint(capsys, "simulate", str(bad), "--out", str(out))
    bad.write_text("")
    assert complaint(capsys, "simulate", str(bad), "--out", str(out)) == f"{bad}: name is missing; set it"
    missing = tmp_path / "missing.toml"
    assert f"{missing}: there is no such configuration file" in complaint(capsys, "simulate", str(missing), "--out", str(out))
    assert f"{tmp_path}: cannot be read" in complaint(capsys, "simulate", str(tmp_path), "--out", str(out))
    assert not out.exists()


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"prompt": "red", "completion": ', "is not JSON"),
        ('{"prompt": "red"}', 'has no "completion"'),
        ('{"prompt": 3, "completion": "x"}', '"prompt" is of type int and not text'),
        ('["red"]', "is not an object"),
    ],
)
def test_an_unreadable_row_is_named_by_file_and_line(
    toml: Path, tmp_path: Path, out: Path, capsys: Capture, row: str, said: str
) -> None:
    folder = tmp_path / "task"
    source = save_task(folder)
    lines = (folder / "train.jsonl").read_text().splitlines()
    lines[4] = row
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    task = f'data.tasks=[{{name = "words", source = "{source}"}}]'
    sentence = complaint(capsys, "simulate", str(toml), "--out", str(out), "--set", task)
    assert f"{folder}/train.jsonl:5: {said}" in sentence
    assert not out.exists()


def test_a_client_without_its_own_folder(toml: Path, tmp_path: Path, out: Path, capsys: Capture) -> None:
    task = f'data.tasks=[{{name = "words", source = "jsonl:{tmp_path}/{{client}}"}}]'
    command = ["simulate", str(toml), "--out", str(out), "--set", "data.partition=own", "--set", task]
    for name in ("client-0", "client-1"):
        save_task(tmp_path / name)
    sentence = complaint(capsys, *command)
    assert sentence == f"{tmp_path}/client-2: there is no such folder; a jsonl: task is a folder with train.jsonl and test.jsonl"
    assert not out.exists()
    save_task(tmp_path / "client-2")
    (tmp_path / "client-2" / "test.jsonl").unlink()
    assert complaint(capsys, *command).startswith(f"{tmp_path}/client-2/test.jsonl: is missing")
    assert not out.exists()
    sentence = complaint(capsys, *command, "--set", "federation.min_clients=4")  # which real sites could be
    assert sentence == f"{toml}: federation.min_clients is larger than federation.clients; lower it"
    save_task(tmp_path / "client-2")
    assert call(*command) == 0 and call("evaluate", str(out)) == 0


def test_a_mended_mistake_needs_nothing_but_the_same_command(toml: Path, tmp_path: Path, out: Path, capsys: Capture) -> None:
    folder = tmp_path / "task"
    source = save_task(folder)
    whole = (folder / "test.jsonl").read_text()
    (folder / "test.jsonl").write_text("{\n")
    command = [
        "simulate",
        str(toml),
        "--out",
        str(out),
        "--set",
        f'data.tasks=[{{name = "words", source = "{source}"}}]',
    ]
    assert f"{folder}/test.jsonl:1: is not JSON" in complaint(capsys, *command)
    assert not out.exists()
    (folder / "test.jsonl").write_text(whole)
    assert call(*command) == 0


@pytest.mark.parametrize("spoil", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_model_that_is_not_whole(toml: Path, tmp_path: Path, out: Path, capsys: Capture, spoil: str) -> None:
    folder = tmp_path / "model"
    save_model(folder)
    (folder / spoil).write_text("{")
    sentence = complaint(capsys, "simulate", str(toml), "--out", str(out), "--set", f"model.source={folder}")
    assert f"model.source = {folder}" in sentence and "name a whole model" in sentence
    assert not out.exists()


def test_a_model_of_weights_with_other_shapes(toml: Path, tmp_path: Path, out: Path, capsys: Capture) -> None:
    folder = tmp_path / "model"
    save_model(folder)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    tensors[name] = tensors[name][:, :7].contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    sentence = complaint(capsys, "simulate", str(toml), "--out", str(out), "--set", f"model.source={folder}")
    assert f"model.source = {folder}" in sentence
    assert not out.exists()


def _full(name: str) -> Callable[[Any, Any], None]:
    original = os.replace

    def replace(source: Any, target: Any) -> None:
        if str(target).endswith(name):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        original(source, target)

    return replace


FIRST = ["config.toml", ".safetensors", "round-0001"]  # before there is a checkpoint
LATER = ["round-0002", "personal-", "client-1/v0001", "client-2/current", "summary.json"]


@pytest.mark.parametrize("name", [*FIRST, *LATER])
def test_a_full_disk(toml: Path, run: Path, out: Path, capsys: Capture, name: str) -> None:
    """Nothing is left of a run without a checkpoint; one with a checkpoint is whole and can be resumed."""
    session.open_session.cache_clear()
    command = ["simulate", str(toml), "--out", str(out)]
    with pytest.MonkeyPatch.context() as patch:
        suffix = f"personal-{RunConfig.load(toml).digest()[:16]}.safetensors" if name == "personal-" else name
        patch.setattr(os, "replace", _full(suffix))
        sentence = complaint(capsys, *command)
    assert "cannot be written (No space left on device); free some space on that disk" in sentence and str(out) in sentence
    assert not [path for path in out.rglob("*") if path.name.endswith((".tmp", ".old"))]
    assert out.exists() == (name in LATER)
    assert call(*command, *(["--resume"] if name in LATER else [])) == 0
    assert_same_result(run, out)


def test_a_disk_that_really_takes_no_more(toml: Path, out: Path, capsys: Capture) -> None:
    """A limit on file sizes, so that it is the kernel which refuses."""
    session.open_session.cache_clear()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, hard))
    try:
        sentence = complaint(capsys, "simulate", str(toml), "--out", str(out))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot be written (File too large)" in sentence and "basis" in sentence
    assert not out.exists()


def test_a_folder_that_was_there_stays_and_is_emptied(toml: Path, out: Path, capsys: Capture) -> None:
    out.mkdir()
    complaint(capsys, "simulate", str(toml), "--out", str(out), "--set", "adapter.rank=99")
    assert out.is_dir() and not list(out.iterdir())


def test_a_run_is_never_overwritten(toml: Path, run: Path, tmp_path: Path, out: Path, capsys: Capture) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    command = ["simulate", str(toml), "--out", str(run)]
    assert complaint(capsys, *command) == f"{run} holds a run already; add --resume to go on with it, or choose another --out"
    sentence = complaint(capsys, *command, "--resume", "--set", "train.steps=9")
    assert sentence.startswith(f"{run / 'config.toml'} is another configuration than the one given")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    for more in ([], ["--resume"]):
        assert "holds files that are no run" in complaint(capsys, "simulate", str(toml), "--out", str(out), *more)
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]
    assert "is a file; choose another --out" in complaint(capsys, "simulate", str(toml), "--out", str(out / "thesis.tex"))


def test_a_folder_that_cannot_be_made(toml: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "file").write_text("")
    sentence = complaint(capsys, "simulate", str(toml), "--out", str(tmp_path / "file" / "run"))
    assert str(tmp_path / "file") in sentence


@pytest.mark.parametrize("file", ["round.json", "state.safetensors"])
def test_a_torn_checkpoint(toml: Path, run: Path, out: Path, capsys: Capture, file: str) -> None:
    shutil.copytree(run, out)
    torn = out / "checkpoints" / "round-0003" / file
    os.truncate(torn, 60)
    for command in (["simulate", str(toml), "--out", str(out), "--resume"], ["evaluate", str(out)]):
        sentence = complaint(capsys, *command)
        assert sentence.startswith(f"{torn}: is missing, torn") and f"delete the folder {torn.parent}" in sentence


def test_a_checkpoint_of_another_configuration(toml: Path, run: Path, out: Path, capsys: Capture) -> None:
    shutil.copytree(run, out)
    changed = RunConfig.load(toml, ["seed=8"]).to_toml()
    (out / "config.toml").write_text(changed)
    sentence = complaint(capsys, "evaluate", str(out))
    assert f"{out}/checkpoints/round-0003: belongs to another configuration" in sentence and "config.toml" in sentence


def test_exports_need_a_name_a_run_and_an_adapter(run: Path, tmp_path: Path, capsys: Capture) -> None:
    to = ["--out", str(tmp_path / "x")]
    for choice in ([], ["--client", "client-0", "--all"]):
        sentence = complaint(capsys, "export", str(run), *to, *choice)
        assert sentence == "name one client with --client NAME, or all of them with --all"
    assert "has no adapter of hospital-z" in complaint(capsys, "export", str(run), "--client", "hospital-z", *to)
    assert "is no client name" in complaint(capsys, "export", str(run), "--client", "../client-0", *to)
    assert "is not a run folder" in complaint(capsys, "export", str(tmp_path), "--all", *to)
    assert "is not a run folder" in complaint(capsys, "evaluate", str(tmp_path / "nothing"))
    assert not (tmp_path / "x").exists()


def test_a_run_that_has_only_begun(toml: Path, tmp_path: Path, out: Path, capsys: Capture) -> None:
    out.mkdir()
    (out / "config.toml").write_text(RunConfig.load(toml).to_toml())
    (out / "adapters").mkdir()
    assert "has no finished round yet" in complaint(capsys, "evaluate", str(out))
    assert "holds no adapters yet; let the run finish first" in complaint(
        capsys, "export", str(out), "--all", "--out", str(tmp_path / "x")
    )


def test_a_torn_adapter_or_basis_is_not_exported(run: Path, out: Path, tmp_path: Path, capsys: Capture) -> None:
    shutil.copytree(run, out)
    core = out / "adapters" / "client-1" / "v0001" / "core.safetensors"
    os.truncate(core, 90)
    to = ["--out", str(tmp_path / "x")]
    assert str(core.parent) in complaint(capsys, "export", str(out), "--client", "client-1", *to)
    (basis,) = (out / "basis").iterdir()
    os.truncate(basis, 90)
    assert f"{basis}: is not the basis that its name says" in complaint(capsys, "export", str(out), "--client", "client-0", *to)
    assert not (tmp_path / "x").exists()


def test_a_rank_where_it_makes_no_sense(run: Path, bone: Path, tmp_path: Path, capsys: Capture) -> None:
    to = ["--client", "client-0", "--out", str(tmp_path / "x")]
    for form in ("lora", "core"):
        said = complaint(capsys, "export", str(run), "--rank", "3", "--format", form, *to)
        assert "an adapter of method lora-sb cannot be cut to a rank; leave --rank out" in said
    assert "at most rank 32; take 1 to 32" in complaint(capsys, "export", str(bone), "--rank", "33", *to)
    hira = ["--format", "hira", *to]
    assert "--format hira has all there is; leave one of the two out" in complaint(
        capsys, "export", str(run), "--rank", "3", *hira
    )
    assert "lora-sb multiplies no weights, and so is no HiRA" in complaint(capsys, "export", str(run), *hira)
    core = ["--format", "core", *to]
    assert "--bits 8: coefficients of nola are written in" in complaint(capsys, "export", str(run), "--bits", "8", *core)
    assert "bone has no cores" in complaint(capsys, "export", str(bone), "--format", "core", *to)
    assert not (tmp_path / "x").exists()


def test_a_truncated_export_needs_the_weights_of_the_run(bone: Path, out: Path, tmp_path: Path, capsys: Capture) -> None:
    shutil.copytree(bone, out)
    other = save_model(tmp_path / "other", width=64)
    written = RunConfig.load(bone / "config.toml", [f"model.source={other}"]).to_toml()
    (out / "config.toml").write_text(written)
    sentence = complaint(capsys, "export", str(out), "--client", "client-0", "--out", str(tmp_path / "x"))
    assert f"model.source = {other}: its weights" in sentence and "client-0 was trained on" in sentence
    assert not (tmp_path / "x").exists()


def test_an_export_does_not_replace_a_strangers_folder(run: Path, tmp_path: Path, capsys: Capture) -> None:
    mine = tmp_path / "x" / "client-0"
    mine.mkdir(parents=True)
    (mine / "notes.txt").write_text("mine")
    sentence = complaint(capsys, "export", str(run), "--client", "client-0", "--out", str(tmp_path / "x"))
    assert str(mine) in sentence and (mine / "notes.txt").read_text() == "mine"


def test_a_mistake_of_a_client_leaves_no_events_behind_but_of_the_federation_does(toml: Path, out: Path, capsys: Capture) -> None:
    """events.jsonl is what a FederationError points at."""
    sentence = complaint(capsys, "simulate", str(toml), "--out", str(out), "--set", 'federation.names=["a", "b"]')
    assert "federation.names lists 2 names for 3 clients" in sentence
    assert not out.exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("server.local_grid.LocalGrid.get_node_ids", lambda self: [])
        patch.setattr("strategies.rounds.POLL_SECONDS", 0.01)
        sentence = complaint(capsys, "simulate", str(toml), "--out", str(out), "--set", "federation.wait_seconds=0.05")
    assert "0 clients are connected where federation.min_clients = 1 are needed" in sentence
    assert [event["event"] for event in events(out, "basis")] == ["basis"]


def test_flags_that_do_not_exist_are_the_shells_own_mistake(toml: Path, capsys: Capture) -> None:
    assert call("simulate", str(toml), "--nope") == 2
    assert call("fly") == 2
    assert "No such command" in capsys.readouterr().err
