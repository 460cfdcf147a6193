from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsb.adapters.state import Layout
from fedsb.aggregation import mean as module
from fedsb.aggregation.mean import Mean
from fedsb.basis.spectral import random_basis
from fedsb.errors import FederationError
from tests.basis.samples import SHAPES
from tests.reference import mean_update

RANK = 3
clients = st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 2**29 - 1)), min_size=1, max_size=12)


def _vector(seed: int, size: int = 40, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale


def _mean(pairs: list[tuple[torch.Tensor, float]]) -> torch.Tensor:
    mean = Mean(pairs[0][0].numel())
    for vector, weight in pairs:
        mean.add(vector, weight)
    assert mean.count == len(pairs)
    return mean.result()


def test_the_mean_of_cores_is_the_mean_of_the_weight_updates() -> None:
    basis = random_basis(SHAPES, RANK, 0)
    states = []
    for client in range(5):
        draw = torch.Generator().manual_seed(client)
        states.append({f"{name}.core": torch.randn(RANK, RANK, generator=draw) for name in SHAPES})
    weights = [3, 1, 400, 20, 7]
    layout = Layout.of(states[0])
    cores = layout.unflatten(_mean([(layout.flatten(s), w) for s, w in zip(states, weights, strict=True)]))
    for name, expected in mean_update(basis, states, weights).items():
        update = basis.B[name].double() @ cores[f"{name}.core"].double() @ basis.A[name].double()
        torch.testing.assert_close(update, expected, atol=1e-7, rtol=0)


def test_weights_count() -> None:
    one, two = torch.tensor([0.0, 8.0]), torch.tensor([4.0, 0.0])
    assert _mean([(one, 1), (two, 1)]).tolist() == [2, 4]
    assert _mean([(one, 3), (two, 1)]).tolist() == [1, 6]
    assert _mean([(one, 0.25), (two, 0.75)]).tolist() == [3, 2]
    assert torch.equal(_mean([(one, 5)]), one)


@settings(deadline=None, max_examples=60, database=None)
@given(clients, st.randoms())
def test_the_order_of_replies_does_not_matter(pairs: list[tuple[int, int]], random) -> None:  # type: ignore[no-untyped-def]
    replies = [(_vector(seed), weight) for seed, weight in pairs]
    shuffled = random.sample(replies, len(replies))
    torch.testing.assert_close(_mean(replies), _mean(shuffled), atol=1e-7, rtol=2e-7)


@settings(deadline=None, max_examples=40, database=None)
@given(clients)
def test_the_result_is_the_exact_mean_rounded_once(pairs: list[tuple[int, int]]) -> None:
    """Exact in rational numbers; large and small numbers meet, which fp32 sums would lose."""
    replies = [(_vector(seed, 2, scale=10.0 ** (seed % 9 - 4)), weight) for seed, weight in pairs]
    found = _mean(replies)
    total = sum(Fraction(weight) for _, weight in replies)
    for place in range(2):
        parts = [Fraction(float(vector[place])) * weight for vector, weight in replies]
        size = sum(abs(part) for part in parts) / total
        assert abs(Fraction(float(found[place])) - sum(parts) / total) <= size / 2**23


def test_many_replies_leave_no_error_behind() -> None:
    mean = Mean(3)
    for _ in range(2000):
        mean.add(torch.tensor([0.1, 1e-6, 3e4]), 777)
    assert torch.equal(mean.result(), torch.tensor([0.1, 1e-6, 3e4]))


def test_bf16_vectors_are_counted_as_they_are() -> None:
    vectors = [_vector(seed).bfloat16() for seed in range(3)]
    found = _mean([(vector, 1) for vector in vectors])
    assert found.dtype == torch.float32
    expected = torch.stack([vector.double() for vector in vectors]).mean(0)
    torch.testing.assert_close(found.double(), expected, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("size", [1, 7, 8, 9, 23])
def test_blocks_of_any_size_give_the_same(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    pairs = [(_vector(seed, size), float(seed + 1)) for seed in range(3)]
    expected = _mean(pairs)
    monkeypatch.setattr(module, "BLOCK", 8)
    assert torch.equal(_mean(pairs), expected)


def test_a_vector_that_was_counted_is_not_changed_and_not_kept() -> None:
    vector = _vector(0)
    kept = vector.clone()
    mean = Mean(40)
    mean.add(vector, 2)
    assert torch.equal(vector, kept)
    vector.zero_()
    assert torch.equal(mean.result(), kept)


def test_memory_does_not_grow_with_the_number_of_clients() -> None:
    def held(mean: Mean) -> int:
        assert {type(value) for value in vars(mean).values()} == {int, float, torch.Tensor}
        return sum(v.numel() for v in vars(mean).values() if isinstance(v, torch.Tensor))

    mean = Mean(40)
    mean.add(_vector(0), 1)
    first = held(mean)
    for seed in range(30):
        mean.add(_vector(seed), 1)
    assert held(mean) == first


def test_a_mean_can_be_read_before_the_last_reply() -> None:
    mean = Mean(1)
    mean.add(torch.tensor([2.0]), 2)
    assert mean.result().item() == mean.result().item() == 2
    mean.add(torch.tensor([6.0]), 6)
    assert mean.result().item() == 5


def test_no_reply_at_all() -> None:
    with pytest.raises(FederationError, match=r"no usable reply came in this round; see the refused ones in events\.jsonl"):
        Mean(3).result()


@pytest.mark.parametrize("weight", [0, -1, 0.0, float("nan"), -float("inf")])
def test_a_weight_that_is_not_positive_is_refused(weight: float) -> None:
    mean = Mean(3)
    with pytest.raises(ValueError, match="a positive weight"):
        mean.add(torch.ones(3), weight)
    assert mean.count == 0


@pytest.mark.parametrize("shape", [(2,), (4,), (3, 1), (1, 3), ()])
def test_a_vector_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    mean = Mean(3)
    mean.add(torch.ones(3), 1)
    with pytest.raises(ValueError, match="a vector of 3 numbers"):
        mean.add(torch.zeros(shape), 1)
    assert mean.count == 1
    assert torch.equal(mean.result(), torch.ones(3))
