"""The folder of a federation: keys, certificates, Flower's state, runs and logs, all in one place that can be backed up."""

import contextlib
import fcntl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedsb.deploy.certs import Authority
from fedsb.errors import DeployError
from fedsb.sections import SiteName
from fedsb.store.files import read_json, write_file, write_json, writing

LOCK = ".lock"
CONNECTION = "fedsb"  # the name of the server in Flower's own configuration
SETTINGS = {"config": "", "set": "", "out": "", "home": "", "resume": False}  # of a run, as `server/app.py` reads them


def flower_app(name: str, settings: Mapping[str, object], server: str, client: str) -> dict[str, str]:
    """The files of a Flower app: what Flower ships to every site, so nothing but where installed packages have the two apps.

    Args:
        name: of the app and its package.
        settings: the keys of its run configuration, with their defaults.
        server, client: the source of the two modules, each of which has an `app`.
    """
    project = {
        "build-system": {"requires": ["hatchling"], "build-backend": "hatchling.build"},
        "project": {"name": name.replace("_", "-"), "version": "0.1.0", "license": "Apache-2.0", "dependencies": []},
        "tool": {
            "flwr": {
                "app": {
                    "publisher": "fedsb",
                    "components": {"serverapp": f"{name}.server_side:app", "clientapp": f"{name}.client_side:app"},
                    "config": dict(settings),
                }
            }
        },
    }
    return {
        "pyproject.toml": tomli_w.dumps(project),
        f"{name}/__init__.py": "",
        f"{name}/server_side.py": server,
        f"{name}/client_side.py": client,
    }


APP = flower_app(
    "fedsb_run",
    SETTINGS,
    "from server.app import app as federation\n\napp = federation\n",
    "from clients.app import app as client\n\napp = client\n",
)


class LocalSite(BaseModel):
    """A site of `fedsb up`: its name, its place, and the port of its SuperNode on the loopback."""

    model_config = ConfigDict(frozen=True, strict=True)

    name: SiteName
    index: int
    port: int


class Topology(BaseModel):
    """`topology.json`: the ports of a federation of local processes."""

    model_config = ConfigDict(frozen=True, strict=True)

    port: int
    sites: list[LocalSite] = Field(min_length=1)


class Admitted(BaseModel):
    """A site in `admitted.json`: Flower's number for it, and the SHA-256 of its public key."""

    model_config = ConfigDict(frozen=True, strict=True)

    node: str
    key_sha256: str
    since: str


@dataclass(frozen=True)
class Home:
    """Where everything of a federation lies."""

    folder: Path

    @property
    def tls(self) -> Authority:
        """Its authority and the server's certificate."""
        return Authority(self.folder / "tls")

    @property
    def flower(self) -> Path:
        """FLWR_HOME of every process of this federation."""
        return self.folder / "flower"

    @property
    def runs(self) -> Path:
        """The folders of runs, by name."""
        return self.folder / "runs"

    @property
    def logs(self) -> Path:
        """One log a process."""
        return self.folder / "logs"

    def site(self, name: str) -> Path:
        """The folder of a local site."""
        return self.folder / "sites" / name

    @property
    def elsewhere(self) -> bool:
        """Whether its processes are not this folder's to start and end: `fedsb init` made it, and not `fedsb up`."""
        return (self.flower / "config.toml").exists() and not (self.folder / "topology.json").exists()

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Wait until no other command changes this folder, and keep others waiting meanwhile. Raises DiskError.

        For whoever reads `started.json` or `admitted.json` and writes it back. The system ends a dead process's turn.
        """
        with contextlib.ExitStack() as stack:
            with writing(self.folder):
                lock = stack.enter_context((self.folder / LOCK).open("ab"))
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def write_connection(self, address: str) -> None:
        """Tell Flower's commands where the server is."""
        server = {"address": address, "root-certificates": str(self.tls.ca.resolve())}
        content = {"superlink": {"default": CONNECTION, CONNECTION: server}}
        write_file(self.flower / "config.toml", tomli_w.dumps(content).encode())

    def write_app(self) -> Path:
        """Put the Flower app that a run ships in place; returns its folder."""
        app = self.folder / "app"
        for name, text in APP.items():
            write_file(app / name, text.encode())
        return app

    def topology(self) -> Topology:
        """Raises DeployError if there is no federation here."""
        path = self.folder / "topology.json"
        if not path.exists():
            raise DeployError(
                f"{self.folder}: no federation was started here; `fedsb up` starts one, --home names another folder"
            )
        try:
            return Topology.model_validate(read_json(path))
        except ValidationError:
            raise DeployError(f"{path}: is not what `fedsb up` wrote; delete it and start again") from None

    def write_topology(self, topology: Topology) -> None:
        """Write `topology.json`."""
        write_json(self.folder / "topology.json", topology.model_dump())

    def admitted(self) -> dict[str, Admitted]:
        """The sites that may take part, by name."""
        return {name: Admitted.model_validate(entry) for name, entry in self._table("admitted.json").items()}

    def write_admitted(self, sites: dict[str, Admitted]) -> None:
        """Write `admitted.json`."""
        write_json(self.folder / "admitted.json", {name: site.model_dump() for name, site in sites.items()})

    def started(self) -> dict[str, str]:
        """Run name → Flower's number of its last start, in the order of starting."""
        runs = self._table("started.json").get("runs", [])
        assert isinstance(runs, list)
        return {str(run["name"]): str(run["number"]) for run in runs}

    def write_started(self, runs: dict[str, str]) -> None:
        """Write `started.json`."""
        entries = [{"name": name, "number": number} for name, number in runs.items()]
        write_json(self.folder / "started.json", {"runs": entries})

    def _table(self, name: str) -> dict[str, object]:
        path = self.folder / name
        return read_json(path) if path.exists() else {}
