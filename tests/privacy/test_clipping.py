"""One test for each row of the tables in `fedsb/privacy/clipping.py`, and for what it guarantees."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedsb.errors import PrivacyError
from fedsb.privacy.clipping import BLOCK, Clipped, clip, clipped_sum

numbers = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40)
bounds = st.floats(min_value=1e-30, max_value=1e30)
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def _norm(vector: Tensor) -> float:
    """Without any rounding to speak of, and without overflow."""
    return math.hypot(*vector.tolist())


def _draw(size: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale


@settings(deadline=None, max_examples=200, database=None)
@given(numbers, bounds)
def test_the_norm_after_rounding_is_within_the_bound(values: list[float], bound: float) -> None:
    vector = torch.tensor(values)
    clipped = clip(vector, bound)
    assert clipped.vector.dtype == torch.float32
    assert clipped.bound == bound
    assert _norm(clipped.vector) <= bound
    if _norm(vector) <= bound * (1 - 2**-22):
        assert torch.equal(clipped.vector, vector)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bound", [1e-30, 1e-8, 0.1, 1.0, 3.0, 1e4])
@pytest.mark.parametrize("size", [1, 1000, 2 * BLOCK + 17])
def test_the_norm_is_bounded_for_every_dtype_clip_and_size(dtype: torch.dtype, bound: float, size: int) -> None:
    for seed in range(3):
        vector = _draw(size, seed, 100.0).to(dtype)
        clipped = clip(vector, bound).vector
        assert _norm(clipped) <= bound
        if _norm(vector) > bound:
            assert _norm(clipped) > bound * (1 - 1e-6)
            torch.testing.assert_close(clipped / bound, vector.float() / _norm(vector), atol=1e-7, rtol=1e-6)


def test_numbers_that_round_up_stay_within_the_bound() -> None:
    """Each rounds to the nearest fp32; without room for that, a vector of equal numbers would come out too long."""
    for size in range(2, 60):
        for bound in (0.1, 1 / 3, 0.7):
            assert _norm(clip(torch.ones(size), bound).vector) <= bound


def test_a_shorter_vector_is_unchanged_and_a_copy() -> None:
    vector = _draw(10)
    clipped = clip(vector, 100.0).vector
    assert torch.equal(clipped, vector)
    clipped.zero_()
    assert vector.any()


@pytest.mark.parametrize("bound", [0.0, -1.0, float("nan")])
def test_a_bound_of_zero_or_less_or_nan_is_refused(bound: float) -> None:
    for refused in (lambda: clip(_draw(3), bound), lambda: clipped_sum([], bound, 3)):
        with pytest.raises(PrivacyError, match=f"a clip of {bound} bounds nothing"):
            refused()


def test_an_infinite_bound_is_refused() -> None:
    with pytest.raises(PrivacyError, match="a clip of inf bounds nothing that noise could cover"):
        clip(_draw(3), math.inf)


def test_a_bound_below_1e_30_is_refused() -> None:
    with pytest.raises(PrivacyError, match="at least 1e-30"):
        clip(_draw(3), 9e-31)


def test_a_zero_vector_stays_zero() -> None:
    assert torch.equal(clip(torch.zeros(5), 1e-30).vector, torch.zeros(5))


def test_an_empty_vector_stays_empty() -> None:
    assert clip(torch.zeros(0), 1.0).vector.shape == (0,)


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, BLOCK + 3])
def test_a_vector_that_is_not_finite_becomes_zero(odd: float, place: int) -> None:
    vector = _draw(BLOCK + 10)
    vector[place] = odd
    assert not clip(vector, 1.0).vector.any()


def test_numbers_too_large_for_fp32_become_zero() -> None:
    assert not clip(torch.tensor([1e39, 1.0], dtype=torch.float64), 1.0).vector.any()


def test_numbers_whose_squares_overflow_fp32_are_clipped_like_any_other() -> None:
    clipped = clip(torch.tensor([3e38, -3e38]), 2.0).vector
    torch.testing.assert_close(clipped, torch.tensor([2**0.5, -(2**0.5)]))


def test_numbers_whose_squares_vanish_in_fp32_are_clipped_too() -> None:
    clipped = clip(torch.full((4,), 1e-25), 1e-26).vector
    torch.testing.assert_close(clipped, torch.full((4,), 5e-27), atol=0, rtol=1e-6)


def test_a_huge_vector_and_a_tiny_bound_leave_no_more_than_the_bound() -> None:
    """The factor, 1e-67, is far below fp32."""
    assert _norm(clip(torch.full((9,), 3e37), 1e-30).vector) <= 1e-30


def test_a_gradient_is_not_followed() -> None:
    assert not clip(_draw(3).requires_grad_(), 1.0).vector.requires_grad


@settings(deadline=None, max_examples=50, database=None)
@given(st.lists(st.integers(0, 1000), max_size=8), st.floats(0.01, 100))
def test_the_sum_is_that_of_the_clipped(seeds: list[int], bound: float) -> None:
    vectors = [_draw(30, seed, 10.0) for seed in seeds]
    summed = clipped_sum(iter(vectors), bound, 30)
    assert summed.bound == bound
    expected = sum((clip(v, bound).vector.double() for v in vectors), torch.zeros(30, dtype=torch.float64))
    assert torch.equal(summed.vector, expected.float())


@settings(deadline=None, max_examples=50, database=None)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=8), st.floats(0.01, 100), st.sampled_from([1e-3, 1.0, 1e30, math.nan]))
def test_one_vector_more_moves_the_sum_by_the_bound_at_the_most(seeds: list[int], bound: float, scale: float) -> None:
    vectors = [_draw(30, seed) for seed in seeds]
    without, with_one = clipped_sum(vectors, bound, 30), clipped_sum([*vectors, _draw(30, 7, scale)], bound, 30)
    slack = 2**-23 * max(_norm(without.vector), _norm(with_one.vector))
    assert _norm(with_one.vector.double() - without.vector.double()) <= bound + slack


def test_the_sum_of_many_small_ones_is_not_lost_beside_a_large_one() -> None:
    """Added up in fp32, each of the small ones would vanish."""
    vectors = [torch.tensor([1.0]), *(torch.tensor([2.0**-25]) for _ in range(1 << 10))]
    assert clipped_sum(vectors, 1.5, 1).vector.item() == pytest.approx(1 + 2.0**-15, rel=1e-7)


def test_the_sum_of_nothing_is_zero() -> None:
    nothing = clipped_sum([], 1.0, 4)
    assert isinstance(nothing, Clipped)
    assert torch.equal(nothing.vector, torch.zeros(4))


def test_one_bad_vector_does_not_spoil_the_sum() -> None:
    summed = clipped_sum([torch.ones(2), torch.tensor([math.nan, 0.0])], 10.0, 2)
    assert summed.vector.tolist() == [1, 1]


def test_a_vector_of_another_size_is_a_defect() -> None:
    with pytest.raises(ValueError, match=r"a vector of 4 numbers was expected, not \(3,\)"):
        clipped_sum([torch.ones(3)], 1.0, 4)
