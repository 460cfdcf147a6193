"""How many sites one SuperLink serves: what idle sites cost, and rounds of no-op sites, as their number grows.

    python -m benchmarks.capacity
    python -m benchmarks.capacity --sites 10,30 --large 10

A SuperLink and the executor of its ServerApp run as `fedsb up` starts them (TLS, node keys, SQLite, `--isolation process`).
The sites are threads of this process. Each holds its own key and connection and does what a SuperNode does, with Flower's own
code for its side of the connection: it polls every 3 s, sends heartbeats, fetches the app once and every message in objects,
confirms, and pushes its reply. It runs no ClientApp: it answers at once with an array as large as the one it got. The
ServerApp asks all sites in each round through `strategies.rounds.Exchange` and drops the replies.

For every number of sites N, after they have all joined:
`idle_N`: cores that the SuperLink uses while the sites only poll, with polls a second and how long one takes.
`round_N`: seconds of a round with 10 kB of state (median; the first is left out, in which sites fetch the app); `cpu`: CPU
seconds of the SuperLink for one site's part in it; how much its database and its memory have grown.
`large_N`: the same with the state of SmolLM2-135M at rank 64 (3.4 MB).
`polls`: polls a second that the SuperLink answers when sites ask again at once, with all of them admitted; `cpu`: CPU seconds
of the SuperLink for one. `idle_limit`: sites whose polling alone would take one core, which is all that a SuperLink has, from
that and Flower's interval.

Sites and SuperLink share this machine; so CPU seconds say more than seconds.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import tomli_w
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.proto.control_pb2 import RegisterNodeRequest
from flwr.serverapp import Grid
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from benchmarks.harness import ROOT, figure, median, report, say
from benchmarks.noop_sites import POLL_SECONDS, Site
from fedsb.cli.up import _any_port, _wait_for_server
from fedsb.deploy import processes
from fedsb.deploy.certs import make_authority
from fedsb.deploy.flower import Flower
from fedsb.deploy.home import Home, LocalSite, Topology, flower_app
from fedsb.store.files import write_file
from strategies.records import TRAIN
from strategies.rounds import Exchange, wait_for_nodes

NUMBERS = {"round": 2_500, "large": 860_160}  # fp32 numbers of a state
ROUNDS = 3
WAIT_SECONDS = 300.0
APP = flower_app(
    "capacity",
    {"sites": 0, "numbers": 0, "rounds": 0, "out": ""},
    f"""import sys

sys.path.insert(0, {str(ROOT)!r})

from flwr.serverapp import ServerApp

from benchmarks.capacity import serve

