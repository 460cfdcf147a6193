"""The table of strategies: the names that `strategy.name` has, and the class of each."""

from fedsb.aggregation.optimiser import OPTIMISERS
from fedsb.config import RunConfig
from strategies.fedbuff import FedBuff
from strategies.fedsb import FedSB
from strategies.optimised import FedOpt, SecureFedOpt
from strategies.robust import Krum, Median, MultiKrum, TrimmedMean
from strategies.scaffold import Scaffold
from strategies.secure import SecureFedSB

STRATEGIES: dict[str, type[FedSB]] = {
    "fedavg": FedSB,
    "fedprox": FedSB,  # the mean; what differs is the clients' part, `fedsb/training/drift.py`
    "scaffold": Scaffold,
    "fedbuff": FedBuff,
    **dict.fromkeys(OPTIMISERS, FedOpt),
    "trimmed-mean": TrimmedMean,
    "median": Median,
    "krum": Krum,
    "multi-krum": MultiKrum,
}
SECURE: dict[str, type[FedSB]] = {  # the same under a secure sum; the configuration refuses the others
    "fedavg": SecureFedSB,
    "fedprox": SecureFedSB,
    **dict.fromkeys(OPTIMISERS, SecureFedOpt),
}


def strategy_of(config: RunConfig) -> type[FedSB]:
    """The strategy of a run."""
    return (SECURE if config.privacy.secure_sum else STRATEGIES)[config.strategy.name]
