"""Small states, bases and adapters for the tests of the store."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fedsb.basis.frames import Basis
from fedsb.store import adapters

RANK = 4
MODEL = adapters.ModelId(name="tiny/model", sha256="ab" * 32)


def litter(folder: Path) -> list[str]:
    """Names of temporary files and folders anywhere below `folder`."""
    return sorted(path.name for path in folder.rglob("*") if path.name.endswith((".tmp", ".old")))


LAYERS = ("model.layers.0.q_proj", "model.layers.1.q_proj")


def state(seed: int = 0, layers: tuple[str, ...] = LAYERS) -> dict[str, Tensor]:
    """Random cores (4, 4)."""
    draw = torch.Generator().manual_seed(seed)
    return {f"{layer}.core": torch.randn(RANK, RANK, generator=draw) for layer in layers}


def basis(shapes: Mapping[str, tuple[int, int]], seed: int = 0, dtype: torch.dtype = torch.float32) -> Basis:
    """Random orthonormal B (out, 4) and A (4, in) for layers of shape (out, in), with a random R0."""
    draw = torch.Generator().manual_seed(seed)

    def orthonormal(rows: int) -> Tensor:
        frame: Tensor = torch.linalg.qr(torch.randn(rows, RANK, generator=draw))[0]
        return frame

    b = {layer: orthonormal(out).to(dtype) for layer, (out, _) in shapes.items()}
    a = {layer: orthonormal(width).T.to(dtype) for layer, (_, width) in shapes.items()}
    return Basis(B=b, A=a, R0={layer: torch.randn(RANK, RANK, generator=draw) for layer in shapes})


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear layer of a model, by name."""
    return {name: (m.out_features, m.in_features) for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def publish(store: Path, client: str, tensors: Mapping[str, Tensor], fingerprint: str = "00" * 32, **fields: object) -> int:
    """`adapters.publish` with everything filled in."""
    known = {"base_model": MODEL, "method": "lora-sb", "rank": RANK, "round": 5, "task": "chain_sum"}
    return adapters.publish(store, client, tensors, basis_fingerprint=fingerprint, **(known | fields))  # type: ignore[arg-type]
