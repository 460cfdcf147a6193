"""How large is an adapter of NOLA, on disk and on the wire, and what does rounding its coefficients cost?

    python -m benchmarks.nola_size

Runs `configs/quickstart.toml` with NOLA (SmolLM2, four tasks, each client's personal adapter), exports each personal adapter with
each number of bits (`fedsb export --format core --bits`), loads the files again and scores them on their client's test set.

`size_BITS`: bytes of adapter_model.safetensors and adapter_config.json by those of the formula, (k + k) · layers · bits / 8, and
8 for the seed. Target: at most 1.1. `wire`: bytes that went up in a round from each client by the same. `store`: of a version's
folder in the adapter store, whose manifest names every tensor. `loss_BITS`: mean loss in nats of the rounded adapters by that of
32 bits.
NOLA's published checkpoints hold the frozen factors too, about 40 million numbers for a model of 7B at rank 16.
"""

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.harness import figure, report, say
from clients.session import Session, Site
from fedsb.adapters.coefficients import BITS, layers_of_rows, unpack
from fedsb.cli.simulate import simulated
from fedsb.config import RunConfig
from fedsb.store import adapters
from fedsb.store.basis_files import load_basis
from fedsb.store.export import CONFIG_FILE, PREFIX, WEIGHTS_FILE, export_core
from fedsb.store.tensors import load_tensors

SETTINGS = ["adapter.method=nola", "adapter.rank=16", "federation.rounds=2", "train.steps=10", "personal.steps=10"]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.toml"))
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a setting")
    options = parser.parse_args(arguments)
    run = RunConfig.load(options.config, [*SETTINGS, *options.set])
    with tempfile.TemporaryDirectory() as folder:
        report("nola_size", figures(run, Path(folder)))


def figures(run: RunConfig, folder: Path) -> dict[str, dict[str, Any]]:
    """Run, export, load, score."""
    summary = simulated(run, folder, resume=False)
    session = Session(run)
    count = len(session.layout.shapes)
    found, losses = {}, {}
    for bits in BITS:
        each = []
        for index, client in enumerate(run.client_names):
            stored = adapters.load(folder / "adapters", client)
            basis = load_basis(folder, stored.manifest.basis_fingerprint)
            session.use(basis)
            to = export_core(stored, basis, folder / f"{bits} {client}", modules=_modules(session), bits=bits)
            state = _read(to, stored.layers, run.base_count)
            each.append(session.score(Site(client, index, folder), session.layout.flatten(state)).loss)
        losses[bits] = sum(each) / len(each)
        formula = count * run.base_count * bits / 8 + 8
        size = sum((to / name).stat().st_size for name in (WEIGHTS_FILE, CONFIG_FILE))
        found[f"size_{bits}"] = figure(size / formula, "ratio", ours=float(size), peer=formula)
        found[f"loss_{bits}"] = figure(losses[bits] / losses[32], "ratio", ours=losses[bits], peer=losses[32])
        say(f"{bits:>2} bits: {size:,} bytes of {formula:,.0f}, loss {losses[bits]:.5f}")
    formula = count * run.base_count * 4 + 8
    up = summary["bytes"]["up_per_client_round"]
    kept = sum(path.stat().st_size for path in (folder / "adapters" / run.client_names[0] / "v0001").iterdir())
    return found | {
        "wire": figure(up / formula, "ratio", ours=up, peer=float(formula)),
        "store": figure(kept / formula, "ratio", ours=float(kept), peer=float(formula)),
    }


def _modules(session: Session) -> list[str]:
    return [name for name, _ in session.transformer.named_modules() if name]


def _read(folder: Path, layers: Mapping[str, Mapping[str, Tensor]], width: int) -> dict[str, Tensor]:
    """The state that a file holds."""
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in load_tensors(folder / WEIGHTS_FILE)[0].items()}
    found = layers_of_rows(unpack(tensors, 2 * len(layers), width), list(layers), ("alpha", "beta"))
    return {f"{layer}.{part}": tensor for layer, parts in found.items() for part, tensor in parts.items()}


if __name__ == "__main__":
    main()
