"""`fedsb export`: personal adapters as folders that other programs load."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from torch import Tensor, nn

from fedsb.adapters.coefficients import BITS
from fedsb.adapters.head import features_of
from fedsb.adapters.methods import METHODS
from fedsb.errors import StoreError
from fedsb.models import Source, device_of, load_model, load_tokenizer, locate, outline_model
from fedsb.store import adapters
from fedsb.store.adapters import StoredAdapter
from fedsb.store.basis_files import load_basis
from fedsb.store.export import MANIFEST_FILE, export_core, export_hira, export_lora
from fedsb.store.files import read_json
from server.run_folder import load_run


class Format(str, Enum):
    """What an exported folder holds."""

    lora = "lora"
    core = "core"
    hira = "hira"


def export(
    run: Annotated[Path, typer.Argument(help="folder of a run")],
    out: Annotated[Path, typer.Option(help="where the folders go, one per client")],
    client: Annotated[str | None, typer.Option(help="export this client's adapter")] = None,
    all_: Annotated[bool, typer.Option("--all", help="export every client's adapter")] = False,
    format_: Annotated[
        Format,
        typer.Option(
            "--format",
            help="lora: plain LoRA for PEFT and vLLM; core: ours, small matrices with their basis; hira: flora exactly, for PEFT",
        ),
    ] = Format.lora,
    bits: Annotated[int, typer.Option(help="of each coefficient in --format core of nola: 32, 16, 8 or 4")] = 32,
    rank: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="rank of the plain LoRA: a smaller one, where adapters may be cut (docs/methods.md), or that to which updates "
            "are truncated that are no LoRA (bone, flora; twice their own by default)",
        ),
    ] = None,
) -> None:
    """Write personal adapters of a run as folders: plain LoRA for PEFT and vLLM, our own format, or HiRA."""
    if (client is None) == (not all_):
        raise StoreError("name one client with --client NAME, or all of them with --all")
    config, store = load_run(run), run / "adapters"
    if bits != 32 and (bits not in BITS or format_ is not Format.core or not METHODS[config.adapter.method].expand):
        raise StoreError(f"--bits {bits}: coefficients of nola are written in 32, 16, 8 or 4, with --format core; leave it out")
    if rank is not None and format_ is Format.hira:
        raise StoreError("--rank cuts a LoRA or our own format, and --format hira has all there is; leave one of the two out")
    names = adapters.clients(store) if all_ else [str(client)]
    if not names:
        raise StoreError(f"{store} holds no adapters yet; let the run finish first")
    headed, whole = config.model.kind == "classification", METHODS[config.adapter.method].takes_weights
    source, labels = locate(config.model.source), 1 if headed else None
    needed = whole or headed
    model = load_model(source, config.model, labels, device_of("cpu")) if needed else outline_model(source, config.model, labels)
    features = features_of(model, load_tokenizer(source)) if headed else None
    modules = [name for name, _ in model.named_modules() if name]
    for name in names:
        stored = adapters.load(store, name)
        basis = load_basis(run, stored.manifest.basis_fingerprint)
        if needed:
            _check_model(stored, source)
        if features:
            stored = stored.plain(features)
        if format_ is Format.core:
            folder = export_core(stored, basis, out / name, modules=modules, rank=rank, bits=bits)
        elif format_ is Format.hira:
            folder = export_hira(stored, basis, out / name, modules=modules)
        else:
            weights = _weights(model, stored) if whole else None
            folder = export_lora(stored, basis, out / name, modules=modules, weights=weights, rank=rank)
        cut = read_json(folder / MANIFEST_FILE).get("truncated")
        lost = f", truncated to rank {cut['rank']}: {cut['relative_loss']:.2%} of the update's norm is lost" if cut else ""
        print(f"{name}: version {stored.manifest.version} of round {stored.manifest.round} → {folder}{lost}")


def _check_model(stored: StoredAdapter, source: Source) -> None:
    """Raise StoreError if the model is not the one that the adapter was trained on."""
    trained_on = stored.manifest.base_model.sha256
    if trained_on != source.sha256:
        raise StoreError(
            f"model.source = {source.name}: its weights (SHA-256 {source.sha256[:12]}) are not those that the adapter of "
            f"{stored.manifest.client} was trained on ({trained_on[:12]}); restore them"
        )


def _weights(model: nn.Module, stored: StoredAdapter) -> dict[str, Tensor]:
    """Layer → W0."""
    parameters = dict(model.named_parameters())
    return {layer: parameters[f"{layer}.weight"] for layer in stored.layers if f"{layer}.weight" in parameters}
