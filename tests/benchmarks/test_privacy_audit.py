"""The audit of private training: its statistics, and what it says of correct code and of planted bugs. Everything is seeded."""

import contextlib
import io
import json
import math
from typing import Any

import numpy as np
import pytest

from benchmarks import privacy_audit
from benchmarks.privacy_audit import DELTA, lower_bound, p_value
from benchmarks.privacy_worlds import BUGS, DOUBTS, Outcomes, llama_worlds, planted
from tests.benchmarks.samples import check

CORRECT = {"bound_over_claim", "bound_over_claim_client"}
WRONG = {f"bound_over_claim_{bug}" for bug in (*BUGS, "no_sampling")}


def by_the_paper(m: int, r: int, v: int, epsilon: float, delta: float) -> float:
    """Appendix D of arXiv 2305.08846, as it stands there."""
    q = 1 / (1 + math.exp(-epsilon))
    pmf = [math.comb(r, k) * q**k * (1 - q) ** (r - k) for k in range(r + 1)]
    alpha = total = 0.0
    for i in range(1, v + 1):
        total += pmf[v - i]
        alpha = max(alpha, total / i)
    return min(1.0, sum(pmf[v:]) + alpha * delta * 2 * m)


@pytest.mark.parametrize("right", [0, 1, 30, 41, 50])
@pytest.mark.parametrize(("epsilon", "delta"), [(0.0, 0.0), (0.7, 1e-3), (3.0, 1e-5)])
def test_the_p_value_is_the_papers(right: int, epsilon: float, delta: float) -> None:
    assert p_value(200, 50, right, epsilon, delta) == pytest.approx(by_the_paper(200, 50, right, epsilon, delta), rel=1e-9)


def test_the_bound_of_a_flawless_auditor_has_a_closed_form() -> None:
    """e^ε / (1 + e^ε) to the number of guesses is the level."""
    rate = 0.05 ** (1 / 100)
    assert lower_bound(1000, 100, 100, 0.0) == pytest.approx(math.log(rate / (1 - rate)), abs=1e-5)
    assert lower_bound(1000, 100, 100, 1e-5) < lower_bound(1000, 100, 100, 0.0)
    assert lower_bound(1000, 100, 50, 0.0) == 0


def test_the_bound_is_seldom_above_the_epsilon_of_randomised_response() -> None:
    """And its mean is near: 500 audits of 400 coins, each told truly with probability e / (1 + e)."""
    right = np.random.default_rng(0).binomial(400, math.e / (1 + math.e), 500).tolist()
    found = {v: lower_bound(400, 400, v, 0.0) for v in set(right)}
    bounds = np.array([found[v] for v in right])
    assert (bounds > 1).mean() <= 0.07
    assert bounds.mean() > 0.7


def test_one_record_moves_the_sum_by_no_more_than_the_clip_norm_unless_there_is_a_bug() -> None:
    long, steep = (Outcomes(world, 1.0).distance() for world in llama_worlds())
    assert 0.3 < long <= 1.0001 and steep == pytest.approx(1, abs=1e-4)
    for bug in ("batch_mean_loss", "clip_after_mean"):
        with planted(bug):
            assert max(Outcomes(world, 1.0).distance() for world in llama_worlds()) > 5


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    """The benchmark's last line, at toy size."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        privacy_audit.main(["--canaries", "4096", "--trials", "300", "--bug-trials", "300"])
    found: dict[str, Any] = json.loads(printed.getvalue().strip().splitlines()[-1])
    return found


@pytest.mark.slow
def test_correct_code_keeps_its_claim_and_every_bug_is_found(result: dict[str, Any]) -> None:
    check(result, "privacy_audit", CORRECT | WRONG | {f"bound_over_claim_{doubt}" for doubt in DOUBTS})
    figures = result["figures"]
    assert all(0.1 < figures[name]["value"] <= 1 for name in CORRECT)
    assert all(figures[name]["value"] > 1 for name in WRONG)
    assert all(figure["claim"] == pytest.approx(2, abs=0.2) for figure in figures.values())
    assert all(figure["delta"] == DELTA for name, figure in figures.items() if name in CORRECT | WRONG)


@pytest.mark.slow
@pytest.mark.parametrize("doubt", sorted(DOUBTS.keys() - {"size"}))
def test_where_the_library_might_leak_it_does_not(result: dict[str, Any], doubt: str) -> None:
    assert result["figures"][f"bound_over_claim_{doubt}"]["value"] <= 1


@pytest.mark.slow
def test_the_number_of_records_shows_as_docs_privacy_says(result: dict[str, Any]) -> None:
    assert result["figures"]["bound_over_claim_size"]["value"] > 1
