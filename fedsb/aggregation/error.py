"""How far an aggregate is from the mean of the clients' weight updates, measured on the real matrices of a round."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedsb.adapters.method import Method, Parts
from fedsb.basis.frames import Basis, Fold

PROBES = 4


class AggregationError:
    """‖mean_i(w_i·ΔW_i) - ΔW̄‖_F / ‖mean_i(w_i·ΔW_i)‖_F over all layers, estimated with random probes; ΔW̄ is the aggregate's.

    For a Gaussian probe v, E‖M·v‖² = ‖M‖_F², so each client's update is applied to the same few probes instead of being
    formed (out x in numbers a layer). A frozen A is applied to the probes once. Memory: PROBES columns a layer, and a frozen B.
    An update without a chain is linear in its parts, and the error is measured on these themselves; of one that W0 is multiplied
    with (`Method.multiplies`), it is measured on that factor; of prompts (`Method.output`) on those of the probes. All in fp64.

    Args:
        method: says what an update is (`Method.chain`).
        basis: what is frozen.
        shapes: layer name → (out, in).
        scale: α / r.
        generator: draws the probes.
        rank, seed: of the run, for methods whose parts mean something only with what follows from these (`Method.expand`).
    """

    def __init__(
        self,
        method: Method,
        basis: Basis,
        shapes: Mapping[str, tuple[int, int]],
        scale: float,
        generator: torch.Generator,
        *,
        rank: int = 0,
        seed: int = 0,
    ) -> None:
        self._method, self._scale, self._shapes, self._rank, self._seed = method, scale, shapes, rank, seed
        self._b = {name: b.double() for name, b in basis.B.items()}
        self._names = sorted(shapes)  # a basis read from disk has another order
        self._probes = {
            name: torch.randn(in_, PROBES, dtype=torch.float64, generator=generator) for name, (_, in_) in sorted(shapes.items())
        }
        self._folded: dict[str, Tensor] = {}  # (out, PROBES)
        for fold in basis.folds:
            self.fold(fold)
        self._a = {name: a.double() @ self._probes[name] for name, a in basis.A.items()}  # (r, PROBES), instead of A
        self.start()

    def fold(self, more: Fold) -> None:
        """Count what was added to the weights: an update is all that differs from the base model."""
        for name, (u, v) in more.items():
            self._folded[name] = self._folded.get(name, 0) + u.double() @ (v.double() @ self._probes[name])

    def start(self) -> None:
        """Forget the last round."""
        self._sum: dict[str, Tensor] = {}
        self._weight = 0.0

    def add(self, state: Mapping[str, Tensor], weight: float) -> None:
        """Count one client's state."""
        parts = self._parts(state)
        for name in self._names:
            applied = self._apply(name, parts[name]) + self._folded.get(name, 0)
            self._sum.setdefault(name, torch.zeros_like(applied)).add_(applied, alpha=weight)
        self._weight += weight

    def result(self, aggregate: Mapping[str, Tensor]) -> float:
        """The relative error of an aggregate; 0 if all updates are 0."""
        parts = self._parts(aggregate)
        difference = norm = 0.0
        for name, total in self._sum.items():
            mean = total / self._weight
            difference += float((mean - self._apply(name, parts[name]) - self._folded.get(name, 0)).square().sum())
            norm += float(mean.square().sum())
        return (difference / norm) ** 0.5 if norm else 0.0

    def _parts(self, state: Mapping[str, Tensor]) -> Mapping[str, Parts]:
        """Layer → the parts that a chain takes, fp64."""
        parts = {name: {part: state[f"{name}.{part}"].double() for part in self._method.parts} for name in self._names}
        return self._method.expand(parts, self._shapes, self._rank, self._seed) if self._method.expand else parts

    def _apply(self, name: str, parts: Parts) -> Tensor:
        """A layer's update times its probes (out, PROBES), or what it makes of them, or its parts as one vector."""
        if self._method.output is not None:
            return self._method.output(parts, self._probes[name].mT)
        if self._method.chain is None:
            return torch.cat([part.flatten() for part in parts.values()])
        chain = self._method.chain(parts, self._b.get(name), self._a.get(name), self._scale)
        if "A" not in self._method.frames:
            chain = (*chain, self._probes[name])
        *matrices, applied = chain
        for matrix in reversed(matrices):
            applied = matrix @ applied
        return applied