app = ServerApp()
app.main()(serve)
""",
    "from flwr.clientapp import ClientApp\n\napp = ClientApp()\n",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", default="10,30,100,300", help="numbers of sites, growing, with commas")
    parser.add_argument("--small", default="10,30,100,300", help="those of them that do rounds with small states")
    parser.add_argument("--large", default="10,30,100", help="those of them that do rounds with large states")
    parser.add_argument("--idle", type=float, default=30.0, help="seconds for which idle sites are watched")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="rounds for each number of sites and size of state")
    options = parser.parse_args(arguments)
    texts = (options.sites, options.small, options.large)
    counts, small, large = ([int(count) for count in text.split(",") if count] for text in texts)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        found = figures(Path(folder), counts, {"round": small, "large": large}, options.idle, options.rounds)
    report("capacity", found)


def figures(
    folder: Path, counts: Sequence[int], active: Mapping[str, Sequence[int]], idle: float, rounds: int
) -> dict[str, dict[str, Any]]:
    """More and more sites at one SuperLink in `folder`; `active`: which numbers of them do rounds with which state."""
    found: dict[str, dict[str, Any]] = {}
    with superlink(folder / "home") as link, contextlib.ExitStack() as joined:
        sites: list[Site] = []
        authority = link.home.tls.ca.read_bytes()
        try:
            for count in counts:
                sites += [joined.enter_context(Site(link.address, authority, link.admit)) for _ in range(count - len(sites))]
                for site in sites:
                    site.wait(WAIT_SECONDS)
                say(f"{count} sites have joined")
                found[f"idle_{count}"] = _idle(link, sites, idle)
                for name in (name for name, chosen in active.items() if count in chosen):
                    found[f"{name}_{count}"] = _rounds(link, sites, NUMBERS[name], rounds)
            polls = _flood(link, sites, idle)
        finally:
            for site in sites:  # all are told before the first is waited for
                site.stop()
    limit = POLL_SECONDS / polls["cpu"]
    return found | {"polls": polls, "idle_limit": figure(limit, "sites")}


def _idle(link: "Link", sites: Sequence[Site], seconds: float) -> dict[str, Any]:
    for site in sites:
        site.polls.clear()
    cpu, started = link.cpu(), time.monotonic()
    time.sleep(seconds)
    wall, cpu = time.monotonic() - started, link.cpu() - cpu
    polls = [poll for site in sites for poll in list(site.polls)]
    more = {"polls_per_second": len(polls) / wall, "poll_seconds": median(polls), "slowest_poll_seconds": max(polls)}
    say(f"{len(sites)} idle sites: {cpu / wall:.3f} cores, {more}")
    return figure(cpu / wall, "cores", resident=link.resident(), **more)


def _rounds(link: "Link", sites: Sequence[Site], numbers: int, rounds: int) -> dict[str, Any]:
    """Seconds of a round in which all sites are asked."""
    before, failed, count = link.stored(), sum(site.failed for site in sites), len(sites)
    entries = link.run(count, numbers, rounds)
    counted = entries[1:] or entries
    spent = median([entry["seconds"] for entry in counted])
    cpu = (entries[-1]["cpu"] - entries[0]["cpu"]) / max(len(entries) - 1, 1) / count
    more = {
        "cpu": cpu,
        "database_growth_per_round": (link.stored() - before) / rounds,
        "superlink_resident": link.resident(),
        "server_app_resident": max(entry["resident"] for entry in entries),
        "answered": min(entry["answered"] for entry in entries),
        "failed": sum(site.failed for site in sites) - failed,
        "seconds": [round(entry["seconds"], 2) for entry in entries],
    }
    say(f"{count} sites, {4 * numbers} B: {spent:.2f} s a round, {more}")
    return figure(spent, "s", sites=count, state_bytes=4 * numbers, **more)


def _flood(link: "Link", sites: Sequence[Site], seconds: float) -> dict[str, Any]:
    """Polls without a pause, from a few of the sites, while the others go on as ever."""
    few = sites[:16]
    for site in sites:
        site.polls.clear()
    for site in few:
        site.pause = 0.0
    cpu, started = link.cpu(), time.monotonic()
    time.sleep(seconds)
    wall, cpu = time.monotonic() - started, link.cpu() - cpu
    for site in few:
        site.pause = POLL_SECONDS
    count = sum(len(site.polls) for site in sites)
    say(f"{count / wall:.0f} polls/s, {1000 * cpu / count:.2f} ms of CPU each")
    return figure(count / wall, "1/s", cpu=cpu / count, cores=cpu / wall, sites=len(sites))


def serve(grid: Grid, context: Context) -> None:
    """The ServerApp: asks all sites in each round, and writes down what it took."""
    values = context.run_config
    out, count = Path(str(values["out"])), int(values["sites"])
    superlink_process = psutil.Process(json.loads((out.parent / "superlink.json").read_text()))
    state = ArrayRecord({"state": Array(np.zeros(int(values["numbers"]), np.float32))})
    nodes = wait_for_nodes(grid, count, WAIT_SECONDS)
    entries = []
    for number in range(int(values["rounds"])):
        started = time.monotonic()
        messages = [Message(RecordDict({"arrays": state}), node, TRAIN, group_id=str(number)) for node in nodes]
        answered = sum(not reply.has_error() for reply in Exchange(grid, WAIT_SECONDS)(messages))
        times = superlink_process.cpu_times()
        entry = {"seconds": time.monotonic() - started, "answered": answered, "cpu": times.user + times.system}
        entries.append(entry | {"resident": psutil.Process().memory_info().rss})
    out.write_text(json.dumps(entries))


@dataclass
class Link:
    """A SuperLink with nothing but the executor of its ServerApp beside it."""

    home: Home
    process: psutil.Process
    control: ControlHttpClient

    @property
    def address(self) -> str:
        """Where sites reach it."""
        return f"{processes.HOST}:{self.home.topology().port}"

    def admit(self, key: ec.EllipticCurvePublicKey) -> None:
        """Let a node in, as `flwr supernode register` does."""
        self.control.RegisterNode(RegisterNodeRequest(public_key=public_key_to_bytes(key)))

    def cpu(self) -> float:
        """CPU seconds that it has used."""
        times = self.process.cpu_times()
        return float(times.user + times.system)

    def resident(self) -> int:
        """Bytes that it has in memory."""
        return int(self.process.memory_info().rss)

    def stored(self) -> int:
        """Bytes of its database on the disk."""
        return sum(path.stat().st_size for path in self.home.folder.glob("superlink.db*"))

    def run(self, sites: int, numbers: int, rounds: int) -> list[dict[str, Any]]:
        """One run of the ServerApp above; an entry for each round. Raises RuntimeError if it fails."""
        app, folder = self.home.folder / "app", self.home.folder.resolve()
        out = folder / "rounds.json"
        out.unlink(missing_ok=True)
        for name, text in APP.items():
            write_file(app / name, text.encode())
        values = {"sites": sites, "numbers": numbers, "rounds": rounds, "out": str(out)}
        write_file(folder / "values.toml", tomli_w.dumps(values).encode())
        flower = Flower(self.home)
        number = flower.run(app, folder / "values.toml")
        while not (state := str(flower.status(number)["status"])).startswith("finished"):
            time.sleep(2)
        if state != "finished:completed":
            raise RuntimeError(f"{state}: {flower.log(number)}")
        entries: list[dict[str, Any]] = json.loads(out.read_text())
        return entries


@contextlib.contextmanager
def superlink(folder: Path) -> Iterator[Link]:
    """Start the server's side of `fedsb up` in a folder, and end it."""
    home = Home(folder)
    folder.mkdir(parents=True)
    authority = make_authority(home.tls.folder)
    topology = Topology(port=_any_port(), sites=[LocalSite(name="none", index=0, port=_any_port())])  # which is not started
    home.logs.mkdir()
    home.write_topology(topology)
    address = f"{processes.HOST}:{topology.port}"
    home.write_connection(address)
    processes.write_programs(home, topology)
    processes.begin(home)
    version = RuntimeVersionHttpInterceptor(component_name="flwr CLI")
    try:
        _wait_for_server(home, topology.port)
        processes._control(home, "start", "server-executor")
        number = int(processes._control(home, "pid", "superlink"))
        write_file(folder / "superlink.json", json.dumps(number).encode())
        with ControlHttpClient.from_server_address(address, False, authority.ca.read_bytes(), [version]) as control:
            yield Link(home, psutil.Process(number), control)
    finally:
        processes.end(home)


if __name__ == "__main__":
    main()
