"""What releases cost together: ε at a δ, by two accountants of Opacus, and the noise that a target needs.

A release is `steps` times the Poisson-subsampled Gaussian mechanism: every record (or client) takes part with probability
`sample_rate`, the sum of what was clipped to C gets noise of standard deviation `noise_multiplier` · C. Two data sets are
neighbours if one record (or client) is in only one of them.

PRV: Gopi, Lee, Wutschitz, "Numerical composition of differential privacy", arXiv 2106.02848; what is returned is its upper
bound. RDP: Mironov, Talwar, Zhang, "Rényi differential privacy of the sampled Gaussian mechanism", arXiv 1908.10530; always
a valid bound, and a looser one. Both are shown; the smaller decides, but a site's cap is counted by RDP.
"""

import functools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from opacus.accountants import PRVAccountant
from opacus.accountants.analysis import rdp as analysis

from fedsb.errors import PrivacyError

ORDERS = [*(1 + x / 10 for x in range(1, 100)), *range(12, 64), 80, 96, 128, 192, 256, 384, 512, 768, 1024]
PRV_LIMIT = 60.0  # of the RDP bound: beyond it the PRV accountant's grid takes gigabytes, and nobody asks for its digits
EPSILON_ERROR = 0.01  # of the PRV accountant: its upper bound lies at most this above the true ε
TOLERANCE = 1e-3  # relative, of a noise multiplier
LARGEST_NOISE = 1e4


@dataclass(frozen=True)
class Release:
    """`steps` subsampled Gaussian mechanisms.

    Raises PrivacyError if it is none: a rate outside (0, 1], noise that is not positive and finite, steps below 1.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int

    def __post_init__(self) -> None:
        """Check the three numbers."""
        if not (0 < self.sample_rate <= 1):
            raise PrivacyError(f"a sample rate of {self.sample_rate} is none; it lies above 0 and is at most 1")
        if not (0 < self.noise_multiplier < math.inf):
            raise PrivacyError(f"a noise multiplier of {self.noise_multiplier} gives no privacy; choose one above 0")
        if self.steps < 1:
            raise PrivacyError(f"{self.steps} steps are no release; choose at least 1")


@dataclass(frozen=True)
class Epsilon:
    """ε at one δ, twice: each is an upper bound, `rdp` the older and mostly the looser one; `prv` is infinite where it was not
    computed."""

    prv: float
    rdp: float

    @property
    def best(self) -> float:
        """The smaller of the two upper bounds."""
        return min(self.prv, self.rdp)

    @property
    def accountant(self) -> str:
        """Whose bound that is."""
        return "prv" if self.prv <= self.rdp else "rdp"


def epsilon(releases: Sequence[Release], delta: float) -> Epsilon:
    """ε at `delta` of all releases together, each an upper bound.

    Guarantees:
        - `rdp` is a bound whatever the releases, as far as Opacus' accountant is right; `prv` lies at most 0.01 above the true ε.
        - neither depends on the order of the releases, nor on how equal ones are cut.

    | case | result |
    |---|---|
    | no release | 0 |
    | δ outside (0, 1) | PrivacyError |
    | every sample rate is 1 | the exact Gaussian bound stands for PRV |
    | the RDP bound is above 60 | PRV is not computed and given as infinite |
    """
    if not 0 < delta < 1:
        raise PrivacyError(f"δ = {delta} is none; it lies between 0 and 1")
    if not releases:
        return Epsilon(0.0, 0.0)
    rdp = _rdp(releases, delta)
    if all(release.sample_rate == 1 for release in releases):
        return Epsilon(gaussian_epsilon(math.sqrt(sum(r.steps / r.noise_multiplier**2 for r in releases)), delta), rdp)
    return Epsilon(_prv(_history(releases), delta) if rdp <= PRV_LIMIT else math.inf, rdp)


def gaussian_epsilon(mu: float, delta: float) -> float:
    """ε at `delta` of the Gaussian mechanism with sensitivity over noise `mu`.

    Guarantees: exact up to 1e-9 of max(1, ε), from above.

    δ(ε) = Φ(μ/2 - ε/μ) - e^ε Φ(-μ/2 - ε/μ): Balle & Wang, arXiv 1805.06530, theorem 8. T of them on all the data are one
    with μ = √T / noise multiplier.
    """
    low, high = 0.0, 1.0
    while _gaussian_delta(mu, high) > delta:
        high *= 2
    while high - low > 1e-9 * max(1.0, high):
        middle = (low + high) / 2
        low, high = (middle, high) if _gaussian_delta(mu, middle) > delta else (low, middle)
    return high


def noise_multiplier(target: float, delta: float, sample_rate: float, steps: int, before: Sequence[Release] = ()) -> float:
    """The least noise multiplier with which `steps` more steps keep ε at `delta` at or below `target`.

    `before`: what was released of the same data already.

    Guarantees: with what is returned ε is at most `target`, by the smaller of the two bounds; the least is at most 0.1 % below.

    | case | result |
    |---|---|
    | `before` has spent the target | PrivacyError |
    | noise of 10,000 times the clip norm does not suffice | PrivacyError |
    """
    spent = epsilon(before, delta).best
    if spent >= target:
        raise PrivacyError(f"ε = {spent:.3g} of {target:.3g} at δ = {delta:.1e} is spent already; nothing more can be released")

    def enough(noise: float) -> bool:
        return epsilon([*before, Release(noise, sample_rate, steps)], delta).best <= target

    low, high = 0.0, 1.0
    while not enough(high):
        low, high = high, 2 * high
        if high > LARGEST_NOISE:
            raise PrivacyError(
                f"no noise keeps {steps} steps at a sample rate of {sample_rate:.3g} within ε = {target:.3g} at δ = {delta:.1e}; "
                "raise privacy.epsilon or take fewer steps"
            )
    while high - low > TOLERANCE * high:
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _gaussian_delta(mu: float, epsilon: float) -> float:
    return _normal_cdf(mu / 2 - epsilon / mu) - math.exp(min(epsilon, 700.0)) * _normal_cdf(-mu / 2 - epsilon / mu)


def _normal_cdf(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))


def _history(releases: Sequence[Release]) -> tuple[tuple[float, float, int], ...]:
    """As Opacus' accountants hold it: noise, rate, steps; equal mechanisms in one line."""
    steps: dict[tuple[float, float], int] = {}
    for release in releases:
        key = release.noise_multiplier, release.sample_rate
        steps[key] = steps.get(key, 0) + release.steps
    return tuple((noise, rate, count) for (noise, rate), count in steps.items())


def _rdp(releases: Sequence[Release], delta: float) -> float:
    curve = sum((steps * _curve(noise, rate) for noise, rate, steps in _history(releases)), start=np.zeros(len(ORDERS)))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Optimal order is the (largest|smallest) alpha")  # still a bound
        found, _ = analysis.get_privacy_spent(orders=ORDERS, rdp=curve, delta=delta)
    return float(found)


@functools.lru_cache(maxsize=4096)
def _curve(noise: float, rate: float) -> npt.NDArray[np.float64]:
    """The Rényi divergence of one step at each of `ORDERS`, nats: a quarter of a second, and a ledger repeats few of them."""
    found: npt.NDArray[np.float64] = analysis.compute_rdp(q=rate, noise_multiplier=noise, steps=1, orders=ORDERS)
    return found


@functools.lru_cache(maxsize=4096)
def _prv(history: tuple[tuple[float, float, int], ...], delta: float) -> float:
    """Half a second, and in a simulation every client asks for the same."""
    accountant = PRVAccountant()  # type: ignore[no-untyped-call]
    accountant.history = list(history)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Optimal order is the (largest|smallest) alpha")  # of a first bound of its own
        warnings.filterwarnings("ignore", category=RuntimeWarning)  # logarithms of 0 at the ends of its grid, which it drops
        return float(accountant.get_epsilon(delta, eps_error=EPSILON_ERROR))
