from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsb.errors import SecureSumError
from fedsb.privacy.fixed_point import MOST_CLIENTS, FixedPoint, from_bytes, to_bytes

clients = st.one_of(st.integers(1, 60), st.integers(1, MOST_CLIENTS))
bounds = st.one_of(st.floats(1e-4, 1e4), st.floats(2.0**-100, 2.0**100))


@settings(deadline=None, database=None)
@given(clients, bounds)
def test_no_sum_wraps_and_the_scale_is_the_largest(clients: int, bound: float) -> None:
    point = FixedPoint(clients, bound)

    def largest(scale: float) -> int:
        return clients * round(point.limit * scale)

    assert largest(point.scale) < 2**31 <= largest(2 * point.scale)
    assert np.frexp(point.scale)[0] == 0.5
    assert 1 / point.scale <= clients * point.limit * 2**-29.9
    assert bound <= point.limit <= bound * (1 + 2**-22)
    assert point.limit == np.float32(point.limit)


@settings(deadline=None, database=None)
@given(st.integers(1, 60), bounds, st.sampled_from([np.float32, np.float64]), st.data())
def test_a_sum_is_as_near_as_it_says(count: int, bound: float, dtype: type, data: st.DataObject) -> None:
    """Against rational numbers; the worst sums are those of the largest numbers."""
    point = FixedPoint(60, bound)
    share = st.one_of(st.sampled_from([-1.0, 0.0, 1.0]), st.floats(-1, 1))
    values = np.array(data.draw(st.lists(share, min_size=count, max_size=count)))
    values = np.clip((values * point.limit).astype(dtype), dtype(-point.limit), dtype(point.limit))
    total = np.zeros(1, np.uint32)
    for value in values:
        total += point.encode(np.array([value], dtype))
    exact = sum(Fraction(float(value)) for value in values)
    assert abs(Fraction(float(point.decode(total, count)[0])) - exact) <= Fraction(point.sum_error(count))
    assert abs(Fraction(float(point.mean(total, count)[0])) - exact / count) <= Fraction(point.mean_error)


def test_the_error_of_a_mean_of_fifty_is_below_what_fp32_has() -> None:
    assert FixedPoint(50, 1.0).mean_error < 2.5e-8 < 2**-25
    assert FixedPoint(1, 1.0).sum_error(1) == 2**-31


@pytest.mark.parametrize("bound", [0.1, 0.3, 1.0, 1e-3, 123.456])
def test_the_bound_itself_is_encoded_even_after_it_was_rounded_to_fp32(bound: float) -> None:
    point = FixedPoint(2, bound)
    for dtype in (np.float32, np.float64):
        ends = np.array([bound, -bound], dtype)
        np.testing.assert_allclose(point.decode(point.encode(ends), 1), ends, atol=point.sum_error(1), rtol=0)


@pytest.mark.parametrize("value", [1.0000002, -1.0000002, 2.0, 1e300, np.nan, np.inf, -np.inf])
def test_a_number_beyond_the_bound_is_refused(value: float) -> None:
    with pytest.raises(SecureSumError, match=r"number 1 of 3 is NaN, infinite or beyond ±1, the bound of the secure sum; clip"):
        FixedPoint(3, 1.0).encode(np.array([0.0, value, 7.0]))


def test_what_is_refused_is_not_told() -> None:
    with pytest.raises(SecureSumError) as refused:
        FixedPoint(3, 1.0).encode(np.array([1234.5]))
    assert "1234" not in str(refused.value)


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-320, -1e-30])
def test_numbers_below_half_a_step_are_zero(value: float) -> None:
    assert FixedPoint(3, 1.0).encode(np.array([value])).tolist() == [0]


def test_a_sum_that_the_clients_cannot_reach_is_refused() -> None:
    point = FixedPoint(4, 1.0)
    most = 2 * point.encode(np.array([1.0]))
    assert point.decode(most, 2).tolist() == [2.0]
    for wrong in (most + np.uint32(1), -most - np.uint32(1)):
        with pytest.raises(SecureSumError, match="2 clients within ±1 cannot add up to; one of them did not encode as agreed"):
            point.decode(wrong, 2)


@pytest.mark.parametrize("count", [0, -1, 5])
def test_a_sum_of_no_clients_or_too_many_is_a_mistake(count: int) -> None:
    with pytest.raises(ValueError, match="a sum of 1 to 4 vectors"):
        FixedPoint(4, 1.0).decode(np.zeros(1, np.uint32), count)


@pytest.mark.parametrize("clients", [0, -3, 65_536])
def test_numbers_of_clients_that_are_refused(clients: int) -> None:
    with pytest.raises(SecureSumError, match="takes 1 to 65,535 clients"):
        FixedPoint(clients, 1.0)


@pytest.mark.parametrize("bound", [0.0, -1.0, np.nan, np.inf, 1e-40, 1e40])
def test_bounds_that_are_refused(bound: float) -> None:
    with pytest.raises(SecureSumError, match="within a bound from 2\\^-100 to 2\\^100"):
        FixedPoint(3, bound)


@pytest.mark.parametrize("values", [np.zeros((2, 2)), np.zeros(3, np.int64), np.zeros(3, np.float16)])
def test_vectors_that_are_a_mistake(values: np.ndarray) -> None:  # type: ignore[type-arg]
    with pytest.raises(ValueError, match="a flat vector of fp32 or fp64"):
        FixedPoint(3, 1.0).encode(values)


def test_integers_travel_in_little_endian() -> None:
    numbers = np.array([1, 2**32 - 2, 0x01020304], np.uint32)
    data = to_bytes(numbers)
    assert data == bytes([1, 0, 0, 0, 254, 255, 255, 255, 4, 3, 2, 1])
    assert from_bytes(data, 3).tolist() == numbers.tolist()
    assert to_bytes(numbers.astype(">u4")) == data


@pytest.mark.parametrize("size", [2, 4])
def test_a_vector_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(SecureSumError, match=f"a vector of 12 bytes came where {4 * size} were expected"):
        from_bytes(bytes(12), size)
