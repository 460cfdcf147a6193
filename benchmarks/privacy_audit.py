"""What can an adversary prove about the ε that private training claims? A lower bound from experiments, over the claim.

    python -m benchmarks.privacy_audit

Steinke, Nasr, Jagielski, "Privacy auditing with one (1) training run", NeurIPS 2023, arXiv 2305.08846: each of m canaries is
included by a fair coin; the auditor guesses the coins of the r canaries of which he is surest and abstains from the others. If
training is (ε, δ)-private he is seldom right too often (theorem 5.2), which gives a lower bound on ε at 95 % confidence.

The auditor is as strong as the promise allows: he knows code, model, data and canaries, and sees the noisy gradient of every
step of the real `train_private`, from which all that leaves a site is made. Only that q·n, by which gradients are divided, tells
the number of records is not held against the code (see `_size`). Steps have the learning rate 0: the promise holds for any.

`bound_over_claim`: the largest of three bounds, over the claimed ε; at most 1 if code and accounting are right. Each is at
1 - 0.05/3, so that all hold together.
- `lookup`: one run on a lookup table, a model in which every record's gradient has a direction of its own. No canary is stronger.
- `sampled`: the same under Poisson sampling; the auditor does not know who was drawn.
- `worlds`: many small runs on a tiny random Llama with one canary each, which together are one mechanism with m coins. The
  score is the likelihood ratio of the outcomes with and without the canary, found by running the same code without noise.
`bound_over_claim_BUG`: of code with a bug planted in it, which must exceed 1: `no_noise`, `batch_mean_loss` (a mean over the
tokens of a batch), `clip_after_mean`, by `worlds`, and `no_sampling` (everybody is drawn) by `sampled`.
`bound_over_claim_client`: of PrivateMean, with clients whose updates have directions of their own.
`bound_over_claim_dropout`, `_flattened`, `_size`: of the library as it is, by `worlds`, in places where it might leak: a model
with dropout; a layer that is given the tokens of all records as one row each; the divisor, left in what the auditor sees. 0 where
the library refuses. `distance` is by how many clip norms the canary moves the sum (or mean).
"""

import argparse
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.harness import figure, report, say
from benchmarks.privacy_worlds import BUGS, DOUBTS, Floats, Outcomes, World, key, llama_worlds, planted, released
from fedsb.aggregation.private import PrivateMean
from fedsb.data.batches import Encoded
from fedsb.errors import PrivacyError
from fedsb.privacy.accounting import Release, epsilon, noise_multiplier
from fedsb.privacy.mechanism import Mechanism
from fedsb.privacy.noise import KeyStream

LEVEL = 0.05  # the probability that a bound is too high
DELTA = 1e-5
CLAIM = 2.0  # ε
STEPS = 4
RATE, SAMPLED_STEPS, SAMPLED_NOISE = 0.25, 16, 2.4  # claims about 2 as well
SHARE = {"lookup": 0.03, "sampled": 0.03, "client": 0.03, "worlds": 0.15}  # of the coins that are guessed: chosen beforehand
Coins = NDArray[np.bool_]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--canaries", type=int, default=16384, help="of an audit in one run")
    parser.add_argument("--trials", type=int, default=2000, help="runs of correct code on the tiny Llama")
    parser.add_argument("--bug-trials", type=int, default=400, help="runs for each bug and each doubt")
    parser.add_argument("--seed", type=int, default=0, help="of coins, noise and sampling")
    options = parser.parse_args(arguments)
    found = correct(options.canaries, options.trials, options.seed)
    found |= bugs(options.canaries, options.bug_trials, options.seed)
    found |= doubts(options.bug_trials, options.seed)
    report("privacy_audit", {f"bound_over_claim{name}": entry for name, entry in found.items()})


