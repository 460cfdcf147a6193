"""Commands at work on one federation's folder at once: each entry that one of them writes is there in the end."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fedsb.deploy.certs import make_node_key
from fedsb.deploy.flower import Flower
from fedsb.deploy.home import Home
from fedsb.deploy.sites import admit
from fedsb.errors import DiskError

NAMES = [f"site-{i}" for i in range(8)]


def test_runs_started_at_once(tmp_path: Path) -> None:
    home = Home(tmp_path)

    def start(name: str) -> None:
        with home.turn():
            before = home.started()
            time.sleep(0.01)  # what Flower takes to start a run
            home.write_started(before | {name: "1"})

    with ThreadPoolExecutor(len(NAMES)) as pool:
        list(pool.map(start, NAMES))
    assert home.started().keys() == set(NAMES)


def test_sites_admitted_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Home(tmp_path)
    for name in NAMES:
        make_node_key(home.site(name) / "key", name)

    def register(self: Flower, key: Path, name: str) -> str:
        time.sleep(0.01)
        return name.removeprefix("site-")

    monkeypatch.setattr(Flower, "admit", register)
    with ThreadPoolExecutor(len(NAMES)) as pool:
        list(pool.map(lambda name: admit(home, home.site(name) / "key.pub", name), NAMES))
    assert home.admitted().keys() == set(NAMES)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="cannot be written"), Home(tmp_path / "none").turn():
        pass
