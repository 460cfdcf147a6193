"""A federation as processes on this machine, kept alive by supervisord: what compose does with containers.

Same programs, flags, TLS and keys: a SuperLink and the executor of the ServerApp; for each site a SuperNode, the executor of
the ClientApp and a trainer. All listen on the loopback only.
"""

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedsb.deploy.flower import search_path, tool
from fedsb.deploy.home import Home, LocalSite, Topology
from fedsb.deploy.quiet import QUIET
from fedsb.errors import DeployError
from fedsb.store.files import write_file

HOST = "127.0.0.1"
END_SECONDS = 30.0  # and more for every site: supervisord ends one after another
SITE_SECONDS = 30.0
SOCKET_LENGTH = 100  # bytes: the kernel's limit for the path of a Unix socket is 107
QUOTED = "\"';#,\n"  # mean something in supervisord's configuration
POLL = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2", "FEDSB_POLL_SECONDS": "0.25"}  # everything is near and small here


def write_programs(home: Home, topology: Topology) -> Path:
    """Write supervisord's configuration; returns its path. Only the SuperLink starts at once: nodes come when admitted."""
    folder = home.folder.resolve()
    socket = _control_socket(home)
    parts = [
        f"[supervisord]\nlogfile={folder}/logs/supervisord.log\npidfile={folder}/supervisord.pid\numask=077\nchildlogdir={folder}/logs\n",
        f"[unix_http_server]\nfile={socket}\nchmod=0600\n",
        "[rpcinterface:supervisor]\nsupervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface\n",
        f"[supervisorctl]\nserverurl=unix://{socket}\n",
    ]
    programs = [_superlink(home, topology), _server_executor(home, topology)]
    for site in topology.sites:
        programs += [_supernode(home, topology, site), _site_executor(home, site), _trainer(home, topology, site)]
    parts += [_program(home, name, command, environment) for name, command, environment in programs]
    path = home.folder / "supervisord.conf"
    write_file(path, "\n".join(part.replace("%", "%%") for part in parts).encode())
    return path


def check_paths(home: Home, names: Sequence[str]) -> None:
    """Raise DeployError if Unix sockets cannot be made in this folder."""
    odd = next((letter for letter in str(home.folder.resolve()) if letter in QUOTED), None)
    if odd:
        raise DeployError(f"{home.folder.resolve()}: supervisord cannot have {odd!r} in a path; choose another --home")
    sockets = [_control_socket(home), *(trainer_socket(home, name) for name in names)]
    if max(len(str(socket)) for socket in sockets) > SOCKET_LENGTH:
        raise DeployError(f"{home.folder}: the path is too long for Unix sockets; choose a shorter --home")


def trainer_socket(home: Home, name: str) -> Path:
    """Where a local site's trainer listens."""
    return home.site(name).resolve() / "trainer.sock"


def _control_socket(home: Home) -> Path:
    return home.folder.resolve() / "supervisor.sock"


