"""What holds a client's training near that of the others: terms that are added to its gradients before each step."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn


class Proximal:
    """The gradient of μ/2 · ‖w - w₀‖², which is μ·(w - w₀), with w₀ the state that training began from.

    Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith, "Federated optimization in heterogeneous networks", arXiv 1812.06127, equation 2.
    It knows of no record but by w, so under DP-SGD it is added after clipping and noise, and costs nothing.

    Args:
        parameters: as they are when training begins.
        mu: μ; 0 adds nothing.
        kept: names that stay with a client: of those there is no w₀ that others have too, and no term.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], mu: float, kept: Collection[str] = ()) -> None:
        self.mu = mu
        started = {name: p for name, p in parameters.items() if mu and name not in kept}
        self._start: dict[str, Tensor] = {name: p.detach().clone() for name, p in started.items()}

    def add(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Add the term to the gradients."""
        for name, start in self._start.items():
            gradient = parameters[name].grad
            assert gradient is not None
            gradient.add_(parameters[name].detach() - start, alpha=self.mu)


class Control:
    """SCAFFOLD's correction: a client's gradients g_k at its steps k = 1 … K become g_k - c_i + c, and its next variate is

        c_i⁺ = (1/K) Σ_k g_k

    Karimireddy et al., "SCAFFOLD: Stochastic controlled averaging for federated learning", arXiv 1910.06378, equations 3 and 4.
    With SGD at a steady rate η that is their option II, c_i - c + (x - y_i)/(K·η), since y_i = x - η·Σ_k (g_k - c_i + c). With
    AdamW (x - y_i)/(K·η) has the size of steps and not of gradients, to which c - c_i is added; the mean of gradients stays one.

    Args:
        variate: c_i, by parameter.
        common: c, the server's, by parameter.
    """

    def __init__(self, variate: Mapping[str, Tensor], common: Mapping[str, Tensor]) -> None:
        self._correction = {name: common[name] - variate[name] for name in common}
        self._sum = {name: torch.zeros_like(tensor) for name, tensor in common.items()}
        self._steps = 0

    def add(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Count the gradients, and correct them."""
        for name, correction in self._correction.items():
            gradient = parameters[name].grad
            assert gradient is not None
            self._sum[name] += gradient.to("cpu")
            gradient.add_(correction.to(gradient))
        self._steps += 1

    def variate(self) -> dict[str, Tensor]:
        """c_i⁺, after the steps of a round."""
        return {name: total / self._steps for name, total in self._sum.items()}
