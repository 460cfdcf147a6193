"""The resident trainer of a site: keeps base model, basis and data loaded between messages, which Flower serves with a new
process each time. HTTP over a Unix socket; one job at a time, in the order in which they come.

It alone touches the site's data. It takes nothing from whoever asks but the question: who the site is, and where its files
lie, it was told by its operator.
"""

import asyncio
import contextlib
import logging
import socket
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import uvicorn
from flwr.app import RecordDict
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from clients.answers import ANSWERS, answer
from clients.ask import REFUSED
from clients.figures import CONTENT_TYPE, Figures
from fedsb.errors import FedsbError, TrainerError
from fedsb.store.files import writing
from strategies.envelope import from_bytes, to_bytes

Answer = Callable[[str, RecordDict, Mapping[str, Any]], RecordDict]
log = logging.getLogger(__name__)
SOCKET_MODE = 0o660  # the executor of the ClientApp runs under the same group


def trainer_app(node: Mapping[str, Any], answer: Answer = answer) -> Starlette:
    """The trainer as a web application. `node`: who the site is, as a SuperNode's --node-config."""
    jobs = ThreadPoolExecutor(max_workers=1, thread_name_prefix="job")  # one thread, so torch's settings hold for all jobs
    waiting: list[str] = []
    figures = Figures(ANSWERS)

    async def put(request: Request) -> Response:
        kind, body = request.path_params["kind"], await request.body()
        gone = threading.Event()
        watcher = asyncio.create_task(_until_gone(request, gone))
        waiting.append(kind)
        figures.asked()
        try:
            reply = await asyncio.get_running_loop().run_in_executor(jobs, _job, kind, body, gone)
        except FedsbError as error:
            log.warning("%s was refused: %s (in the working folder %s)", kind, error, Path.cwd())
            return JSONResponse({"error": getattr(error, "outside", str(error))}, REFUSED)
        finally:
            watcher.cancel()
            waiting.remove(kind)
        return Response(reply, media_type="application/octet-stream")

    def _job(kind: str, body: bytes, gone: threading.Event) -> bytes:
        if gone.is_set():
            figures.dropped(kind)
            return b""
        with figures.job(kind):
            return to_bytes(answer(kind, from_bytes(body), node))

    async def health(_: Request) -> Response:
        return JSONResponse({"site": node.get("name"), "jobs": waiting})

    async def metrics(_: Request) -> Response:
        return Response(figures.text(), media_type=CONTENT_TYPE)

    routes = [Route("/answer/{kind}", put, methods=["POST"]), Route("/health", health), Route("/metrics", metrics)]
    return Starlette(routes=routes)


async def _until_gone(request: Request, gone: threading.Event) -> None:
    """Set `gone` once nobody waits for the answer: after the body, that is all that can still come."""
    await request.receive()
    gone.set()


def serve(path: Path, node: Mapping[str, Any]) -> None:
    """Listen on a Unix socket until the process is ended. Raises TrainerError if another trainer has it."""
    with _listening(path) as listener:
        config = uvicorn.Config(trainer_app(node), log_level="warning", lifespan="off", timeout_graceful_shutdown=1)
        uvicorn.Server(config).run(sockets=[listener])


@contextlib.contextmanager
def _listening(path: Path) -> Any:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            if path.is_socket():  # what a killed trainer left behind
                path.unlink(missing_ok=True)
        else:
            raise TrainerError(f"another trainer answers at {path}; end it first, or choose another --socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        try:
            listener.bind(str(path))
        except OSError as error:
            raise TrainerError(
                f"{path}: no socket can be made there ({error.strerror or error}); choose another --socket"
            ) from None
        path.chmod(SOCKET_MODE)
        try:
            yield listener
        finally:
            path.unlink(missing_ok=True)
