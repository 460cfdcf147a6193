from pathlib import Path

import pytest
import torch

from tests.federation.tiny import save_model, save_task


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("bert"), "classification")


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_task(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="session")
def labels(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_task(tmp_path_factory.mktemp("labels"), "classification")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run"