def begin(home: Home) -> None:
    """Start supervisord, and with it the SuperLink."""
    path = home.folder / "supervisord.conf"
    command = [tool("supervisord"), "-c", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DeployError(f"{path}: supervisord did not start ({' '.join((done.stderr or done.stdout).split())[:300]})")


def begin_all(home: Home) -> None:
    """Start everything that is not running yet."""
    start(home, "all")


def states(home: Home) -> dict[str, str]:
    """Process → state (RUNNING, STARTING, FATAL, …); empty if nothing runs here."""
    if not running(home):
        return {}
    return {line.split()[0]: line.split()[1] for line in _control(home, "status").splitlines() if len(line.split()) > 1}


def pid_of(home: Home, program: str) -> int | None:
    """The process id of a program, e.g. `superlink` or `site-alpha-trainer`; None while it does not run."""
    said = _control(home, "pid", program).strip()
    return int(said) if said.isdecimal() and said != "0" else None


def stop(home: Home, *programs: str) -> None:
    """Stop programs, and do not start them anew. Raises DeployError if one of them still runs."""
    _control(home, "stop", *programs)
    alive = [program for program in programs if pid_of(home, program)]
    if alive:
        raise DeployError(f"{alive[0]} does not end; see {home.logs}/supervisord.log")


def start(home: Home, *programs: str) -> None:
    """Start programs that were stopped. Raises DeployError if one of them does not stay up."""
    said = _control(home, "start", *programs)
    failed = [line for line in said.splitlines() if "ERROR" in line and "already started" not in line]
    if failed:
        raise DeployError(f"{home.logs}: {failed[0]}; the log of that process says why")


def renew(home: Home, program: str) -> None:
    """Start a program as `supervisord.conf` now has it. Raises DeployError if it does not stay up."""
    _control(home, "update", program)
    start(home, program)


def running(home: Home) -> int | None:
    """The process id of this folder's supervisord, if it is alive."""
    try:
        number = int((home.folder / "supervisord.pid").read_text())
        command = Path(f"/proc/{number}/cmdline")
        if command.parent.parent.exists() and b"supervisord" not in command.read_bytes():
            return None  # the number belongs to somebody else by now
        os.kill(number, 0)
    except (OSError, ValueError):
        return None
    return number


def end(home: Home) -> bool:
    """End all processes; returns whether there were any. Raises DeployError if they do not end."""
    number = running(home)
    if number is None:
        return False
    os.kill(number, signal.SIGTERM)
    deadline = time.monotonic() + END_SECONDS + SITE_SECONDS * len(home.topology().sites)
    while running(home) is not None:
        if time.monotonic() > deadline:
            raise DeployError(f"process {number} does not end; see {home.folder}/logs/supervisord.log")
        time.sleep(0.1)
    return True


def _superlink(home: Home, topology: Topology) -> tuple[str, list[str], dict[str, str]]:
    tls, folder = home.tls, home.folder.resolve()
    command = ["python", "-m", "server.link", "--host", HOST, "--port", str(topology.port), "--isolation", "process"]
    command += ["--ssl-certfile", str(tls.server.resolve()), "--ssl-keyfile", str(tls.server_key.resolve())]
    command += ["--ssl-ca-certfile", str(tls.ca.resolve()), "--enable-supernode-auth", "--database", str(folder / "superlink.db")]
    return "superlink", [*command, "--disable-runtime-dependency-installation"], {}


def _server_executor(home: Home, topology: Topology) -> tuple[str, list[str], dict[str, str]]:
    address = f"{HOST}:{topology.port}"
    command = ["flower-superexec", "--runtime-api-address", address, "--root-certificates", str(home.tls.ca.resolve())]
    return "server-executor", command, {}


def _supernode(home: Home, topology: Topology, site: LocalSite) -> tuple[str, list[str], dict[str, str]]:
    command = ["python", "-m", "clients.node", "--superlink", f"{HOST}:{topology.port}", "--isolation", "process"]
    command += ["--root-certificates", str(home.tls.ca.resolve()), "--host", HOST, "--port", str(site.port)]
    command += ["--auth-supernode-private-key", str(home.site(site.name).resolve() / "key")]
    return f"site-{site.name}-supernode", command, {}


def _site_executor(home: Home, site: LocalSite) -> tuple[str, list[str], dict[str, str]]:
    command = ["flower-superexec", "--runtime-api-address", f"{HOST}:{site.port}", "--insecure"]
    return f"site-{site.name}-executor", command, {"FEDSB_TRAINER": str(trainer_socket(home, site.name))}


def _trainer(home: Home, topology: Topology, site: LocalSite) -> tuple[str, list[str], dict[str, str]]:
    command = ["fedsb", "trainer", "--socket", str(trainer_socket(home, site.name)), "--name", site.name]
    command += ["--index", str(site.index), "--sites", str(len(topology.sites)), "--home", str(home.site(site.name).resolve())]
    command += ["--policy", str(home.site(site.name).resolve() / "policy.toml")]
    share = max(1, (os.cpu_count() or 1) // len(topology.sites))  # threads that wait for each other spin
    return f"site-{site.name}-trainer", command, {"OMP_NUM_THREADS": str(share)}


def _program(home: Home, name: str, command: Sequence[str], environment: Mapping[str, str]) -> str:
    folder = home.folder.resolve()
    flower = (
        home.flower.resolve()
        if name in ("superlink", "server-executor")
        else folder / "sites" / name.removeprefix("site-").rsplit("-", 1)[0] / "flower"
    )
    own = QUIET | POLL | {"FLWR_HOME": str(flower), "PATH": search_path()} | dict(environment)
    quoted = ",".join(f'{key}="{value}"' for key, value in own.items())
    lines = {
        "command": shlex.join([tool(command[0]), *command[1:]]),
        "directory": str(folder),
        "environment": quoted,
        "autostart": "true" if name == "superlink" else "false",
        "autorestart": "true",
        "startsecs": "1",
        "startretries": "1000",
        "stopasgroup": "true",
        "killasgroup": "true",
        "redirect_stderr": "true",
        "stdout_logfile": f"{folder}/logs/{name}.log",
        "stdout_logfile_backups": "3",
    }
    return f"[program:{name}]\n" + "".join(f"{key}={value}\n" for key, value in lines.items())


def _control(home: Home, *arguments: str) -> str:
    command = [tool("supervisorctl"), "-c", str(home.folder / "supervisord.conf"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout
