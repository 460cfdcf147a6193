"""What a run's privacy settings mean for one client: which mechanism, at which δ, and what the whole run will cost.

The unit is a record (one sequence of a client's training data; each client's noise is its own) or a client (everything that a
client contributes; the noise is added to the sum of the clients' updates).
"""

import functools
import math
from dataclasses import dataclass

from fedsb.config import RunConfig
from fedsb.errors import PrivacyError
from fedsb.privacy.accounting import Release, noise_multiplier


@dataclass(frozen=True)
class Mechanism:
    """The Poisson-subsampled Gaussian: each of n takes part with probability `sample_rate`, what it adds is clipped to an L2
    norm of `clip_norm`, and the sum gets noise of standard deviation `noise_multiplier` · `clip_norm`. A trained head has a clip
    of its own, by which it and its noise are measured (`fedsb.training.private`).

    Raises PrivacyError unless all of them bound something.
    """

    noise_multiplier: float
    sample_rate: float
    clip_norm: float
    head_clip_norm: float | None = None  # None: clip_norm, but in private training 2·√(features)

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name, clip in (("clip_norm", self.clip_norm), ("head_clip_norm", self.clip(head=True))):
            if not (0 < clip < math.inf):
                raise PrivacyError(f"privacy.{name} = {clip} bounds nothing; choose a finite number above 0")
        if not (0 < self.noise_multiplier < math.inf) or not (0 < self.sample_rate <= 1):
            raise PrivacyError(
                f"a noise multiplier of {self.noise_multiplier} at a sample rate of {self.sample_rate} is no mechanism"
            )

    def clip(self, *, head: bool) -> float:
        """The clip of a head, or of the rest."""
        return self.clip_norm if not head or self.head_clip_norm is None else self.head_clip_norm

    def release(self, steps: int) -> Release:
        """`steps` of it, as accounting counts them."""
        return Release(self.noise_multiplier, self.sample_rate, steps)


def delta_of(config: RunConfig, count: int) -> float:
    """The run's δ for `count` records (or clients): 1/count, or what is configured.

    Guarantees: at most 1/count (1/2 for a count of 1): above it a mechanism may publish one whole record and keep its promise.

    | case | result |
    |---|---|
    | a configured δ above 1/count | PrivacyError |
    """
    chosen = config.privacy.delta
    if chosen == "auto":
        return 1 / max(count, 2)
    if chosen > 1 / count:
        raise PrivacyError(
            f"privacy.delta = {chosen} is above 1/{count}, one over the number of {config.privacy.unit}s here; "
            f'lower it to {1 / count:.1e} or less, or set "auto"'
        )
    return chosen


def planned_steps(config: RunConfig) -> int:
    """Mechanisms that a client's whole run consists of, if it takes part in every round."""
    if config.privacy.unit == "client":
        return config.federation.rounds
    return config.federation.rounds * config.train.steps + config.personal.steps


def sketch_mechanism(config: RunConfig, count: int) -> Mechanism:
    """The mechanism of the one release that a basis from sketches takes, with `privacy.basis_share` of the run's ε.

    Of a client's records each is in its sketch with probability `basis.examples` / count; of clients all are asked.
    """
    privacy = config.privacy
    assert privacy.epsilon is not None  # RunConfig checks it
    rate = 1.0 if privacy.unit == "client" else min(1.0, config.basis.examples / count)
    return Mechanism(_noise(privacy.basis_share * privacy.epsilon, delta_of(config, count), rate, 1), rate, privacy.clip_norm)


def mechanism_of(config: RunConfig, count: int) -> Mechanism:
    """The mechanism of a run for a client of `count` records, or (unit "client") of `count` clients.

    Guarantees:
        - with a target ε, that a client which takes part in all steps of the run, its basis and personalisation included, spends
          at most that, with the least noise that does so; what no noise can keep is refused (`noise_multiplier`).
        - rate and noise follow from settings and `count`, and from no record.

    | case | result |
    |---|---|
    | δ above 1/count | PrivacyError (`delta_of`) |
    | unit "none", or nobody to protect | PrivacyError |
    | fewer records than a batch | rate 1: all take part in every step |
    | a configured noise multiplier | is taken as it is |
    """
    privacy = config.privacy
    if privacy.unit == "none" or count < 1:
        raise PrivacyError(f"there is no mechanism for privacy.unit = {privacy.unit!r} and {count} to protect")
    delta = delta_of(config, count)
    rate = config.federation.fraction if privacy.unit == "client" else min(1.0, config.train.batch_size / count)
    noise = privacy.noise_multiplier
    if noise is None:
        assert privacy.epsilon is not None
        noise = _noise(privacy.epsilon, delta, rate, planned_steps(config), basis_releases(config, count))
    return Mechanism(noise, rate, privacy.clip_norm, privacy.head_clip_norm)


def basis_releases(config: RunConfig, count: int) -> tuple[Release, ...]:
    """What the basis costs: nothing, unless it comes from sketches."""
    return (sketch_mechanism(config, count).release(1),) if config.basis.source == "sketch" else ()


_noise = functools.lru_cache(maxsize=256)(noise_multiplier)  # some seconds of search each
