"""The means of HetLoRA and FlexLoRA, against naive loops over dense matrices."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsb.adapters.share import share_of
from fedsb.adapters.state import Layout
from fedsb.aggregation.factors import FactorMean, PaddedMean, mean_of
from fedsb.aggregation.mean import Mean

RANK, SHAPES = 4, {"a": (6, 9), "b": (11, 5)}
LAYOUT = Layout(
    (
        *((f"{name}.A", (RANK, in_)) for name, (_, in_) in SHAPES.items()),
        *((f"{name}.B", (out, RANK)) for name, (out, _) in SHAPES.items()),
        ("head.classifier.bias", (3,)),
    )
)
SENT = torch.randn(LAYOUT.size, generator=torch.Generator().manual_seed(99))
CLIENTS = st.lists(st.tuples(st.integers(1, RANK), st.integers(1, 1000)), min_size=1, max_size=9)


def states(clients: list[tuple[int, int]]) -> list[dict[str, torch.Tensor]]:
    """Each client's state, zero beyond its rank."""
    draw, found = torch.Generator().manual_seed(7), []
    for rank, _ in clients:
        state = {name: torch.randn(shape, generator=draw) for name, shape in LAYOUT.shapes}
        for name in SHAPES:
            state[f"{name}.A"][rank:] = 0
            state[f"{name}.B"][:, rank:] = 0
        found.append(state)
    return found


def added(mean: Mean, clients: list[tuple[int, int]], method: str) -> Mean:
    for (rank, weight), state in zip(clients, states(clients), strict=True):
        share = share_of(LAYOUT, method, rank)
        mean.add(share.put(share.take(LAYOUT.flatten(state)), SENT), float(weight), share.index)
    return mean


@settings(deadline=None, max_examples=40, database=None)
@given(CLIENTS)
def test_hetlora_is_the_naive_loop(clients: list[tuple[int, int]]) -> None:
    got = LAYOUT.unflatten(added(mean_of("hetlora", LAYOUT), clients, "hetlora").result(SENT))
    sparsity = []
    for (_, weight), state in zip(clients, states(clients), strict=True):
        updates = [state[f"{name}.B"].double() @ state[f"{name}.A"].double() for name in SHAPES]
        sparsity.append(weight * sum(float(update.square().sum()) for update in updates) ** 0.5)
    for name in got:
        naive = sum(s * state[name].double() for s, state in zip(sparsity, states(clients), strict=True)) / sum(sparsity)
        torch.testing.assert_close(got[name].double(), naive, rtol=1e-5, atol=1e-7)


def test_updates_of_zero_do_not_count_beside_others_and_count_alike_alone() -> None:
    one, other = (LAYOUT.flatten(state) for state in states([(4, 1), (4, 1)]))
    still = LAYOUT.unflatten(other.clone())
    for name in SHAPES:
        still[f"{name}.B"].zero_()
    mean = PaddedMean(LAYOUT)
    mean.add(one)
    mean.add(other)
    assert torch.equal(mean.result(), mean.result(SENT))
    moved = PaddedMean(LAYOUT)
    moved.add(one)
    moved.add(LAYOUT.flatten(still))
    torch.testing.assert_close(moved.result(), one)
    alike = PaddedMean(LAYOUT)
    for _ in range(2):
        alike.add(LAYOUT.flatten(still))
    torch.testing.assert_close(alike.result(), LAYOUT.flatten(still))


@settings(deadline=None, max_examples=40, database=None)
@given(CLIENTS)
def test_flexlora_is_the_dense_truncated_svd(clients: list[tuple[int, int]]) -> None:
    """Nine clients of rank 4 stack 36 columns where 5 and 6 are enough, so factors are made fewer on the way."""
    got, total = LAYOUT.unflatten(added(FactorMean(LAYOUT), clients, "flexlora").result(SENT)), sum(w for _, w in clients)
    for name, (out, in_) in SHAPES.items():
        dense = torch.zeros(out, in_, dtype=torch.float64)
        for (_, weight), state in zip(clients, states(clients), strict=True):
            dense += weight * state[f"{name}.B"].double() @ state[f"{name}.A"].double() / total
        u, s, vh = torch.linalg.svd(dense, full_matrices=False)
        for rank in range(1, RANK + 1):  # what each client gets of it
            best = u[:, :rank] * s[:rank] @ vh[:rank]
            torch.testing.assert_close(
                (got[f"{name}.B"][:, :rank] @ got[f"{name}.A"][:rank]).double(), best, rtol=1e-3, atol=1e-4
            )
    heads = sum(w * state["head.classifier.bias"] for (_, w), state in zip(clients, states(clients), strict=True))
    torch.testing.assert_close(got["head.classifier.bias"], heads / total)


def test_stacked_factors_do_not_grow_with_the_clients() -> None:
    mean = added(FactorMean(LAYOUT), [(4, 1)] * 50, "flexlora")
    assert isinstance(mean, FactorMean)
    for name, (out, in_) in SHAPES.items():
        b, a = mean._stacks[name]
        assert b.shape[1] == a.shape[0] <= 2 * min(out, in_)


def test_directions_that_nobody_holds_keep_their_a_and_can_be_trained() -> None:
    got, sent = LAYOUT.unflatten(added(FactorMean(LAYOUT), [(2, 5)], "flexlora").result(SENT)), LAYOUT.unflatten(SENT)
    for name in SHAPES:
        assert not got[f"{name}.B"][:, 2:].any() and torch.equal(got[f"{name}.A"][2:], sent[f"{name}.A"][2:])
        torch.testing.assert_close(got[f"{name}.A"][:2] @ got[f"{name}.A"][:2].T, torch.eye(2), atol=1e-6, rtol=0)


def test_the_state_that_was_sent_is_needed() -> None:
    with pytest.raises(ValueError, match="the state that was sent must be given"):
        added(FactorMean(LAYOUT), [(2, 5)], "flexlora").result()


@settings(deadline=None, max_examples=40, database=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 1000)), min_size=1, max_size=6))
def test_each_number_of_a_nested_core_is_the_mean_over_its_holders(clients: list[tuple[int, int]]) -> None:
    layout = Layout((("a.core", (4, 4)), ("head.classifier.bias", (2,))))
    draw, sent = torch.Generator().manual_seed(3), torch.full((layout.size,), -7.0)
    vectors = [torch.randn(layout.size, generator=draw) for _ in clients]
    mean = mean_of("nested-sb", layout)
    for (rank, weight), vector in zip(clients, vectors, strict=True):
        mean.add(vector, float(weight), share_of(layout, "nested-sb", rank).index)
    got = layout.unflatten(mean.result(sent))
    for i in range(4):
        for j in range(4):
            held = [
                (w, float(layout.unflatten(v)["a.core"][i, j]))
                for (r, w), v in zip(clients, vectors, strict=True)
                if max(i, j) < r
            ]
            naive = sum(w * x for w, x in held) / sum(w for w, _ in held) if held else -7.0
            assert float(got["a.core"][i, j]) == pytest.approx(naive, rel=1e-6, abs=1e-7)
    heads = sum(w * layout.unflatten(v)["head.classifier.bias"].double() for (_, w), v in zip(clients, vectors, strict=True))
    torch.testing.assert_close(got["head.classifier.bias"].double(), heads / sum(w for _, w in clients), rtol=1e-6, atol=1e-7)


def test_numbers_that_nobody_holds_must_be_said() -> None:
    mean = Mean(3)
    mean.add(torch.ones(3), 1.0, torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="that nobody holds"):
        mean.result()
