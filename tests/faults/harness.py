"""What the fault tests have in common: a federation of processes, runs on it, ways to break it, and what must hold afterwards."""

import configparser
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
from flwr.app import Error, Message

from clients.ask import UnixConnection
from fedsb.config import RunConfig
from fedsb.deploy import processes
from fedsb.deploy.home import Home
from fedsb.deploy.sites import overview
from fedsb.errors import DeployError
from fedsb.store import adapters, checkpoint
from fedsb.store.basis_files import load_basis
from fedsb.store.files import read_events, read_json
from server.local_grid import LocalGrid
from server.run_folder import load_run
from strategies.records import PERSONALISE, TRAIN, Order
from tests.federation.tiny import assert_same_result, federate, local_grid

SITES = ["alpha", "beta", "gamma"]
PARTS = ("supernode", "executor", "trainer")
SECONDS = 480.0  # after which what ought to happen has not happened
POLL_SECONDS = 0.02
LONG = {"steps": 40}  # training of half a second: long enough to be caught at it
T = TypeVar("T")


def until(look: Callable[[], T], what: str, seconds: float = SECONDS, poll: float = POLL_SECONDS) -> T:
    """What `look` returns, once that is true."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(poll)
    return found


@dataclass(frozen=True)
class Federation:
    """A federation that `fedsb up` started, and the configuration that its runs differ from in a few settings."""

    home: Home
    config: RunConfig

    def fedsb(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """The command as a user types it."""
        command = [sys.executable, "-m", "fedsb.cli.main", *arguments, "--home", str(self.home.folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def open(self, name: str, **sections: Mapping[str, Any]) -> "Run":
        """A run that is not yet started."""
        content = json.loads(self.config.to_json()) | {"name": name}
        for section, values in sections.items():
            content[section] = content[section] | values
        run = Run(self, RunConfig.from_json(json.dumps(content)))
        run.toml.parent.mkdir(exist_ok=True)
        run.toml.write_text(run.config.to_toml())
        return run

    def start(self, name: str, **sections: Mapping[str, Any]) -> "Run":
        """`fedsb run --detach`."""
        run = self.open(name, **sections)
        self.fedsb("run", str(run.toml), "--detach")
        return run

    def status(self) -> dict[str, Any]:
        """`fedsb status --json`."""
        found: dict[str, Any] = json.loads(self.fedsb("status", "--json").stdout)
        return found

    def online(self) -> set[str]:
        """Names of the sites that the server sees."""
        return {row["site"] for row in overview(self.home) if row["status"] == "online"}

    def pid(self, program: str) -> int:
        """The process id of a program, waited for."""
        return until(lambda: processes.pid_of(self.home, program), f"{program} runs")

    def kill(self, program: str) -> None:
        """kill -9; supervisord starts it anew."""
        os.kill(self.pid(program), signal.SIGKILL)

    def app(self, executor: str, name: str) -> psutil.Process:
        """The process in which an executor runs an app at this moment, waited for: `flwr-serverapp` or `flwr-clientapp`."""
        parent = psutil.Process(self.pid(executor))
        return until(lambda: next(_named(parent.children(recursive=True), name), None), f"{name} under {executor}")

    def jobs(self, site: str) -> list[str]:
        """What a site's trainer is at work on; nothing if it is away."""
        connection = UnixConnection(processes.trainer_socket(self.home, site))
        try:
            connection.request("GET", "/health")
            found: list[str] = json.loads(connection.getresponse().read())["jobs"]
        except OSError:
            return []
        finally:
            connection.close()
        return found

    @contextlib.contextmanager
    def in_training(self, run: "Run", number: int, *sites: str) -> Iterator[dict[str, int]]:
        """Hold sites' trainers in the middle of their training in round `number`; yields their process ids."""
        run.round_begins(number)
        pids, held = {site: self.pid(f"site-{site}-trainer") for site in sites}, set[str]()

        def all_held() -> bool:
            for site in pids.keys() - held:
                if TRAIN in self.jobs(site):
                    os.kill(pids[site], signal.SIGSTOP)
                    held.add(site)
            return len(held) == len(pids)

        try:
            until(all_held, f"{sites} train in round {number}")
            assert not any(run.events("reply", round=number, client=site) for site in sites)
            yield pids
        finally:
            for site in held:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pids[site], signal.SIGCONT)

    @contextlib.contextmanager
    def changed(self, program: str, *, command: tuple[str, str] = ("", ""), **environment: str) -> Iterator[None]:
        """Start a program anew, with a part of its command replaced and more in its environment; at the end as it was."""
        path = self.home.folder / "supervisord.conf"
        before = path.read_bytes()
        conf = configparser.RawConfigParser()
        conf.read(path)
        section = conf[f"program:{program}"]
        section["command"] = section["command"].replace(*command) if command[0] else section["command"]
        section["environment"] += "".join(f',{key}="{value}"' for key, value in environment.items())
        with path.open("w") as file:
            conf.write(file)
        with contextlib.suppress(DeployError):  # it may be made so as not to stay up
            processes.renew(self.home, program)
        try:
            yield
        finally:
            path.write_bytes(before)
            processes.renew(self.home, program)

    def kill_site(self, site: str) -> None:
        """kill -9 of all that runs at a site; it stays down until `processes.start`."""
        programs = [f"site-{site}-{part}" for part in PARTS]
        for pid in [self.pid(program) for program in programs]:
            os.kill(pid, signal.SIGKILL)
        processes.stop(self.home, *programs)

    @contextlib.contextmanager
    def shown(self, run: "Run") -> Iterator["subprocess.Popen[str]"]:
        """`fedsb run` at work, its output to be read with `communicate`."""
        command = [sys.executable, "-m", "fedsb.cli.main", "run", str(run.toml), "--home", str(self.home.folder)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            try:
                yield process
            finally:
                process.kill()


@dataclass(frozen=True)
class Run:
    """A run on a federation, and its folder."""

    federation: Federation
    config: RunConfig

    @property
    def folder(self) -> Path:
        return self.federation.home.runs / self.config.name

    @property
    def toml(self) -> Path:
        return self.federation.home.folder / "configs" / f"{self.config.name}.toml"

    def events(self, kind: str, **fields: Any) -> list[dict[str, Any]]:
        """Its events of one kind with these fields, oldest first."""
        wanted = {"event": kind, **fields}.items()
        return [event for event in read_events(self.folder / "events.jsonl") if wanted <= event.items()]

    def wait(self, kind: str, **fields: Any) -> dict[str, Any]:
        """The first such event, waited for."""
        try:
            return until(lambda: self.events(kind, **fields), f"{kind} {fields} in {self.folder}")[0]
        except AssertionError as error:
            raise AssertionError(self.federation.fedsb("logs", self.config.name).stdout) from error

    def server(self) -> psutil.Process:
        """The ServerApp at work on it, waited for: the one that holds its folder open.

        Flower may have started another, which leaves: a start that takes long is tried again.
        """
        parent = psutil.Process(self.federation.pid("server-executor"))
        return until(lambda: next(_holding(parent.children(recursive=True), self.folder), None), f"a process holds {self.folder}")

    def round_begins(self, number: int) -> None:
        """Wait until the questions of a round go out."""
        self.wait("stage", title=f"round {number}/{self.config.federation.rounds}")

    def whole(self) -> dict[str, Any]:
        """Wait for the end, see that no file is torn, and return the summary."""
        self.wait("end")
        until((self.folder / "summary.json").exists, "summary.json")
        assert_whole(self.folder, self.config)
        return read_json(self.folder / "summary.json")

    def heard(self) -> dict[int, set[str]]:
        """Round → the clients whose reply was counted in it."""
        found: dict[int, set[str]] = {number: set() for number in range(1, self.config.federation.rounds + 1)}
        for event in self.events("reply"):
            found[event["round"]].add(event["client"])
        return found

    def assert_equals_simulation(self, scratch: Path) -> None:
        """The final core and the personal adapters are, bit for bit, those of a simulation with the same contributions."""
        heard, published = self.heard(), {event["client"] for event in self.events("personal")}
        grid = local_grid(self.config, scratch)
        grid.__class__ = Partial
        assert isinstance(grid, Partial)
        grid.heard = {(TRAIN, number, client) for number, clients in heard.items() for client in clients}
        grid.heard |= {(PERSONALISE, self.config.federation.rounds, client) for client in published}
        federate(self.config, scratch, grid=grid)
        assert_same_result(scratch, self.folder)


class Partial(LocalGrid):
    """A LocalGrid in which training fails, except for the (kind, round, client) in `heard`."""

    heard: set[tuple[str, int, str]]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        for message_id in message_ids:
            message = self._pending.get(message_id)
            if message is None:
                continue
            kind, name = message.metadata.message_type, str(self._contexts[message.metadata.dst_node_id].node_config["name"])
            if kind in (TRAIN, PERSONALISE) and (kind, Order.of(message.content).round, name) not in self.heard:
                del self._pending[message_id]
                yield Message(Error(2, "left out"), reply_to=message)
            else:
                yield from super().pull_messages([message_id])


def assert_whole(folder: Path, config: RunConfig) -> None:
    """Every file of a finished run can be read back by this project's own readers, hashes and all, and nothing lies about."""
    assert not [path for path in folder.rglob("*") if path.name.endswith((".tmp", ".old"))]
    assert load_run(folder).digest() == config.digest()
    read_events(folder / "events.jsonl")
    assert (folder / "events.jsonl").read_bytes().endswith(b"\n")
    read_json(folder / "summary.json")
    rounds = sorted((folder / "checkpoints").iterdir())
    assert [path.name for path in rounds] == [f"round-{i:04d}" for i in range(1, config.federation.rounds + 1)]
    for number, path in enumerate(rounds, 1):
        checkpoint._load(path, number, config.digest())
    bases = list((folder / "basis").iterdir())
    assert len(bases) == 1 and load_basis(folder, bases[0].stem).fingerprint == bases[0].stem
    for client in adapters.clients(folder / "adapters"):
        for version in adapters.versions(folder / "adapters", client):
            adapters.load(folder / "adapters", client, version)
    known = {"config.toml", "events.jsonl", "summary.json", "checkpoints", "basis", "adapters"}
    assert {path.name for path in folder.iterdir()} == known


def kill(process: psutil.Process) -> None:
    """kill -9, and wait until it is gone: one that waits for the disk goes on living until it has been served."""
    process.kill()
    until(lambda: _gone(process), f"{process} is gone")


def _gone(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _holding(candidates: list[psutil.Process], folder: Path) -> Iterator[psutil.Process]:
    wanted = str(folder.resolve())
    for process in candidates:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            descriptors = list(Path(f"/proc/{process.pid}/fd").iterdir())
            if any(os.path.realpath(descriptor) == wanted for descriptor in descriptors):
                yield process


def _named(candidates: list[psutil.Process], name: str) -> Iterator[psutil.Process]:
    for process in candidates:
        try:
            if any(part.endswith(name) for part in process.cmdline()[:2]):
                yield process
        except psutil.NoSuchProcess:
            continue
