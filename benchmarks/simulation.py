"""What a simulation costs beside its clients: against Flower's own runtime, and as a share of a real run.

    python -m benchmarks.simulation
    python -m benchmarks.simulation --clients 50 --rounds 2 --only speedup

`speedup`: a ClientApp that answers at once, with the 0.1 MB of arrays that it got and two metrics, under Flower's FedAvg,
driven by `strategies.rounds.run_rounds`: seconds of Flower's simulation runtime (Ray, one CPU a client, so as many actors
as CPUs) over seconds of `LocalGrid`, from handing over the apps to the last aggregate. The same apps run in both.
`speedup_loop` counts only the rounds, without starting and stopping Ray; `speedup_flower_loop` gives the peer Flower's own
round loop, `Strategy.start`, as its users write it.

`overhead`: share of the wall time of a real federation (server/app.py and clients/app.py in a LocalGrid) that is outside of
its clients' own training and evaluation. These are `Session.train` and `Session.score`, which include making and
tokenising a client's own examples. Opening the model, at server and client, is neither and is left out of both sides of the
fraction; everything else counts as overhead: basis, preparing clients, messages, aggregation, checkpoints, publishing.
"""

import argparse
import contextlib
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ |= {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from benchmarks.harness import child, figure, median, report, say, seconds
from server.local_grid import LocalGrid, node_configs, settle
from strategies.rounds import run_rounds, wait_for_nodes

NUMBERS = 25_000  # fp32: 0.1 MB
WAIT_SECONDS = 3600.0
OURS_PER_PEER = 7  # runs of ours for one of the peer, which takes so much longer


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("speedup", "overhead"), help="one of the two measurements; both by default")
    parser.add_argument("--clients", type=int, default=1000, help="clients of the speedup")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the speedup")
    parser.add_argument("--turns", type=int, default=1, help="turns in which ours and the peer alternate")
    parser.add_argument("--no-peer", action="store_true", help="time ours alone, without Ray")
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.toml"), help="config of the overhead")
    parser.add_argument("--set", action="append", metavar="SECTION.KEY=VALUE", help="override a setting of the config")
    parser.add_argument("--peer", choices=("same", "flower"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.peer:
        print(json.dumps(on_ray(options.clients, options.rounds, flower_loop=options.peer == "flower")))
        return
    figures: dict[str, dict[str, Any]] = {}
    if options.only != "overhead":
        figures |= speedup(options.clients, options.rounds, options.turns, peer=not options.no_peer)
    if options.only != "speedup":
        settings = options.set or ["federation.rounds=2"]
        figures |= overhead(options.config, settings)
    report("simulation", figures)


def speedup(clients: int, rounds: int, turns: int, *, peer: bool) -> dict[str, dict[str, Any]]:
    """LocalGrid and Ray in turns."""
    settle()  # as `fedsb simulate` does
    on_local_grid(clients, rounds)  # warm up: memory that was never touched is slow
    ours: list[float] = []
    peers: dict[str, list[dict[str, float]]] = {"same": [], "flower": []}
    for _ in range(turns):
        for loop, results in peers.items():
            ours += [on_local_grid(clients, rounds) for _ in range(OURS_PER_PEER)]
            say(f"ours: {', '.join(f'{value:.2f}' for value in ours[-OURS_PER_PEER:])} s")
            if peer:
                sizes = ("--clients", str(clients), "--rounds", str(rounds))
                results.append(child("benchmarks.simulation", "--peer", loop, *sizes))
                say(f"Ray, {loop} loop: {results[-1]['total']:.1f} s, of which rounds {results[-1]['rounds']:.1f} s")
    us = median(ours)
    size = {"clients": clients, "rounds": rounds, "bytes": 4 * NUMBERS}
    if not peer:
        return {"speedup": figure(None, "x", ours=us, **size)}
    same, rounds_only, flower = (
        median([result[key] for result in peers[loop]])
        for loop, key in (("same", "total"), ("same", "rounds"), ("flower", "total"))
    )
    return {
        "speedup": figure(same / us, "x", ours=us, peer=same, **size),
        "speedup_loop": figure(rounds_only / us, "x", ours=us, peer=rounds_only, **size),
        "speedup_flower_loop": figure(flower / us, "x", ours=us, peer=flower, **size),
    }


client_app = ClientApp()


@client_app.train()
def answer(message: Message, context: Context) -> Message:
    """Send back what came, with two metrics."""
    metrics = MetricRecord({"num-examples": 1, "loss": 0.5})
    return Message(RecordDict({"arrays": message.content["arrays"], "metrics": metrics}), reply_to=message)


def server_app(clients: int, rounds: int, *, flower_loop: bool, done: list[float]) -> ServerApp:
    """FedAvg over all clients; `done` gets the seconds that the rounds took."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = FedAvg(fraction_evaluate=0.0, min_available_nodes=clients, min_train_nodes=clients)
        arrays = ArrayRecord({"x": Array(np.zeros(NUMBERS, np.float32))})
        wait_for_nodes(grid, clients, WAIT_SECONDS)
        started = time.perf_counter()
        if flower_loop:
            strategy.start(grid, arrays, num_rounds=rounds, timeout=WAIT_SECONDS)
        else:
            run_rounds(grid, strategy, arrays, first=1, last=rounds, seconds=WAIT_SECONDS, after_round=lambda _: None)
        done.append(time.perf_counter() - started)

    return app


def on_local_grid(clients: int, rounds: int) -> float:
    """Seconds in this process."""
    done: list[float] = []

    def run() -> None:
        grid = LocalGrid(client_app, node_configs([str(number) for number in range(clients)], ""))
        context = Context(run_id=0, node_id=0, node_config={}, state=RecordDict(), run_config={})
        server_app(clients, rounds, flower_loop=False, done=done)(grid, context)

    spent = _quietly(lambda: seconds(run))
    assert done, "the server app did not finish"
    return spent


def on_ray(clients: int, rounds: int, *, flower_loop: bool) -> dict[str, float]:
    """Seconds on Flower's simulation runtime: in total, and for the rounds alone."""
    from flwr.simulation import run_simulation

    done: list[float] = []
    app = server_app(clients, rounds, flower_loop=flower_loop, done=done)
    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"log_to_driver": False}}
    total = _quietly(lambda: seconds(lambda: run_simulation(app, client_app, clients, backend_config=resources)))
    assert done, "the server app did not finish"
    return {"total": total, "rounds": done[0]}


def _quietly(work: Callable[[], float]) -> float:
    """Call `work` without Flower's log lines and without its note that `run_simulation` is deprecated."""
    import logging

    logger = logging.getLogger("flwr")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return work()
    finally:
        logger.setLevel(before)


class Shares:
    """Whose the wall time is: each moment counts for the innermost of the watched functions that are running."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {"other": 0.0}
        self._running = ["other"]
        self._since = time.perf_counter()

    def watch(self, owner: Any, name: str, label: str) -> Callable[[], None]:
        """Count calls of `owner.name` under `label`; returns what undoes it."""
        original = getattr(owner, name)
        self.seconds.setdefault(label, 0.0)

        def watched(*args: Any, **kwargs: Any) -> Any:
            with self.count(label):
                return original(*args, **kwargs)

        setattr(owner, name, watched)
        return lambda: setattr(owner, name, original)

    @contextlib.contextmanager
    def count(self, label: str) -> Iterator[None]:
        """Count what happens within this context under `label`."""
        self._turn()
        self._running.append(label)
        try:
            yield
        finally:
            self._turn()
            self._running.pop()

    def start(self) -> None:
        """Begin to count."""
        self._since = time.perf_counter()

    def stop(self) -> dict[str, float]:
        """Seconds by label."""
        self._turn()
        return self.seconds

    def _turn(self) -> None:
        now = time.perf_counter()
        self.seconds[self._running[-1]] += now - self._since
        self._since = now


def overhead(path: Path, settings: list[str]) -> dict[str, dict[str, Any]]:
    """One real federation, its wall time divided up."""
    import torch

    from clients import app as clients_app
    from clients.session import Session, open_session
    from fedsb.config import RunConfig
    from server import app as server
    from server.federation import Federation
    from strategies.fedsb import FedSB

    config = RunConfig.load(path, [*settings, "runtime.progress=none"])
    shares = Shares()
    watched = (
        (Session, "train", "training"),
        (Session, "score", "evaluation"),
        (Session, "_rows", "own data"),
        (Session, "__init__", "model"),
        (Federation, "_model", "model"),
        (Federation, "choose_basis", "basis"),
        (Federation, "prepare_clients", "preparing clients"),
        (Federation, "checkpoint", "checkpoint"),
        (Federation, "personalise", "personalise"),
        (FedSB, "aggregate_train", "aggregate"),
    )
    open_session.cache_clear()
    undo = [shares.watch(*entry) for entry in watched]
    try:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "run"
            grid = LocalGrid(clients_app.app, node_configs(config.client_names, str(out / "sites")))
            values = {"config": config.to_json(), "out": str(out), "resume": False}
            context = Context(run_id=0, node_id=0, node_config={}, state=RecordDict(), run_config=values)
            torch.set_num_threads(config.runtime.threads or torch.get_num_threads())
            shares.start()
            server.app(grid, context)
            spent = shares.stop()
    finally:
        for step in undo:
            step()
    for label, value in sorted(spent.items(), key=lambda item: -item[1]):
        say(f"{label:18s} {value:8.2f} s")
    own = sum(spent[label] for label in ("training", "evaluation", "own data"))
    wall = sum(spent.values()) - spent["model"]
    size = {
        "clients": config.federation.clients,
        "rounds": config.federation.rounds,
        "steps": config.train.steps,
        "basis": config.basis.source,
        "seconds": {label: round(value, 3) for label, value in spent.items()},
    }
    return {"overhead": figure((wall - own) / wall, "share", ours=wall - own, peer=wall, **size)}


if __name__ == "__main__":
    main()
