from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsb.aggregation.checks import SLACK, Reach, Strikes, check_equal, check_size, check_vector, check_weight
from fedsb.errors import ReplyError

NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize("vector", [torch.zeros(3), torch.tensor([1e38, -1e-38, 0.0]), torch.zeros(3, dtype=torch.bfloat16)])
def test_a_vector_that_counts(vector: torch.Tensor) -> None:
    check_vector(vector, 3)


@pytest.mark.parametrize(
    ("vector", "complaint"),
    [
        (torch.zeros(2), r"shape \(2,\) where \(3,\) was expected"),
        (torch.zeros(4), r"shape \(4,\) where"),
        (torch.zeros(3, 1), r"shape \(3, 1\) where"),
        (torch.zeros(1, 3), r"shape \(1, 3\) where"),
        (torch.zeros(()), r"shape \(\) where"),
        (torch.zeros(0), r"shape \(0,\) where"),
        (torch.tensor([0.0, NAN, 0.0]), "NaN or infinite"),
        (torch.tensor([0.0, 0.0, INFINITY]), "NaN or infinite"),
        (torch.tensor([-INFINITY, 0.0, 0.0]), "NaN or infinite"),
        (torch.tensor([0.0, NAN, 0.0], dtype=torch.bfloat16), "NaN or infinite"),
    ],
)
def test_a_vector_that_must_not_count(vector: torch.Tensor, complaint: str) -> None:
    with pytest.raises(ReplyError, match=complaint):
        check_vector(vector, 3)


def test_replies_to_another_question() -> None:
    check_equal("round", 3, 3)
    check_equal("basis", "ab" * 32, "ab" * 32)
    with pytest.raises(ReplyError, match="answered for round 2 where 3 was asked"):
        check_equal("round", 2, 3)
    with pytest.raises(ReplyError, match=f"answered for basis {'ab' * 8} where {'cd' * 8} was asked"):
        check_equal("basis", "ab" * 32, "cd" * 32)
    with pytest.raises(ReplyError, match="layout"):
        check_equal("layout", "x" * 16 + "a", "x" * 16 + "b")


@pytest.mark.parametrize("examples", [1, 2, 2**29 - 1])
def test_numbers_of_examples_that_count(examples: int) -> None:
    check_weight(examples)


@pytest.mark.parametrize("examples", [0, -1, 2**29, 1.0, 1.5, NAN, INFINITY, "3", None, [3]])
def test_numbers_of_examples_that_must_not_count(examples: object) -> None:
    with pytest.raises(ReplyError, match="as its number of examples"):
        check_weight(examples)


def _reach(sent: list[float], largest: float, **settings: Any) -> Reach:
    settings = {"steps": 1, "bf16": False, "norm": None} | settings
    start = torch.tensor(sent)
    return Reach.of(start, torch.full_like(start, largest), **settings)


def test_what_steps_can_reach_counts_and_its_norm_is_told() -> None:
    assert _reach([1.0, -2.0], 0.5).check(torch.tensor([1.5, -2.5])) == pytest.approx(0.5 * 2**0.5)
    assert _reach([1.0, -2.0], 0.5).check(torch.tensor([1.0, -2.0])) == 0


@pytest.mark.parametrize("far", [0.5 * (1 + 2 * SLACK), 50.0, 3.4e38, -0.6])
def test_what_steps_cannot_reach_is_refused(far: float) -> None:
    with pytest.raises(ReplyError, match=r"moved a number by .* where its steps can move it by 0.505"):
        _reach([0.0, 0.0, 0.0], 0.5).check(torch.tensor([0.5, far, 0.0]))


def test_no_steps_reach_nothing_else() -> None:
    still = _reach([1.0, 0.25], 0.0, steps=0)
    assert still.check(torch.tensor([1.0, 0.25])) == 0
    with pytest.raises(ReplyError, match="by 1.18e-38$"):
        still.check(torch.tensor([1.0, 0.25000003]))


@given(st.floats(-1e3, 1e3, width=32), st.floats(0, 1, width=32), st.sampled_from([-1, 1]))
def test_rounding_to_bf16_on_the_way_is_no_fault(sent: float, largest: float, sign: int) -> None:
    moved = (torch.tensor([sent]) + sign * largest).bfloat16().float()
    _reach([sent], largest, bf16=True).check(moved)


def test_the_room_for_rounding_is_small() -> None:
    with pytest.raises(ReplyError, match="moved a number"):
        _reach([1.0], 1e-6).check(torch.tensor([1.001]))
    with pytest.raises(ReplyError, match="moved a number"):
        _reach([1.0], 1e-6, bf16=True).check(torch.tensor([1.01]))


def test_a_norm_of_ones_own_choice_is_a_bound_as_well() -> None:
    reach = _reach([0.0] * 4, 1.0, norm=1.0)
    assert reach.check(torch.full((4,), 0.5)) == 1.0
    with pytest.raises(ReplyError, match=r"update of norm 1.2 where federation.max_update_norm = 1"):
        reach.check(torch.full((4,), 0.6))


def test_bytes_beyond_the_answer() -> None:
    check_size(1000, 1000)
    with pytest.raises(ReplyError, match="sent 1,001 bytes where an answer has 1,000 at the most"):
        check_size(1001, 1000)


def test_strikes_are_counted_by_client_and_from_where_a_run_stood() -> None:
    strikes = Strikes(2, {"a": 1})
    for client in ("a", "b"):
        assert not strikes.out(client)
        strikes.add(client)
    assert strikes.out("a") and not strikes.out("b") and not strikes.out("c")
    assert strikes.counts == {"a": 2, "b": 1}
    assert not Strikes(0, {"a": 99}).out("a")
