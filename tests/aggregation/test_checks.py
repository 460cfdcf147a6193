import pytest
import torch

from fedsb.aggregation.checks import check_equal, check_vector, check_weight
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
