"""The mean under client-level privacy, row by row of its edge table."""

import math

import pytest
import torch

from fedsb.aggregation.private import PrivateMean
from fedsb.privacy.mechanism import Mechanism
from fedsb.privacy.noise import KeyStream

SIZE = 2000
SILENT = Mechanism(1e-12, 1.0, 0.5)  # noise that no test sees


def mean_of(
    *vectors: torch.Tensor, sent: torch.Tensor | None = None, expected: float = 4, mechanism: Mechanism = SILENT
) -> torch.Tensor:
    found = PrivateMean(torch.zeros(SIZE) if sent is None else sent, mechanism, expected, KeyStream(bytes(32)))
    for vector in vectors:
        found.add(vector)
    return found.result()


def test_updates_are_clipped_and_divided_by_the_planned_number() -> None:
    sent = torch.randn(SIZE)
    small, large = torch.full((SIZE,), 0.001), torch.full((SIZE,), 1.0)
    found = mean_of(sent + small, sent + large, sent=sent)
    assert torch.allclose(found - sent, (small + large * 0.5 / large.norm()) / 4, atol=1e-6)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e6, 1e30])
def test_one_client_moves_the_result_by_no_more_than_its_bound(size: float) -> None:
    others = [torch.randn(SIZE) * 0.01 for _ in range(3)]
    apart = mean_of(*others, torch.randn(SIZE) * size) - mean_of(*others)
    assert float(apart.double().norm()) <= 0.5 / 4 * (1 + 1e-5)


def test_noise_has_its_size_over_the_planned_number() -> None:
    found = mean_of(expected=10, mechanism=Mechanism(3.0, 0.5, 2.0))  # nobody answered: the sent state plus noise
    assert float(found.std()) == pytest.approx(3.0 * 2.0 / 10, rel=0.1)
    assert abs(float(found.mean())) < 0.1


def test_an_update_of_norm_zero_adds_zero() -> None:
    sent = torch.randn(SIZE)
    assert torch.allclose(mean_of(sent, sent=sent), sent)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_state_that_is_not_finite_adds_zero(bad: float) -> None:
    assert torch.allclose(mean_of(torch.full((SIZE,), bad)), torch.zeros(SIZE), atol=1e-9)


def test_a_state_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="a vector of 2000 numbers was expected"):
        mean_of(torch.zeros(3))
