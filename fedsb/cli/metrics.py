"""`fedsb metrics`: the figures of a federation, or of a site's trainer, for Prometheus."""

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.registry import Collector

from clients.relay import TrainerRelay
from fedsb.deploy.flower import Flower
from fedsb.deploy.home import Home
from fedsb.deploy.metrics import FederationCollector
from fedsb.deploy.watch import ASK_SECONDS
from fedsb.errors import DeployError

PORT = 9464


def metrics(
    home: Annotated[Path | None, typer.Option(help="folder of the federation whose figures are served")] = None,
    socket: Annotated[Path | None, typer.Option(help="Unix socket of the trainer whose figures are served instead")] = None,
    host: Annotated[str, typer.Option(help="address to listen on; whoever reaches it can read the figures")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="port to listen on; 0 takes a free one")] = PORT,
) -> None:
    """Serve figures for Prometheus at /metrics until stopped: of a federation (--home), or of one trainer (--socket)."""
    if (home is None) == (socket is None):
        raise DeployError("fedsb metrics serves either a federation or one trainer; give --home or --socket, and not both")
    if home is not None and not home.is_dir():
        raise DeployError(f"--home {home}: there is no such folder; name the folder of a federation")
    if home is not None:
        place = Home(home)
        _serve(FederationCollector(place, Flower(place, ASK_SECONDS), _say), host, port)
    elif socket is not None:
        _serve(TrainerRelay(socket, _say), host, port)


def _serve(collector: Collector, host: str, port: int) -> None:
    registry = CollectorRegistry()
    registry.register(collector)
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        raise DeployError(
            f"cannot listen on {host}, port {port} ({error.strerror or error}); choose another --host or --port"
        ) from None
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # the first process of a container is not ended by it otherwise
    print(f"figures for Prometheus: http://{host}:{server.server_port}/metrics", flush=True)
    thread.join()


def _say(sentence: str) -> None:
    print(f"fedsb: {sentence}", file=sys.stderr, flush=True)
