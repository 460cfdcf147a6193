"""`fedsb personalise`: a client that comes after a run."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsb.store import adapters
from tests.cli.front_door import call, complaint
from tests.federation.tiny import classification, config_of, final_state, personal_states, save_model, save_task, table

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_task(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, task: str) -> Path:
    """A finished run of three clients."""
    folder = tmp_path_factory.mktemp("run")
    config = config_of(table(save_model(folder / "llama"), task, train={"learning_rate": 0.1}, personal={"steps": 4}))
    (folder / "run.toml").write_text(config.to_toml())
    assert call("simulate", str(folder / "run.toml"), "--out", str(folder / "out")) == 0
    return folder / "out"


@pytest.fixture
def own(tmp_path: Path, task: str) -> Path:
    """Eight examples of a new client."""
    source, folder = Path(task.removeprefix("jsonl:")), tmp_path / "own"
    folder.mkdir()
    for name, count in (("train", 8), ("test", 6)):
        (folder / f"{name}.jsonl").write_text("".join((source / f"{name}.jsonl").read_text().splitlines(keepends=True)[:count]))
    return folder


@pytest.mark.parametrize("how", ["auto", "fusion", "core", "scratch"])
def test_a_new_client_gets_an_adapter_that_is_published(run: Path, own: Path, capsys: Capture, how: str) -> None:
    name = f"clinic-{how}"
    assert call("personalise", str(run), "--client", name, "--data", str(own), "--how", how, "--steps", "12") == 0
    out = capsys.readouterr().out
    what = {"auto": "mixture", "fusion": "mixture", "core": "from the global one", "scratch": "a core of its own"}[how]
    assert re.search(rf"{name}: version 1 from 8 examples, .*{what}", out)
    stored = adapters.load(run / "adapters", name)
    others = personal_states(run)
    assert stored.state.keys() == others["client-0"].keys() and stored.manifest.method == "lora-sb"
    if what == "mixture":  # in the span of the pool
        pool = [state for client, state in others.items() if client.startswith("client-")]
        pool += [state for client, state in others.items() if client.startswith("clinic-") and client != name]
        for tensor in stored.state:
            from_pool = torch.stack([s[tensor].flatten() for s in [*pool, final_state(run)]], 1).double()
            mine = stored.state[tensor].flatten().double()
            off = mine - from_pool @ torch.linalg.lstsq(from_pool, mine).solution
            assert off.norm() < 1e-4 * mine.norm()
    assert call("export", str(run), "--client", name, "--out", str(own / "exported")) == 0


def test_a_classifiers_head_is_mixed_too(tmp_path: Path, capsys: Capture) -> None:
    bert, labels = save_model(tmp_path / "bert", "classification"), save_task(tmp_path / "labels", "classification")
    (tmp_path / "run.toml").write_text(config_of(classification(bert, labels)).to_toml())
    assert call("simulate", str(tmp_path / "run.toml"), "--out", str(tmp_path / "run")) == 0
    data = labels.removeprefix("jsonl:")
    assert call("personalise", str(tmp_path / "run"), "--client", "new", "--data", data, "--how", "fusion", "--steps", "2") == 0
    state = adapters.load(tmp_path / "run" / "adapters", "new").state
    assert any(name.startswith("head.") for name in state)
    assert call("evaluate", str(tmp_path / "run"), "--json") == 0
    assert "new" not in json.loads(capsys.readouterr().out.splitlines()[-1])["personal"], "the run's own clients are scored"


def test_what_cannot_be(run: Path, own: Path, task: str, tmp_path: Path, capsys: Capture) -> None:
    told = ["--data", str(own)]
    assert "client-1 took part in" in complaint(capsys, "personalise", str(run), "--client", "client-1", *told)
    assert "nowhere" in complaint(capsys, "personalise", str(tmp_path / "nowhere"), "--client", "new", *told)
    assert "A b" in complaint(capsys, "personalise", str(run), "--client", "A b", *told)
    halved = tmp_path / "halved"
    halved.mkdir()
    (halved / "train.jsonl").write_text((own / "train.jsonl").read_text())
    said = complaint(capsys, "personalise", str(run), "--client", "new", "--data", str(halved))
    assert "test.jsonl" in said
    nothing = ["--data", str(tmp_path / "no-data")]
    assert "no-data" in complaint(capsys, "personalise", str(run), "--client", "new", *nothing)
    assert "new" not in adapters.clients(run / "adapters")


def test_a_newcomer_may_come_again_and_may_be_called_anything(run: Path, own: Path, capsys: Capture) -> None:
    for version in (1, 2):
        assert call("personalise", str(run), "--client", "global", "--data", str(own), "--steps", "1") == 0
        assert f"global: version {version} from 8 examples" in capsys.readouterr().out
    assert call("personalise", str(run), "--client", "another", "--data", str(own), "--steps", "1") == 0
    stored = len(adapters.clients(run / "adapters"))
    assert f"a mixture of {stored} cores" in capsys.readouterr().out, "all but its own, and the global one"


def test_a_client_of_the_store_keeps_its_adapter(run: Path, own: Path, tmp_path: Path, capsys: Capture) -> None:
    """As in a deployed run, whose clients have other names than a simulation's."""
    shutil.copytree(run, tmp_path / "copy")
    store = tmp_path / "copy" / "adapters"
    mine = adapters.load(store, "client-0")
    told = {"base_model": mine.manifest.base_model, "method": "lora-sb", "rank": mine.manifest.rank, "round": 3, "task": "words"}
    adapters.publish(store, "clinic-a", mine.state, basis_fingerprint=mine.manifest.basis_fingerprint, **told)
    said = complaint(capsys, "personalise", str(tmp_path / "copy"), "--client", "clinic-a", "--data", str(own))
    assert "clinic-a took part in" in said and adapters.versions(store, "clinic-a") == [1]
    (tmp_path / "copy" / "summary.json").unlink()
    said = complaint(capsys, "personalise", str(tmp_path / "copy"), "--client", "clinic-b", "--data", str(own))
    assert "is not finished" in said


