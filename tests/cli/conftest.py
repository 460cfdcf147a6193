from pathlib import Path
from typing import Any

import pytest
import tomli_w

from clients import session
from fedsb.cli import compare
from fedsb.cli.compare_run import run_here
from fedsb.config import RunConfig
from fedsb.store.files import read_json
from tests.cli.front_door import call
from tests.federation.tiny import config_of, save_model, save_task, table


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_task(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="session")
def toml(llama: str, words: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration file of a tiny run."""
    path = tmp_path_factory.mktemp("configs") / "tiny.toml"
    path.write_text(config_of(table(llama, words)).to_toml())
    return path


@pytest.fixture(scope="session")
def run(toml: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; tests that change it copy it first."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert call("simulate", str(toml), "--out", str(folder)) == 0
    return folder


@pytest.fixture(scope="session")
def bone(toml: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a method whose export is truncated."""
    folder = tmp_path_factory.mktemp("finished") / "bone"
    assert call("simulate", str(toml), "--out", str(folder), "--set", "adapter.method=bone", "--set", "federation.rounds=1") == 0
    return folder


@pytest.fixture(scope="session")
def comparison(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison: two methods, two seeds, and a variant with another basis."""
    folder = tmp_path_factory.mktemp("compare")
    content = table(llama, save_task(folder / "words", train=40), federation={"rounds": 2}, personal={"steps": 1})
    content["name"] = "compare"
    weights = {"adapter": {"method": "lora-sb"}, "basis.source": "weights"}
    content["compare"] = {"methods": ["lora-sb", "lora"], "seeds": [0, 1], "variants": {"from-w0": weights}}
    path = folder / "compare.toml"
    path.write_text(tomli_w.dumps(content))
    return path


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """Runs happen in this process, which starts faster; what was run, in order."""
    found: list[RunConfig] = []

    def here(config: RunConfig, folder: Path, hear: object = None) -> dict[str, Any]:
        found.append(config)
        session.open_session.cache_clear()
        run_here(config, folder)
        return read_json(folder / "summary.json")

    monkeypatch.setattr(compare, "run_apart", here)
    return found
