"""Strategies that a few hostile clients do not decide (`fedsb/aggregation/robust.py`); each client counts once.

A round with fewer usable replies than `federation.min_clients` does not count, and the configuration sees to it that these are
enough for what is promised.
"""

import math
from functools import partial

from torch import Tensor

from fedsb.aggregation.mean import Aggregate
from fedsb.aggregation.robust import Gathered, krum, median, trimmed_mean
from strategies.fedsb import FedSB


class Robust(FedSB):
    """A strategy whose result is not meant to be the mean, so no aggregation error is told."""

    def distance(self, average: Tensor) -> float:
        """NaN."""
        return math.nan


class TrimmedMean(Robust):
    """The mean without the extremes of each number."""

    def mean(self) -> Aggregate:
        """A trimmed mean."""
        return Gathered(self.layout.size, partial(trimmed_mean, trim=self.config.strategy.trim))


class Median(Robust):
    """The median of each number."""

    def mean(self) -> Aggregate:
        """A median."""
        return Gathered(self.layout.size, median)


class Krum(Robust):
    """The one state that is nearest to most of the others."""

    def mean(self) -> Aggregate:
        """Krum's choice."""
        return Gathered(self.layout.size, partial(krum, hostile=self.config.strategy.hostile))


class MultiKrum(Robust):
    """The mean of the states that are nearest to most of the others."""

    def mean(self) -> Aggregate:
        """The mean of Krum's choices."""
        strategy = self.config.strategy
        return Gathered(self.layout.size, partial(krum, hostile=strategy.hostile, keep=strategy.keep))
