"""`fedsb serve`: adapters of many tenants behind one model, by OpenAI's HTTP interface."""

import contextlib
import ipaddress
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
import typer
import uvicorn

from fedsb.cli.options import Json, Quiet, stopped
from fedsb.cli.serve_screen import ServeScreen
from fedsb.errors import ConfigError, DeployError
from fedsb.models import device_of, load_model, load_tokenizer, locate
from fedsb.quantisation import KINDS, Quantised
from fedsb.sections import ModelSection
from fedsb.serving.bank import Bank
from fedsb.serving.engine import Engine, Limits
from fedsb.serving.http.app import build
from fedsb.serving.http.keys import Keys
from fedsb.serving.http.service import Bounds, Service
from fedsb.serving.mixed import mix
from fedsb.serving.pack import index_of
from fedsb.serving.sources import source_of
from fedsb.serving.tenants import Tenants
from server.run_folder import CONFIG, load_run

PORT = 8000
WIDTHS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def serve(
    stores: Annotated[
        list[Path], typer.Argument(help="folders of runs, their adapters, folders of LoRAs that PEFT wrote, or packs")
    ],
    model: Annotated[str | None, typer.Option(help="base model, as model.source; by default that of the first run")] = None,
    name: Annotated[str | None, typer.Option(help="the base model for clients; by default the last part of --model")] = None,
    dtype: Annotated[str, typer.Option(help="dtype of the base model: auto, bf16 or fp32")] = "auto",
    adapter_dtype: Annotated[str, typer.Option(help="dtype of adapters: auto (the base model's), bf16 or fp32")] = "auto",
    quantise: Annotated[str | None, typer.Option(help="base model in int8, int4 or nf4; the extra `quantised`")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps")] = "auto",
    host: Annotated[str, typer.Option(help="address to listen on; another than the loopback takes --keys")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="port to listen on; 0 takes a free one")] = PORT,
    keys: Annotated[Path | None, typer.Option(help="file of keys, as `fedsb key` writes it; without one all may ask")] = None,
    capacity: Annotated[int, typer.Option(min=2, help="adapters in memory at the most")] = 10_000,
    requests: Annotated[int, typer.Option(min=1, help="requests answered at one time")] = 64,
    waiting: Annotated[int, typer.Option(min=0, help="requests that may wait besides; more are answered 503")] = 256,
    cache_tokens: Annotated[int, typer.Option(min=64, help="tokens of all running requests together")] = 16384,
    step_tokens: Annotated[int, typer.Option(min=16, help="tokens of one step; a longer prompt takes several")] = 512,
    answer_tokens: Annotated[int, typer.Option(min=1, help="tokens of an answer at the most")] = 1024,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads of torch; 0 leaves torch's choice")] = 0,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Serve stores' adapters and their base model until stopped; `model` in a request is a tenant's name."""
    for option, value, known in (("--dtype", dtype, ("auto", *WIDTHS)), ("--adapter-dtype", adapter_dtype, ("auto", *WIDTHS))):
        if value not in known:
            raise ConfigError(f"{option} {value}: is none of {', '.join(known)}; choose one")
    fewer: Quantised | None = next((kind for kind in KINDS if kind == quantise), None)
    if fewer != quantise:
        raise ConfigError(f"--quantise {quantise}: is none of {', '.join(KINDS)}; choose one")
    known_keys = Keys(keys)
    if not known_keys.needed and not _is_loopback(host):
        raise ConfigError(f"--host {host}: whoever reaches it could ask every tenant; give --keys, or listen on 127.0.0.1")
    for store in stores:
        if not store.exists():
            raise ConfigError(f"{store}: there is no such folder; name the folder of a run, its adapters, or a pack")
    if threads:
        torch.set_num_threads(threads)
    source = locate(model_of(stores, model))
    told: Literal["auto", "bf16", "fp32"] = dtype  # type: ignore[assignment]
    place = device_of(device)
    section = ModelSection.model_validate({"source": source.name, "dtype": told})
    with contextlib.closing(ServeScreen(json_=json_, quiet=quiet)) as screen:
        screen.loading(source.name)
        base, tokenizer = load_model(source, section, None, place, fewer), load_tokenizer(source)
        bank = Bank(capacity + 1, WIDTHS[adapter_dtype] if adapter_dtype in WIDTHS else cast(torch.dtype, base.dtype), place)
        mix(base, bank)
        tenants = Tenants([source_of(store, source.sha256, bank.layers) for store in stores], bank)
        tenants.names()  # so that a folder that is no store is told now
        engine = Engine(base, bank, Limits(requests, step_tokens, cache_tokens, waiting))
        called = name or Path(source.name).name
        _run(Service(called, tokenizer, engine, tenants, known_keys, Bounds(answer=answer_tokens)), screen, host, port)


def _run(service: Service, screen: ServeScreen, host: str, port: int) -> None:
    """Serve until told to end."""

    async def look() -> None:
        screen.look(service)

    told_to: dict[str, Any] = {"log_level": "warning", "callback_notify": look, "timeout_notify": screen.seconds}
    server = _Server(uvicorn.Config(build(service), host=host, port=port, ws="none", **told_to), service, screen)
    try:
        server.run()
    except SystemExit:
        raise DeployError(f"cannot listen on {host}, port {port}; choose another --host or --port") from None
    except KeyboardInterrupt:
        at_work = "were cut off" if server.force_exit else "have been answered"  # at a second Ctrl-C
        stopped(f"requests at work {at_work}; the same command serves again")
    finally:
        service.engine.close()


class _Server(uvicorn.Server):
    """Says where it listens once it does."""

    def __init__(self, config: uvicorn.Config, service: Service, screen: ServeScreen) -> None:
        super().__init__(config)
        self._service, self._screen = service, screen

    async def startup(self, sockets: object = None) -> None:
        """As uvicorn's."""
        await super().startup(sockets)  # type: ignore[arg-type]
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            self._screen.ready(self._service.base, len(self._service.tenants.names()), f"http://{host}:{port}/v1")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def model_of(stores: list[Path], model: str | None) -> str:
    """The setting of the base model: as told, or of the first of the stores. Raises ConfigError if neither says one."""
    if model is not None:
        return model
    if stores[0].is_file():
        return index_of(stores[0]).model_name
    for run in (stores[0], stores[0].parent):
        if (run / CONFIG).exists():
            return load_run(run).model.source
    raise ConfigError(f"{stores[0]}: does not say what model its adapters are for; give --model")
