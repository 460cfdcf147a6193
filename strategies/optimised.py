"""Strategies whose server takes a step of its own (`fedsb/aggregation/optimiser.py`), in the direction of a round's mean.

The aggregation error is that of the mean, which the step begins from. After a private mean or a secure sum the step is
post-processing: it knows no more than the mean.
"""

from torch import Tensor

from fedsb.aggregation.optimiser import OPTIMISERS, Settings, step
from strategies.fedsb import FedSB
from strategies.secure import SecureFedSB


class FedOpt(FedSB):
    """A strategy whose server remembers two moments of the clients' mean update: FedAdam, FedYogi, FedAdagrad."""

    def step(self, average: Tensor, server_round: int, held: Tensor | None = None) -> Tensor:
        """The state that was sent, moved by the server's optimiser; what nobody sent back stays."""
        chosen = self.config.strategy
        settings = Settings(chosen.rate, chosen.beta1, chosen.beta2, chosen.tau)
        moved, self.memory = step(self.sent, average, self.memory, OPTIMISERS[chosen.name], settings, server_round, held)
        return moved


class SecureFedOpt(FedOpt, SecureFedSB):
    """The same with the mean of a secure sum."""
