"""Sites that are away for a while: the rounds go on without them, and they take part again once they are back."""

import os
import time
from pathlib import Path

import pytest

from fedsb.deploy import processes
from tests.faults.harness import LONG, PARTS, Federation, Run, until
from tests.faults.proxy import Proxy

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1200)]
ROOT = Path(__file__).parents[2]
CUT_SECONDS = 90.0
ROUND_SECONDS = 20.0  # many times what a round takes, so that a busy machine loses nobody else
CLOCK = """import datetime, time
real, wall = datetime.datetime, time.time
class datetime_(real):
    @classmethod
    def now(cls, tz=None):
        return real.now(tz) + datetime.timedelta(minutes={minutes})
datetime.datetime = datetime_
time.time = lambda: wall() + 60 * {minutes}
"""


def _back(run: Run, site: str, after: int) -> int:
    """The first round after round `after` in which a site's reply was counted, waited for while the run goes on."""

    def first() -> int:
        found = next((event["round"] for event in run.events("reply", client=site) if event["round"] > after), 0)
        assert found or not run.events("end"), f"the run ended before {site} took part again; give it more rounds"
        return found

    return until(first, f"{site} takes part again")


def test_client_process_killed_and_network_cut(federation: Federation, scratch: Path) -> None:
    """Alpha loses the process in which Flower runs its ClientApp, in training; gamma's network is cut for 90 s, in training.

    Flower notices either after a minute; the first round without them is over after `round_seconds`. Once Flower knows, a round
    takes two seconds: there must be enough of them for gamma to come back to.
    """
    port = federation.home.topology().port
    with Proxy(port) as network, federation.changed("site-gamma-supernode", command=(f":{port}", f":{network.port}")):
        until(lambda: len(federation.online()) == 3, "gamma is online through the proxy")
        run = federation.start("away", train=LONG, federation={"rounds": 40, "round_seconds": ROUND_SECONDS})
        with federation.in_training(run, 2, "alpha", "gamma"):
            network.cut()
            since = time.monotonic()
            federation.app("site-alpha-executor", "flwr-clientapp").kill()
        assert until(lambda: run.heard()[3], "round 3 goes on") == {"beta"}
        until(lambda: time.monotonic() - since > CUT_SECONDS, "the time is over", CUT_SECONDS + 10)
        last = max(event["round"] for event in run.events("reply"))
        assert not run.events("reply", client="gamma", round=last)
        network.mend()
        alpha, gamma = _back(run, "alpha", 2), _back(run, "gamma", 2)
        assert gamma > last
        run.whole()
    heard = run.heard()
    assert heard[1] == {"alpha", "beta", "gamma"}
    assert all(heard[number] == {"beta"} for number in range(2, min(alpha, gamma)))
    left = {(event["client"], event["round"]) for kind in ("silent", "refused") for event in run.events(kind)}
    assert {(site, number) for number in heard for site in ("alpha", "gamma") if site not in heard[number]} <= left
    run.assert_equals_simulation(scratch)


def test_clock_off_and_site_killed(federation: Federation, tmp_path: Path, scratch: Path) -> None:
    """Alpha's clock is ten minutes ahead, and is mended after a round; beta is killed, and comes back two rounds later."""
    (tmp_path / "sitecustomize.py").write_text(CLOCK.format(minutes=10))
    log = federation.home.logs / "superlink.log"  # Flower's SuperNode itself says no more than that it ended
    before = log.stat().st_size
    with federation.changed("site-alpha-supernode", PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}"):
        until(lambda: federation.online() == {"beta", "gamma"}, "alpha is not let in")
        run = federation.start(
            "clock", train=LONG, federation={"rounds": 10, "round_seconds": ROUND_SECONDS, "min_clients": 1, "wait_seconds": 60.0}
        )
        run.wait("round", round=1)
        assert '/v1/fleet/activate-node HTTP/1.1" 401' in log.read_bytes()[before:].decode()
        (row,) = [row for row in federation.status()["sites"] if row["site"] == "alpha"]
        assert row["status"] == "offline"
    alpha = _back(run, "alpha", 0)
    with federation.in_training(run, alpha + 1, "beta"):
        federation.kill_site("beta")
    run.wait("round", round=alpha + 2)
    processes.start(federation.home, *(f"site-beta-{part}" for part in PARTS))
    beta = _back(run, "beta", alpha + 1)
    run.whole()
    heard = run.heard()
    assert heard[1] == {"beta", "gamma"} and alpha > 1
    assert all(heard[number] == {"alpha", "gamma"} for number in range(alpha + 1, beta)) and beta > alpha + 2
    assert {event["round"] for kind in ("silent", "refused") for event in run.events(kind, client="beta")} == set(
        range(alpha + 1, beta)
    )
    run.assert_equals_simulation(scratch)
