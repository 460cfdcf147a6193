"""Discounted updates against a sum written out."""

import pytest
import torch

from fedsb.aggregation.buffered import Buffer, discount
from fedsb.aggregation.mean import Mean
from fedsb.errors import FederationError


def _vectors(count: int, seed: int = 0) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(20, generator=draw) for _ in range(count)]


def test_stale_updates_count_less() -> None:
    state, sent, came, weights, staleness = _vectors(1)[0], _vectors(4, 1), _vectors(4, 2), [1.0, 3.0, 20.0, 7.0], [0, 3, 8, 1]
    buffer = Buffer(20)
    for x, y, w, t in zip(sent, came, weights, staleness, strict=True):
        buffer.add(x, y, w, t)
    moved = sum(w / (1 + t) ** 0.5 * (y - x).double() for x, y, w, t in zip(sent, came, weights, staleness, strict=True))
    torch.testing.assert_close(buffer.result(state).double(), state.double() + moved / sum(weights), rtol=1e-6, atol=1e-6)
    assert buffer.count == 4 and [discount(t) for t in (0, 3, 8)] == pytest.approx([1, 1 / 2, 1 / 3])


def test_updates_from_one_state_that_none_has_moved_are_the_mean() -> None:
    state, came = _vectors(1)[0], _vectors(3, 1)
    buffer, mean = Buffer(20), Mean(20)
    for vector, weight in zip(came, (2.0, 5.0, 1.0), strict=True):
        buffer.add(state, vector, weight, 0)
        mean.add(vector, weight)
    torch.testing.assert_close(buffer.result(state), mean.result(), rtol=1e-6, atol=1e-7)
    alone = Buffer(20)
    alone.add(state, came[0], 3.0, 0)
    assert torch.equal(alone.result(state), came[0])


def test_an_empty_buffer_is_no_state() -> None:
    with pytest.raises(FederationError, match="no usable update"):
        Buffer(3).result(torch.zeros(3))
