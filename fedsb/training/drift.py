"""What holds a client's training near that of the others: terms that are added to its gradients before each step."""

from collections.abc import Mapping

from torch import Tensor, nn


class Proximal:
    """The gradient of μ/2 · ‖w - w₀‖², which is μ·(w - w₀), with w₀ the state that training began from.

    Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith, "Federated optimization in heterogeneous networks", arXiv 1812.06127, equation 2.
    It knows of no record but by w, so under DP-SGD it is added after clipping and noise, and costs nothing.

    Args:
        parameters: as they are when training begins.
        mu: μ; 0 adds nothing.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], mu: float) -> None:
        self.mu = mu
        self._start: dict[str, Tensor] = {name: p.detach().clone() for name, p in parameters.items()} if mu else {}

    def add(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Add the term to the gradients."""
        for name, start in self._start.items():
            gradient = parameters[name].grad
            assert gradient is not None
            gradient.add_(parameters[name].detach() - start, alpha=self.mu)
