"""`fedsb export`: personal adapters as folders that other programs load."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from fedsb.errors import StoreError
from fedsb.models import locate, outline_model
from fedsb.store import adapters
from fedsb.store.basis_files import load_basis
from fedsb.store.export import export_core, export_lora
from server.run_folder import load_run


class Format(str, Enum):
    """What an exported folder holds."""

    lora = "lora"
    core = "core"


def export(
    run: Annotated[Path, typer.Argument(help="folder of a run")],
    out: Annotated[Path, typer.Option(help="where the folders go, one per client")],
    client: Annotated[str | None, typer.Option(help="export this client's adapter")] = None,
    all_: Annotated[bool, typer.Option("--all", help="export every client's adapter")] = False,
    format_: Annotated[
        Format,
        typer.Option("--format", help="lora: plain LoRA for PEFT and vLLM; core: ours, small matrices with their basis"),
    ] = Format.lora,
    rank: Annotated[int | None, typer.Option(help="cut adapters that may be cut (docs/methods.md) to this rank")] = None,
) -> None:
    """Write personal adapters of a run as folders: plain LoRA for PEFT and vLLM, or our own format."""
    if (client is None) == (not all_):
        raise StoreError("name one client with --client NAME, or all of them with --all")
    config, store = load_run(run), run / "adapters"
    names = adapters.clients(store) if all_ else [str(client)]
    if not names:
        raise StoreError(f"{store} holds no adapters yet; let the run finish first")
    labels = 1 if config.model.kind == "classification" else None
    modules = [name for name, _ in outline_model(locate(config.model.source), config.model, labels).named_modules() if name]
    for name in names:
        stored = adapters.load(store, name)
        basis = load_basis(run, stored.manifest.basis_fingerprint)
        write = export_lora if format_ is Format.lora else export_core
        folder = write(stored, basis, out / name, modules=modules, rank=rank)
        print(f"{name}: version {stored.manifest.version} of round {stored.manifest.round} → {folder}")
