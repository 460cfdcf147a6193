"""One federation of three sites for all fault tests: each must leave it as it found it, which is what they test."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from fedsb.deploy import processes
from fedsb.deploy.home import Home
from tests.faults.harness import PARTS, SITES, Federation, until
from tests.federation.tiny import config_of, save_model, save_task, table


@pytest.fixture(scope="session")
def _shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    data = tmp_path_factory.mktemp("data")
    config = config_of(
        table(
            save_model(data / "model"),
            save_task(data / "words"),
            federation={"clients": len(SITES), "names": SITES, "rounds": 2, "round_seconds": 600.0},
            train={"steps": 20},
            runtime={"progress": "lines"},
        )
    )
    found = Federation(Home(tmp_path_factory.mktemp("f") / "home"), config)
    found.fedsb("up", "--names", ",".join(SITES))
    yield found
    found.fedsb("down")
    assert processes.running(found.home) is None


@pytest.fixture
def federation(_shared: Federation) -> Federation:
    """The federation, with all that belongs to it up."""
    programs = [f"site-{site}-{part}" for site in SITES for part in PARTS]
    until(lambda: all(processes.pid_of(_shared.home, program) for program in programs), "all programs run", 60)
    until(lambda: _shared.online() == set(SITES), "all sites are online", 120)
    return _shared


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    """Where the simulation to compare with may write."""
    return tmp_path / "simulated"
