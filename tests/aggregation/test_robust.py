"""Robust aggregates against naive ones, and against Flower's."""

import itertools

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.serverapp.strategy.fedtrimmedavg import trim_mean
from flwr.serverapp.strategy.multikrum import select_multikrum

from fedsb.aggregation import mean as blocks
from fedsb.aggregation import robust
from fedsb.aggregation.robust import Gathered, cut_off, krum, median, trimmed_mean


def _vectors(count: int, size: int = 40, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("count", [3, 4, 5, 10, 11])
def test_the_median_is_numpys(count: int) -> None:
    vectors = _vectors(count)
    np.testing.assert_allclose(median(vectors).numpy(), np.median(vectors.double().numpy(), axis=0), rtol=1e-12)


@pytest.mark.parametrize(("count", "trim"), [(5, 0.2), (9, 0.2), (10, 0.1), (11, 0.4), (30, 0.1), (7, 0.49)])
def test_the_trimmed_mean_is_flowers(count: int, trim: float) -> None:
    vectors = _vectors(count)
    expected = trim_mean(vectors.double().numpy(), trim)
    np.testing.assert_allclose(trimmed_mean(vectors, trim).numpy(), expected, rtol=1e-12)
    assert not torch.allclose(trimmed_mean(vectors, trim), vectors.double().mean(0))


def test_what_is_cut_off_does_not_hang_on_how_a_share_is_rounded() -> None:
    assert [cut_off(n, t) for n, t in ((5, 0.2), (100, 0.29), (4, 0.2), (10, 0.3))] == [1, 29, 0, 3]
    assert int(0.29 * 100) == 28


def _naive_scores(vectors: np.ndarray, hostile: int) -> list[float]:
    scores = []
    for i, x in enumerate(vectors):
        distances = sorted(float(((x - y) ** 2).sum()) for j, y in enumerate(vectors) if j != i)
        scores.append(sum(distances[: len(vectors) - hostile - 2]))
    return scores


@pytest.mark.parametrize(("count", "hostile", "keep"), [(5, 1, 1), (7, 2, 1), (9, 1, 4), (11, 4, 5), (12, 3, 1)])
def test_krum_keeps_what_naive_scores_and_flower_keep(count: int, hostile: int, keep: int) -> None:
    vectors = _vectors(count)
    plain = vectors.double().numpy()
    best = np.argsort(_naive_scores(plain, hostile), kind="stable")[:keep]
    found = krum(vectors, hostile, keep).numpy()
    np.testing.assert_allclose(found, plain[best].mean(0), rtol=1e-6, atol=1e-8)
    records = [RecordDict({"arrays": ArrayRecord({"w": Array(row)})}) for row in plain]
    flowers = [next(iter(r.array_records.values()))["w"].numpy() for r in select_multikrum(records, hostile, keep)]
    np.testing.assert_allclose(found, np.mean(flowers, axis=0), rtol=1e-6, atol=1e-8)


def test_krum_sees_differences_that_drown_in_what_states_have_in_common() -> None:
    """States of one round: a large part in common, updates a thousandth of it. Flower's fp32 distances choose another."""
    updates = _vectors(7, 4000, seed=3) * torch.linspace(0.5, 1.5, 7)[:, None]
    vectors = 1000 + 0.02 * updates
    exact = vectors.double().numpy()
    best = int(np.argmin(_naive_scores(exact, 2)))
    assert torch.equal(krum(vectors, 2), vectors[best])
    records = [RecordDict({"arrays": ArrayRecord({"w": Array(row.numpy())})}) for row in vectors]
    (chosen,) = select_multikrum(records, 2, 1)
    assert not np.array_equal(chosen["arrays"]["w"].numpy(), vectors[best].numpy())  # type: ignore[index, union-attr, call-overload]


@pytest.mark.parametrize("size", [7, 8, 23])
def test_blocks_of_any_size_give_the_same(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    vectors = _vectors(7, size)

    def found() -> list[torch.Tensor]:
        return [median(vectors), trimmed_mean(vectors, 0.2), krum(vectors, 2), krum(vectors, 1, 3)]

    expected = found()
    for module in (robust, blocks):
        monkeypatch.setattr(module, "BLOCK", 8)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found(), expected, strict=True))


@pytest.mark.parametrize("hostile", [1e-3, 1.0, 1e6])
def test_one_hostile_vector_moves_no_result_beyond_the_honest_ones(hostile: float) -> None:
    """The mean goes wherever one client wants it; each number of the others stays between those of honest clients."""
    honest = _vectors(6)
    vectors = torch.cat([honest, -hostile * torch.ones(1, 40)])
    low, high = honest.min(0).values - 1e-6, honest.max(0).values + 1e-6
    for found in (median(vectors), trimmed_mean(vectors, 0.2), krum(vectors, 1)):
        assert bool(((found >= low) & (found <= high)).all()) or hostile < 1
    if hostile > 1:
        assert bool((vectors.mean(0) < low).all())


def test_the_result_does_not_depend_on_the_order_of_arrival_even_where_scores_tie() -> None:
    """Two that are each other's nearest have the same score where only one neighbour counts."""
    ties = torch.tensor([[0.0, 0.0], [1.0, 0.0], [50.0, 0.0], [90.0, 0.0], [51.0, 0.0]])
    found = set()
    for order in itertools.permutations(range(5)):
        gathered = Gathered(2, lambda vectors: krum(vectors, 1))
        for i in order:
            gathered.add(ties[i])
        assert gathered.count == 5
        found.add(tuple(gathered.result().tolist()))
    assert len(found) == 1


def test_too_few_vectors_and_wrong_ones_are_refused() -> None:
    with pytest.raises(ValueError, match="4 vectors, 1 of them hostile, are too few"):
        krum(_vectors(4), 1)
    with pytest.raises(ValueError, match="leaves none"):
        trimmed_mean(_vectors(2), 0.5)
    gathered = Gathered(40, median)
    for vector, weight, index in ((39, 1.0, None), (40, 2.0, None), (40, 1.0, torch.arange(3))):
        with pytest.raises(ValueError, match="and weight 1 are needed"):
            gathered.add(torch.zeros(vector), weight, index)
