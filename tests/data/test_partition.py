from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsb.data.partition import partition, partition_like
from fedsb.errors import DataError

quick = settings(deadline=None, max_examples=60, database=None)
groups_lists = st.lists(st.integers(0, 4), min_size=1, max_size=80)
alphas = st.floats(1e-4, 1e12)
seeds = st.integers(0, 2**40)


def flat(parts: list[list[int]]) -> list[int]:
    return sorted(index for part in parts for index in part)


def shares(parts: list[list[int]], groups: list[int], classes: int) -> Any:
    """(clients, classes): how each client's examples spread over the groups."""
    counts = np.array([[sum(groups[i] == g for i in part) for g in range(classes)] for part in parts])
    return counts / counts.sum(axis=1, keepdims=True)


@quick
@given(st.sampled_from(["iid", "dirichlet", "size"]), groups_lists, st.integers(1, 80), alphas, seeds)
def test_parts_are_disjoint_complete_sorted_filled_and_determined(
    kind: Any, groups: list[int], clients: int, alpha: float, seed: int
) -> None:
    clients = min(clients, len(groups))
    parts = partition(kind, groups, clients, alpha, seed)
    assert flat(parts) == list(range(len(groups)))
    assert len(parts) == clients
    assert all(part and part == sorted(part) for part in parts)
    assert parts == partition(kind, groups, clients, alpha, seed)


@quick
@given(groups_lists, st.integers(1, 20), seeds)
def test_iid_sizes_differ_by_at_most_one(groups: list[int], clients: int, seed: int) -> None:
    clients = min(clients, len(groups))
    sizes = [len(part) for part in partition("iid", groups, clients, 1.0, seed)]
    assert max(sizes) - min(sizes) <= 1


@quick
@given(st.integers(1, 5), st.integers(1, 4), st.integers(4, 9), seeds)
def test_task_clients_hold_their_task_evenly(tasks: int, each: int, size: int, seed: int) -> None:
    groups = [i % tasks for i in range(tasks * size)]
    parts = partition("task", groups, tasks * each, 1.0, seed)
    assert flat(parts) == list(range(len(groups)))
    for client, part in enumerate(parts):
        assert {groups[i] for i in part} == {client % tasks}
        assert size // each <= len(part) <= -(-size // each)


@pytest.mark.parametrize("kind", ["task", "iid", "dirichlet", "size"])
def test_seed_changes_the_parts(kind: Any) -> None:
    groups = [i % 4 for i in range(200)]
    assert partition(kind, groups, 8, 1.0, 0) != partition(kind, groups, 8, 1.0, 1)


def test_small_alpha_skews_labels_more() -> None:
    groups = [i % 10 for i in range(5000)]
    largest = [shares(partition("dirichlet", groups, 10, a, 3), groups, 10).max(axis=1).mean() for a in (0.05, 1, 1e3)]
    assert largest[0] > 0.6 > largest[1] > 0.2 > largest[2]
    assert largest[2] == pytest.approx(0.1, abs=0.02)


def test_small_alpha_skews_sizes_more_but_not_labels() -> None:
    groups = [i % 2 for i in range(4000)]
    small, large = (partition("size", groups, 8, alpha, 0) for alpha in (0.2, float("inf")))
    assert max(map(len, small)) > 1200
    assert {len(part) for part in large} == {500}
    biggest = max(small, key=len)
    assert np.mean([groups[i] for i in biggest]) == pytest.approx(0.5, abs=0.05)


def test_empty_clients_get_the_last_example_of_the_largest() -> None:
    parts = partition("size", [0] * 6, 4, 1e-4, 0)
    assert sorted(map(len, parts)) == [1, 1, 1, 3]
    assert sorted(parts)[0] == [0, 1, 2]


@pytest.mark.parametrize("kind", ["task", "iid", "dirichlet", "size"])
def test_fewer_examples_than_clients(kind: Any) -> None:
    with pytest.raises(DataError, match=r"3 examples cannot be dealt to 4 clients; lower federation\.clients or raise"):
        partition(kind, [0, 0, 0], 4, 1.0, 0)


def test_task_with_fewer_examples_than_its_clients() -> None:
    with pytest.raises(DataError, match="the 1 examples of task number 1 cannot be dealt to its 2 clients"):
        partition("task", [0, 0, 0, 1], 4, 1.0, 0)
    with pytest.raises(DataError, match="task number 2 cannot be dealt to its 0 clients"):
        partition("task", [0, 1, 2], 2, 1.0, 0)


@quick
@given(groups_lists, groups_lists, st.integers(1, 80), st.floats(1e-3, 1e3), seeds)
def test_test_parts_are_disjoint_complete_sorted_filled_and_determined(
    train: list[int], test: list[int], clients: int, alpha: float, seed: int
) -> None:
    clients = min(clients, len(train), len(test))
    train_parts = partition("dirichlet", train, clients, alpha, seed)
    parts = partition_like(train_parts, train, test, seed)
    assert flat(parts) == list(range(len(test)))
    assert len(parts) == clients
    assert all(part and part == sorted(part) for part in parts)
    assert parts == partition_like(train_parts, train, test, seed)


@quick
@given(st.sampled_from(["iid", "dirichlet", "size"]), st.floats(0.05, 10), st.integers(1, 12), seeds)
def test_each_group_is_within_one_of_its_share_of_train(kind: Any, alpha: float, clients: int, seed: int) -> None:
    train, test = [i % 3 for i in range(300)], [i % 3 for i in range(90)]
    train_parts = partition(kind, train, clients, alpha, seed)
    parts = partition_like(train_parts, train, test, seed)
    moved = sum(len(part) == 1 for part in parts)  # these may have been given their only one
    for train_part, part in zip(train_parts, parts, strict=True):
        held, got = Counter(train[i] for i in train_part), Counter(test[i] for i in part)
        assert set(got) <= set(held)
        for group in range(3):
            assert abs(got[group] - held[group] * 30 / 100) < 1 + moved


def test_one_client_whole_groups_follow_it() -> None:
    assert partition_like([[0, 1], [2, 3]], [0, 0, 1, 1], [1, 0, 1, 0], 0) == [[1, 3], [0, 2]]


def test_rounding_of_many_small_groups_does_not_favour_the_first_clients() -> None:
    train = [i % 77 for i in range(7700)]
    parts = partition_like(partition("iid", train, 100, 1.0, 0), train, [i % 77 for i in range(770)], 0)
    sizes = [len(part) for part in parts]
    assert sum(sizes[:50]) == pytest.approx(385, abs=20)
    assert max(sizes) <= 12
    assert min(sizes) >= 4


def test_untested_client_gets_a_group_it_trains_on() -> None:
    train = [0] * 90 + [1] * 9 + [0]
    train_parts = [list(range(99)), [99]]
    parts = partition_like(train_parts, train, [0, 0, 1, 1, 1], 0)
    assert parts == [[0, 2, 3, 4], [1]]


def test_untested_client_gets_any_group_if_nobody_can_spare_its_own() -> None:
    assert partition_like([[0, 1], [2]], [0, 0, 1], [0, 0], 0) == [[0], [1]]


def test_group_nobody_trains_on_is_dealt_by_size() -> None:
    parts = partition_like([list(range(30)), list(range(30, 40))], [0] * 40, [5] * 8, 0)
    assert [len(part) for part in parts] == [6, 2]


def test_fewer_test_examples_than_clients() -> None:
    with pytest.raises(DataError, match=r"1 test examples cannot be dealt to 2 clients; .* raise data\.tasks\.test"):
        partition_like([[0], [1]], [0, 0], [0], 0)
