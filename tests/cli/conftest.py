from pathlib import Path

import pytest

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