def correct(canaries: int, trials: int, seed: int) -> dict[str, dict[str, Any]]:
    """The code as it is, for records and for clients."""
    noise, one = noise_multiplier(CLAIM, DELTA, 1.0, STEPS), noise_multiplier(CLAIM, DELTA, 1.0, 1)
    audits = {
        "lookup": partial(audit_lookup, canaries, Mechanism(noise, 1.0, 1.0), STEPS, seed, parts=3),
        "sampled": partial(audit_lookup, canaries, Mechanism(SAMPLED_NOISE, RATE, 1.0), SAMPLED_STEPS, seed, parts=3),
        "worlds": partial(audit_worlds, llama_worlds(), one, trials, seed, parts=3),
    }
    found = {name: _told(name, audit) for name, audit in audits.items()}
    best = max(found.values(), key=lambda entry: entry["value"])
    bounds = {name: {"bound": entry["ours"], "claim": entry["claim"]} for name, entry in found.items()}
    client = _told("client", partial(audit_client, canaries // 2, Mechanism(noise, 1.0, 1.0), STEPS, seed))
    return {"": {**best, "audits": bounds}, "_client": client}


def bugs(canaries: int, trials: int, seed: int) -> dict[str, dict[str, Any]]:
    """The code with each of the bugs."""
    one, found = noise_multiplier(CLAIM, DELTA, 1.0, 1), {}
    for bug in BUGS:
        with planted(bug):
            found[f"_{bug}"] = _told(bug, partial(audit_worlds, llama_worlds(), one, trials, seed))
    sampled = Mechanism(SAMPLED_NOISE, RATE, 1.0)
    everybody = partial(audit_lookup, canaries // 2, sampled, SAMPLED_STEPS, seed, stream=Everybody)
    return found | {"_no_sampling": _told("no_sampling", everybody)}


def doubts(trials: int, seed: int) -> dict[str, dict[str, Any]]:
    """The code as it is, where it might leak."""
    one = noise_multiplier(CLAIM, DELTA, 1.0, 1)
    return {f"_{name}": _told(name, partial(audit_worlds, [world()], one, trials, seed)) for name, world in DOUBTS.items()}


def p_value(coins: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """The probability of at least `correct` right guesses, at the most, if the mechanism is (ε, δ)-private.

    Steinke et al., theorem 5.2, in the form of their appendix D: with W ~ Binomial(r, e^ε / (1 + e^ε)), it is
    P[W ≥ v] + 2 m δ · max_i P[v > W ≥ v - i] / i, over i in 1..v.
    """
    chances = _binomial(guesses, epsilon)
    below = chances[:correct][::-1].cumsum() / np.arange(1, correct + 1)
    return min(1.0, float(chances[correct:].sum()) + 2 * coins * delta * float(below.max(initial=0.0)))


def lower_bound(coins: int, guesses: int, correct: int, delta: float, level: float = LEVEL) -> float:
    """The largest ε, up to 1e-6, that so many right guesses refute; 0 if they refute none."""
    low, high = 0.0, 32.0
    if p_value(coins, guesses, correct, low, delta) >= level:
        return 0.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if p_value(coins, guesses, correct, middle, delta) < level else (low, middle)
    return low


def _binomial(count: int, epsilon: float) -> Floats:
    """P[W = k] for W ~ Binomial(count, e^ε / (1 + e^ε)) and k in 0..count."""
    right, wrong = -math.log1p(math.exp(-epsilon)), -math.log1p(math.exp(epsilon))
    top = math.lgamma(count + 1)
    logs = [top - math.lgamma(k + 1) - math.lgamma(count - k + 1) + k * right + (count - k) * wrong for k in range(count + 1)]
    chances: Floats = np.exp(np.array(logs))
    return chances


def judge(scores: Floats, coins: Coins, claim: float, share: float, parts: int = 1) -> dict[str, Any]:
    """The figure of one audit.

    Args:
        scores: of the canaries, log likelihood ratios: positive where a canary seems to be in.
        share: of the coins that are guessed.
        parts: how many audits share the level.
    """
    surest = np.argsort(-np.abs(scores), kind="stable")[: round(share * len(coins))]
    right = int(((scores > 0) == coins)[surest].sum())
    bound = lower_bound(len(coins), len(surest), right, DELTA, LEVEL / parts)
    counts = {"coins": len(coins), "guesses": len(surest), "right": right}
    return figure(bound / claim, "ratio", ours=bound, claim=round(claim, 4), delta=DELTA, **counts)


def flip(count: int, seed: int) -> Coins:
    """Fair coins."""
    return np.random.default_rng([seed, count]).random(count) < 0.5


class Lookup(nn.Module):
    """Two logits from two tables with a column for each token: a record's gradient is in its token's columns alone.

    Half of it is in either table, so it must be clipped over both of them together.
    """

    SCALE = 4.0  # the norm of a record's gradient, above the clip norm of 1

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.tables = nn.ModuleList(nn.Linear(size, 2, bias=False) for _ in range(2))
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        """input_ids (B, 1) → logits (B, 2)."""
        x = self.SCALE * functional.one_hot(input_ids[:, 0], self.size).float()
        return SimpleNamespace(logits=sum(table(x) for table in self.tables))


def audit_lookup(
    canaries: int,
    mechanism: Mechanism,
    steps: int,
    seed: int,
    *,
    parts: int = 1,
    stream: Callable[[bytes], KeyStream] = KeyStream,
) -> dict[str, Any]:
    """One run of `train_private` with all canaries, on the lookup table; the clip norm is 1."""
    coins, model = flip(canaries, seed), Lookup(canaries)
    rows = [Encoded([place], [], 1) for place in np.flatnonzero(coins).tolist()]
    tables = dict(model.named_parameters())
    seen = released(model, tables, rows, "classification", steps, mechanism, stream(key(seed, "lookup")))
    sums = (seen * mechanism.sample_rate * len(rows)).view(steps, 2, 2, canaries)  # step, table, logit, token
    along = (sums[:, :, 0] - sums[:, :, 1]).sum(1) / 2  # the label pushes the logits apart: by (1, -1) / 2 in either table
    share = SHARE["lookup" if mechanism.sample_rate == 1 else "sampled"]
    return judge(_likelihood(along, mechanism), coins, epsilon([mechanism.release(steps)], DELTA).best, share, parts)


def audit_client(canaries: int, mechanism: Mechanism, steps: int, seed: int) -> dict[str, Any]:
    """Rounds of PrivateMean, with clients that send three times the clip norm, each in a direction of its own."""
    coins, stream = flip(canaries, seed), KeyStream(key(seed, "client"))
    along = torch.zeros(steps, canaries, dtype=torch.float64)
    for step in range(steps):
        mean, state = PrivateMean(torch.zeros(canaries), mechanism, canaries, stream), torch.zeros(canaries)
        for place in np.flatnonzero(coins).tolist():
            state[place] = 3 * mechanism.clip_norm
            mean.add(state)
            state[place] = 0
        along[step] = mean.result().double() * canaries
    claim = epsilon([mechanism.release(steps)], DELTA).best
    return judge(_likelihood(along, mechanism), coins, claim, SHARE["client"])


def _likelihood(along: Tensor, mechanism: Mechanism) -> Floats:
    """The noisy sums along each canary's direction (steps, canaries) → log likelihood ratios (canaries,).

    A step adds log((1 - q) + q · exp((x·C - C²/2) / σ²C²)): x is N(0, σ²C²), and N(C, σ²C²) if the canary was drawn.
    """
    clip, std = mechanism.clip_norm, mechanism.noise_multiplier * mechanism.clip_norm
    exponent = (along * clip - clip**2 / 2) / std**2
    scores: Floats = torch.log1p(mechanism.sample_rate * torch.expm1(exponent)).sum(0).numpy()
    return scores


class Everybody(KeyStream):
    """The bug `no_sampling`: all records take part in every step, whatever the rate."""

    def poisson_sample(self, count: int, rate: float) -> list[int]:
        """All of them."""
        return list(range(count))


def audit_worlds(worlds: Sequence[World], noise: float, trials: int, seed: int, *, parts: int = 1) -> dict[str, Any]:
    """Runs of one step with one canary each, in the worlds by turns; each run has data, and a coin, of its own."""
    claim = epsilon([Release(noise, 1.0, 1)], DELTA).best
    try:
        outcomes = [Outcomes(world, noise) for world in worlds]
    except PrivacyError as refusal:
        return figure(0.0, "ratio", ours=0.0, claim=round(claim, 4), refused=str(refusal))
    coins = flip(trials, seed)
    turns = [outcomes[trial % len(worlds)] for trial in range(trials)]
    scores = [
        turn.score(bool(coin), KeyStream(key(seed, f"world {trial}")))
        for trial, (turn, coin) in enumerate(zip(turns, coins, strict=True))
    ]
    distances = [round(outcome.distance(), 3) for outcome in outcomes]
    return {**judge(np.array(scores), coins, claim, SHARE["worlds"], parts), "distance": distances}


def _told(name: str, audit: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    started = time.perf_counter()
    found = {**audit(), "seconds": round(time.perf_counter() - started, 1)}
    say(f"{name}: ε ≥ {found['ours']:.3f} where {found['claim']} is claimed ({found['seconds']} s)")
    return found


if __name__ == "__main__":
    main()
