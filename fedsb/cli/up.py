"""`fedsb up` and `fedsb down`: a whole federation as processes on this machine, with TLS and keys as over a network."""

import socket
import time
from pathlib import Path
from typing import Annotated

import typer

from clients.policy import load_policy, template
from fedsb.deploy import processes
from fedsb.deploy.certs import check_valid, make_authority, make_node_key
from fedsb.deploy.flower import Flower
from fedsb.deploy.home import Home, LocalSite, Topology
from fedsb.deploy.sites import admit
from fedsb.errors import DeployError
from fedsb.sections import SITE_NAME
from fedsb.store.files import write_file, writing

HOME = Path("federation")
START_SECONDS = 60.0
HomeOption = Annotated[
    Path, typer.Option("--home", envvar="FEDSB_FEDERATION", show_envvar=False, help="folder of the federation")
]


def up(
    clients: Annotated[int, typer.Option(help="how many sites")] = 3,
    names: Annotated[str, typer.Option(help="their names, separated by commas; by default site-0, site-1, …")] = "",
    home: HomeOption = HOME,
    port: Annotated[int, typer.Option(min=0, max=65535, help="port of the server on the loopback; 0 takes a free one")] = 0,
) -> None:
    """Start a server and sites as local processes on the loopback: the topology of docker-compose.yml without containers."""
    chosen = [name for name in names.split(",") if name] or [f"site-{i}" for i in range(clients)]
    for name in chosen:
        if not SITE_NAME.fullmatch(name):
            raise DeployError(f"--names: {name!r} is no name of a site (a-z, 0-9, dot, dash, underscore); choose another")
    if len(set(chosen)) < len(chosen) or not chosen:
        raise DeployError("--names: a site needs a name of its own, and there must be one site at least")
    place = Home(home)
    if place.elsewhere:
        raise DeployError(
            f"{home}: is a federation of `fedsb init`, whose processes are started elsewhere; choose another --home"
        )
    processes.check_paths(place, chosen)
    if processes.running(place):
        raise DeployError(f"{home}: a federation runs here already; `fedsb status` shows it, `fedsb down` ends it")
    topology = _topology(place, chosen, port)
    with writing(home):
        home.mkdir(parents=True, exist_ok=True)
        home.chmod(0o700)  # keys, cores and adapters are nobody else's business
    make_authority(place.tls.folder)
    check_valid(place.tls.server)
    for site in topology.sites:
        make_node_key(place.site(site.name) / "key", site.name)
        policy = place.site(site.name) / "policy.toml"
        if not policy.exists():
            write_file(policy, template().encode())
        load_policy(policy)
    with writing(place.logs):
        place.logs.mkdir(parents=True, exist_ok=True)
        place.runs.mkdir(exist_ok=True)
    place.write_topology(topology)
    place.write_connection(f"{processes.HOST}:{topology.port}")
    processes.write_programs(place, topology)
    processes.begin(place)
    try:
        _wait_for_server(place, topology.port)
        for site in topology.sites:
            admit(place, place.site(site.name) / "key.pub", site.name)
        processes.begin_all(place)
    except BaseException:
        processes.end(place)
        raise
    print(f"a federation of {len(chosen)} sites runs in {home} (port {topology.port}): {', '.join(chosen)}")
    print(f"fedsb run CONFIG --home {home}    fedsb status --home {home}    fedsb down --home {home}")


def down(home: HomeOption = HOME) -> None:
    """End the processes of `fedsb up`; keys, runs and adapters stay."""
    place = Home(home)
    place.topology()
    print("ended" if processes.end(place) else f"nothing runs in {home}")


def _topology(place: Home, names: list[str], port: int) -> Topology:
    """The one that was there, if it has these sites, so that ports and Flower's state go on; else a new one."""
    if (place.folder / "topology.json").exists():
        before = place.topology()
        if [site.name for site in before.sites] == names and port in (0, before.port):
            taken = [number for number in (before.port, *(site.port for site in before.sites)) if not _free(number)]
            if not taken:
                return before
            raise DeployError(f"port {taken[0]} of this federation is in use by another program; end that program first")
    if port and not _free(port):
        raise DeployError(f"--port {port} is in use; choose another, or 0 for a free one")
    ports = [port or _any_port(), *(_any_port() for _ in names)]
    return Topology(port=ports[0], sites=[LocalSite(name=name, index=i, port=ports[i + 1]) for i, name in enumerate(names)])


def _free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((processes.HOST, port))
        except OSError:
            return False
        return True


def _any_port() -> int:
    with socket.socket() as probe:
        probe.bind((processes.HOST, 0))
        return int(probe.getsockname()[1])


def _wait_for_server(place: Home, port: int) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        with socket.socket() as probe:
            if probe.connect_ex((processes.HOST, port)) == 0:
                break
        if time.monotonic() > deadline or processes.states(place).get("superlink") in ("FATAL", "EXITED"):
            raise DeployError(f"the server did not start within {START_SECONDS:.0f} s; {place.logs}/superlink.log says why")
        time.sleep(0.1)
    Flower(place).nodes()
