"""What a resident trainer saves: a client's round outside training, with the model kept loaded and with it loaded anew.

    python -m benchmarks.warm_trainer

Each turn starts a process as Flower does for every message, which answers one `train` message with the project's ClientApp:
once through a trainer behind its socket (ours), once by itself (the peer: what Flower does without one). Counted is the wall
time of that process less the seconds of training in its reply. `reload_share`: ours over the peer's, from the second round on.
Flower's own polling (up to 3 s at the SuperNode and 1 s at the executor) comes on top of both and is in neither; `start` is
that part of ours which is starting Python and importing Flower.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flwr.app import RecordDict

from benchmarks.harness import ROOT, figure, median, report, say
from clients.answers import answer
from clients.ask import SOCKET, WAIT_SECONDS, ask
from clients.session import open_session
from fedsb.config import RunConfig
from strategies.envelope import from_bytes, to_bytes
from strategies.records import ARRAYS, CONFIG, METRICS, PREPARE, SECONDS, TRAIN, Order, pack_state

IMPORTS = """
import json, sys
from pathlib import Path
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.task_identity import TaskIdentity
"""
PROCESS = f"""{IMPORTS}
from clients.app import app
from strategies.envelope import from_bytes, to_bytes

question, reply, node = sys.argv[1:]
TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 0, 0, 1
message = Message(from_bytes(Path(question).read_bytes()), 2, "{TRAIN}")
message.metadata.__dict__["_message_id"] = "1"
context = Context(run_id=0, node_id=2, node_config=json.loads(node), state=RecordDict(), run_config={{}})
Path(reply).write_bytes(to_bytes(app(message, context).content))
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.toml"))
    parser.add_argument("--turns", type=int, default=5, help="turns in which ours and the peer alternate")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        report("warm_trainer", figures(RunConfig.load(options.config, ["train.steps=1"]), Path(name), options.turns))


def figures(config: RunConfig, folder: Path, turns: int) -> dict[str, dict[str, Any]]:
    """Both ways in turns, after one of each to warm up."""
    node = {"name": "site", "partition-id": 0, "num-partitions": config.federation.clients, "folder": str(folder / "home")}
    socket = folder / "trainer.sock"
    command = [sys.executable, "-m", "fedsb.cli.main", "trainer", "--socket", str(socket), "--name", "site"]
    command += ["--home", str(folder / "home"), "--sites", str(config.federation.clients)]
    trainer = subprocess.Popen(command, cwd=ROOT)
    try:
        question = _question(config, socket, node)
        (folder / "question").write_bytes(question)
        spent: dict[str, list[float]] = {"ours": [], "peer": [], "start": []}
        for turn in range(turns + 1):
            measured = {
                "ours": _outside(folder, node, {SOCKET: str(socket)}),
                "peer": _outside(folder, node, {}),
                "start": _wall([sys.executable, "-c", IMPORTS], {}),
            }
            say(", ".join(f"{what} {seconds:.2f} s" for what, seconds in measured.items()))
            if turn:
                for what, seconds in measured.items():
                    spent[what].append(seconds)
    finally:
        trainer.kill()
        trainer.wait()
    ours, peer, start = (median(spent[what]) for what in ("ours", "peer", "start"))
    return {
        "reload_share": figure(ours / peer, "share", ours=ours, peer=peer, model=config.model.source),
        "start": figure(start, "s"),
    }


def _question(config: RunConfig, socket: Path, node: dict[str, Any]) -> bytes:
    """A `train` message, for which the site has been prepared."""
    run = config.to_json()
    asked = RecordDict({CONFIG: Order(run, 0, "?").record()})
    basis = str(ask(socket, PREPARE, asked, WAIT_SECONDS)["identity"]["basis"])
    answer(PREPARE, RecordDict({CONFIG: Order(run, 0, basis).record()}), node)
    state = pack_state(open_session(run).base_vector(), "fp32")
    open_session.cache_clear()
    return to_bytes(RecordDict({CONFIG: Order(run, 1, basis).record(), ARRAYS: state}))


def _outside(folder: Path, node: dict[str, Any], environment: dict[str, str]) -> float:
    """Seconds of a process that answers the question, less those of training."""
    wall = _wall([sys.executable, "-c", PROCESS, str(folder / "question"), str(folder / "reply"), json.dumps(node)], environment)
    reply = from_bytes((folder / "reply").read_bytes())
    return wall - float(reply[METRICS][SECONDS])  # type: ignore[arg-type]


def _wall(command: list[str], environment: dict[str, str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, check=True)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
