"""What published adapters look like: spectra and norms of their matrices, and how alike those of two clients are."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fedsb.errors import FedsbError
from fedsb.report.units import one_line
from fedsb.store import adapters
from fedsb.store.adapters import StoredAdapter


@dataclass(frozen=True)
class Cores:
    """Of the current version of each client's adapter.

    Attributes:
        stored: client → adapter.
        faults: client → why its adapter cannot be read.
        spectrum: client → singular values, largest first, mean over layers; of adapters that have square cores alone.
        norms: layer → Frobenius norm of what is trained there, mean over clients.
        alike: (n, n) cosine of two clients' numbers, in the order of `stored`; empty unless all have as many.
    """

    stored: dict[str, StoredAdapter]
    faults: dict[str, str]
    spectrum: dict[str, list[float]]
    norms: dict[str, float]
    alike: list[list[float]]


def cores_of(store: Path) -> Cores:
    """Read a run's store; one that is not there holds nothing."""
    stored, faults = dict[str, StoredAdapter](), dict[str, str]()
    for client in adapters.clients(store) if store.is_dir() else []:
        try:
            stored[client] = adapters.load(store, client)
        except FedsbError as error:
            faults[client] = one_line(str(error))
    norms: dict[str, list[float]] = {}
    for each in stored.values():
        for layer, parts in each.layers.items():
            norms.setdefault(layer, []).append(sum(float(part.square().sum()) for part in parts.values()) ** 0.5)
    return Cores(
        stored,
        faults,
        {client: found for client, each in stored.items() if (found := _spectrum(each))},
        {layer: sum(found) / len(found) for layer, found in norms.items()},
        _alike([each.numbers for each in stored.values()]),
    )


def _spectrum(adapter: StoredAdapter) -> list[float]:
    squares = [parts["core"] for parts in adapter.layers.values() if parts.keys() == {"core"}]
    if not squares or len({square.shape for square in squares}) > 1:
        return []
    values: list[float] = torch.linalg.svdvals(torch.stack(squares)).mean(0).tolist()
    return values


def _alike(numbers: list[Tensor]) -> list[list[float]]:
    if len({len(each) for each in numbers}) != 1:
        return []
    rows = torch.nn.functional.normalize(torch.stack(numbers), dim=1)
    found: list[list[float]] = (rows @ rows.T).tolist()
    return found
