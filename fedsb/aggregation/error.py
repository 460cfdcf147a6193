"""How far an aggregate is from the mean of the clients' weight updates, measured on the real matrices of a round."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedsb.adapters.state import CORE
from fedsb.basis.frames import Basis

PROBES = 4


class AggregationError:
    """‖mean_i(w_i·B·R_i·A) - B·R̄·A‖_F / ‖mean_i(w_i·B·R_i·A)‖_F over all layers, estimated with random probes.

    For a Gaussian probe v, E‖M·v‖² = ‖M‖_F², so each client's update is applied to the same few probes instead of being
    formed (out x in numbers a layer). Memory: PROBES columns a layer. All in fp64.
    """

    def __init__(self, basis: Basis, generator: torch.Generator) -> None:
        self._b = {name: b.double() for name, b in sorted(basis.B.items())}  # a basis read from disk has another order
        self._probed = {
            name: a.double() @ torch.randn(a.shape[1], PROBES, dtype=torch.float64, generator=generator)
            for name, a in sorted(basis.A.items())
        }  # A·V (r, PROBES)
        self.start()

    def start(self) -> None:
        """Forget the last round."""
        self._sum = {name: torch.zeros(b.shape[0], PROBES, dtype=torch.float64) for name, b in self._b.items()}
        self._weight = 0.0

    def add(self, state: Mapping[str, Tensor], weight: float) -> None:
        """Count one client's cores."""
        for name, total in self._sum.items():
            total.add_(self._apply(name, state), alpha=weight)
        self._weight += weight

    def result(self, aggregate: Mapping[str, Tensor]) -> float:
        """The relative error of an aggregate; 0 if all updates are 0."""
        difference = norm = 0.0
        for name, total in self._sum.items():
            mean = total / self._weight
            difference += float((mean - self._apply(name, aggregate)).square().sum())
            norm += float(mean.square().sum())
        return (difference / norm) ** 0.5 if norm else 0.0

    def _apply(self, name: str, state: Mapping[str, Tensor]) -> Tensor:
        return self._b[name] @ (state[name + CORE].double() @ self._probed[name])