@pytest.mark.parametrize("sections", [{"strategy": {"name": "krum"}}, {"strategy": {"name": "fedadam"}}, {"evaluation": {}}])
def test_runs_of_any_strategy_and_split(sections: Any, own: Path, task: str, tmp_path: Path, capsys: Capture) -> None:
    federation = {"clients": 5, "min_clients": 5, "rounds": 1, "weighting": "uniform"}
    held = {"evaluation": {"split": "validation"}, "data": {"validation": 0.3}} if "evaluation" in sections else {}
    config = config_of(table(save_model(tmp_path / "llama"), task, federation=federation, **{**sections, **held}))
    (tmp_path / "run.toml").write_text(config.to_toml())
    assert call("simulate", str(tmp_path / "run.toml"), "--out", str(tmp_path / "run")) == 0
    capsys.readouterr()
    assert call("personalise", str(tmp_path / "run"), "--client", "new", "--data", str(own), "--steps", "1") == 0
    out = capsys.readouterr().out
    assert "from 8 examples" in out and re.search(r"new +. newcomer . +6", out), "all of train, scored on all of test"


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"adapter": {"method": "lora"}}, "has no single core; run one with lora-sb"),
        ({"privacy": {"unit": "record", "epsilon": 8.0}, "federation": {"weighting": "uniform", "rounds": 1}}, "has privacy"),
        ({"personal": {"steps": 2}, "federation": {"rounds": 1}}, ""),
    ],
)
def test_runs_that_it_is_not_for(sections: Any, said: str, own: Path, task: str, tmp_path: Path, capsys: Capture) -> None:
    config = config_of(table(save_model(tmp_path / "llama"), task, **sections))
    (tmp_path / "run.toml").write_text(config.to_toml())
    assert call("simulate", str(tmp_path / "run.toml"), "--out", str(tmp_path / "run")) == 0
    told = ["personalise", str(tmp_path / "run"), "--client", "new", "--data", str(own)]
    if said:
        assert said in complaint(capsys, *told)
        assert "new" not in adapters.clients(tmp_path / "run" / "adapters")
        return
    for client in adapters.clients(tmp_path / "run" / "adapters"):
        (tmp_path / "run" / "adapters" / client / "current").unlink()
    assert "holds no personal cores to mix; take --how core" in complaint(capsys, *told, "--how", "fusion")
    assert call(*told) == 0 and "from the global one" in capsys.readouterr().out, "auto takes what there is"
