"""Bytes that a run moves between its server and its sites: what summary.json says, what Flower counted, what the sockets carried.

    python -m benchmarks.wire_bytes
    python -m benchmarks.wire_bytes --set basis.source=weights --set federation.wire_dtype=bf16

A federation of `fedsb up` (processes on the loopback, TLS, node keys) does one run with states of real size. `ours` is the sum
of `bytes` in summary.json.

`relative_error`: how far ours is from what Flower has counted for this run by its end, both ways (`flwr ls`). Flower counts
messages and objects at the SuperLink's door to the sites; it leaves out polls without an answer, heartbeats, fetching the app,
confirmations, HTTP and TLS. `relative_error_up` and `_down` are the same for each direction; `down` includes what was sent of
the basis.
`relative_error_tls`: how far ours is from all bytes of the sites' TCP connections while the run lasted, counted by a proxy
between SuperNodes and SuperLink; so the peer has everything that Flower leaves out, and idle polling too.
`idle`: bytes a second that one site's connection carries, both ways, when there is no run.
"""

import argparse
import asyncio
import contextlib
import json
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness import figure, report, say
from fedsb.cli.run import run
from fedsb.cli.up import down, up
from fedsb.config import RunConfig
from fedsb.deploy import processes
from fedsb.deploy.flower import Flower
from fedsb.deploy.home import Home

SITES = 2
SETTINGS = [  # states of real size, and as little computing as there can be
    "data.partition=iid",
    'data.tasks=[{name="sums", source="gym:chain_sum", train=8, test=4}]',
    f"federation.clients={SITES}",
    "federation.names=[]",
    f"federation.min_clients={SITES}",
    "federation.rounds=3",
    "adapter.rank=64",
    "train.steps=1",
    "train.batch_size=2",
    "personal.steps=1",
]
CHUNK = 1 << 16


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.toml"))
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a setting")
    parser.add_argument("--idle", type=float, default=60.0, help="seconds for which idle sites are watched")
    options = parser.parse_args(arguments)
    config = RunConfig.load(options.config, [*SETTINGS, *options.set, "runtime.progress=none"])
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        found = figures(config, Path(folder), options.idle)
    report("wire_bytes", found)


def figures(config: RunConfig, folder: Path, idle_seconds: float) -> dict[str, dict[str, Any]]:
    """One run of a federation in `folder`, and what each of the three has counted."""
    home = folder / "home"
    place, path = Home(home), folder / "run.toml"
    path.write_text(config.to_toml())
    with federation(home, config.federation.clients) as sockets:
        before = sockets.bytes()
        run(config=path, set_=None, home=home, detach=False)
        tls = {way: count - before[way] for way, count in sockets.bytes().items()}
        flower = Flower(place).status(place.started()[config.name])["network-traffic"]
        before, started = sockets.bytes(), time.monotonic()
        time.sleep(idle_seconds)
        idle = sum(sockets.bytes().values()) - sum(before.values())
        idle_rate = idle / (time.monotonic() - started) / config.federation.clients
    summary = json.loads((place.runs / config.name / "summary.json").read_text())
    moved = summary["bytes"]
    ours = {"up": moved["up"], "down": moved["down"] + moved["basis"]}
    counted = {"up": flower["inbound-bytes"], "down": flower["outbound-bytes"]}
    for name, count in (("summary.json", ours), ("Flower", counted), ("sockets", tls)):
        say(f"{name:12s} up {count['up']:12,d} B, down {count['down']:12,d} B")
    size = {
        "sites": config.federation.clients,
        "rounds": config.federation.rounds,
        "trainable": summary["trainable_parameters"],
        "basis_sent": moved["basis"],
    }
    return {
        "relative_error": _distance(sum(ours.values()), sum(counted.values()), **size),
        "relative_error_up": _distance(ours["up"], counted["up"]),
        "relative_error_down": _distance(ours["down"], counted["down"]),
        "relative_error_tls": _distance(sum(ours.values()), sum(tls.values()), seconds=summary["seconds"]["total"]),
        "relative_error_tls_up": _distance(ours["up"], tls["up"]),
        "relative_error_tls_down": _distance(ours["down"], tls["down"]),
        "idle": figure(idle_rate, "B/s", seconds=idle_seconds),
    }


def _distance(ours: int, peer: int, **more: object) -> dict[str, Any]:
    return figure(abs(ours - peer) / peer, "share", ours=ours, peer=peer, **more)


@contextlib.contextmanager
def federation(home: Path, sites: int) -> Iterator["CountingProxy"]:
    """`fedsb up`, with a proxy between SuperNodes and SuperLink; `fedsb down` at the end."""
    up(clients=sites, names="", home=home, port=0)
    place = Home(home)
    port = place.topology().port
    with CountingProxy(port) as proxy:
        try:
            programs = home / "supervisord.conf"
            direct = f"--superlink {processes.HOST}:{port}"  # only SuperNodes are told where the SuperLink is in this way
            programs.write_text(programs.read_text().replace(direct, f"--superlink {processes.HOST}:{proxy.port}"))
            processes._control(place, "update")  # ends the programs that have changed
            processes.begin_all(place)
            yield proxy
        finally:
            down(home=home)


@dataclass
class CountingProxy:
    """Context: passes TCP connections on to a port of this machine, and counts the bytes each way.

    Attributes:
        target: the port that connections go on to.
        port: the port it listens on.
        up: bytes from those who connect.
        down: bytes to them.
    """

    target: int
    port: int = 0
    up: int = 0
    down: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)

    def bytes(self) -> dict[str, int]:
        """What has been passed on so far: up and down."""
        return {"up": self.up, "down": self.down}

    def __enter__(self) -> "CountingProxy":
        listener = socket.create_server((processes.HOST, 0))
        self.port = listener.getsockname()[1]
        self._thread = threading.Thread(target=lambda: asyncio.run(self._listen(listener)))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    async def _listen(self, listener: socket.socket) -> None:
        server = await asyncio.start_server(self._serve, sock=listener)
        await asyncio.to_thread(self._stop.wait)
        server.close()  # connections that are still open end with this loop

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends = [writer]
        try:
            server_reader, server_writer = await asyncio.open_connection(processes.HOST, self.target)
            ends.append(server_writer)
            await asyncio.gather(self._pass(reader, server_writer, "up"), self._pass(server_reader, writer, "down"))
        except OSError as error:  # nobody listens there now: whoever connected sees that the connection closes
            say(f"port {self.target}: {error}")
        finally:
            for end in ends:
                end.close()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: str) -> None:
        try:
            while data := await reader.read(CHUNK):
                setattr(self, way, getattr(self, way) + len(data))
                writer.write(data)
                await writer.drain()
            writer.write_eof()
        except OSError:  # one side is gone; closing tells the other
            writer.close()


if __name__ == "__main__":
    main()
