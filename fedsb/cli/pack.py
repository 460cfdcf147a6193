"""`fedsb pack`: adapters of very many tenants in one file."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track

from fedsb.cli.serve import WIDTHS, model_of
from fedsb.errors import ConfigError
from fedsb.models import locate, outline_model
from fedsb.sections import ModelSection
from fedsb.serving.bank import Bank
from fedsb.serving.mixed import mix
from fedsb.serving.packing import write_pack
from fedsb.serving.sources import source_of


def pack(
    stores: Annotated[list[Path], typer.Argument(help="what `fedsb serve` would serve; of a name in several the first counts")],
    out: Annotated[Path, typer.Option(help="the file; one that is there is replaced, as servers that have it can bear")],
    model: Annotated[str | None, typer.Option(help="base model, as model.source; by default that of the first run")] = None,
    dtype: Annotated[str, typer.Option(help="of the numbers: fp32, which loses nothing, or bf16")] = "fp32",
) -> None:
    """Put the newest adapter of every tenant into one file, which `fedsb serve` maps: none is read before it is asked for."""
    if dtype not in WIDTHS:
        raise ConfigError(f"--dtype {dtype}: is none of {', '.join(WIDTHS)}; choose one")
    if out.is_dir() or not out.parent.is_dir():
        raise ConfigError(f"--out {out}: is a folder, or in none; name a file in a folder that is there")
    source = locate(model_of(stores, model))
    bank = Bank(2)
    with torch.device("meta"):
        mix(outline_model(source, ModelSection.model_validate({"source": source.name}), None), bank)
    sources = [source_of(store, source.sha256, bank.layers) for store in stores]
    console = Console(stderr=True)
    found = write_pack(
        out,
        sources,
        (source.sha256, source.name),
        WIDTHS[dtype],
        lambda names: track(list(names), "packing", console=console, transient=True, disable=not console.is_terminal),
    )
    print(f"{out}: {len(found.tenants)} tenants, {out.stat().st_size / 1e6:.1f} MB")
