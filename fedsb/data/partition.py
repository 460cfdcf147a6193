"""How examples are dealt out to clients: pure functions from group numbers to lists of example indices."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from fedsb.data.seeds import generator
from fedsb.errors import DataError

Ints: TypeAlias = npt.NDArray[np.int64]
Kind: TypeAlias = Literal["task", "iid", "dirichlet", "size"]

EVEN = 1e9  # above this alpha the shares are equal to nine digits, and NumPy's Dirichlet would overflow


def partition(kind: Kind, groups: Sequence[int], clients: int, alpha: float, seed: int) -> list[list[int]]:
    """Deal the examples 0..n-1 out to clients; `groups[i]` is the group (label id, or task index) of example i.

    - `task`: group g goes, shuffled and in even parts, to the clients i with i mod (number of groups) = g.
    - `iid`: shuffled and dealt evenly; sizes differ by at most 1.
    - `dirichlet`: label skew after Hsu et al. 2019 (arXiv 1909.06335), in the form of Yurochkin et al. 2019
      (arXiv 1905.12022): for each group, the clients' shares of it are drawn from Dirichlet(alpha).
    - `size`: shuffled, and the clients' sizes drawn from Dirichlet(alpha).

    Where `dirichlet` or `size` leave a client without examples, it gets one: the highest index of whichever client is
    the largest at that time (the first such client), for empty clients in order.

    Returns one sorted list per client: disjoint, not empty, together 0..n-1, and determined by the arguments.
    Raises DataError if there are fewer examples than clients, or, for `task`, fewer of a group than its clients.
    """
    if len(groups) < clients:
        raise _too_few(len(groups), "train", clients)
    rng = generator(seed, "partition")
    members = np.asarray(groups, dtype=np.int64)
    deals: dict[Kind, Callable[[], list[Ints]]] = {
        "task": lambda: _deal_tasks(members, clients, rng),
        "iid": lambda: np.array_split(rng.permutation(len(members)), clients),
        "dirichlet": lambda: _deal_dirichlet(members, clients, alpha, rng),
        "size": lambda: _cut(rng.permutation(len(members)), _shares(clients, alpha, rng)),
    }
    parts = deals[kind]()
    return _nobody_empty([sorted(part.tolist()) for part in parts])


def partition_like(
    train_parts: Sequence[Sequence[int]],
    train_groups: Sequence[int],
    test_groups: Sequence[int],
    seed: int,
    split: Literal["validation", "test"] = "test",
) -> list[list[int]]:
    """Deal the test examples out so that each client is tested on the distribution it trains on.

    The test examples of each group are dealt in proportion to how many training examples of it each client holds, by
    largest remainder: a client is never more than one example away from its exact share of a group. Among equal
    remainders, and to keep whole test sets in proportion too, those go first who have been rounded down most so far.
    A group that nobody trains on is dealt in proportion to the clients' training examples of all groups.

    A client left without any then gets one, of the group it trains on most among those of which a client with more
    than one test example has any (from the client with the most test examples), and only if there is no such group,
    one of a group it does not train on.

    Returns one sorted list per client: disjoint, not empty, together all test examples, determined by the arguments.
    Raises DataError if there are fewer test examples (`split` says what they are called) than clients.
    """
    clients = len(train_parts)
    if len(test_groups) < clients:
        raise _too_few(len(test_groups), split, clients)
    rng = generator(seed, "partition-like")
    held = [Counter(train_groups[i] for i in part) for part in train_parts]
    sizes = np.array([len(part) for part in train_parts], dtype=np.int64)
    tests = np.asarray(test_groups, dtype=np.int64)
    parts: list[list[int]] = [[] for _ in range(clients)]
    owed = np.zeros(clients)
    for group in np.unique(tests).tolist():
        shuffled = rng.permutation(np.flatnonzero(tests == group))
        weights = np.array([counts[group] for counts in held], dtype=np.int64)
        counts = _largest_remainder(weights if weights.any() else sizes, len(shuffled), owed)
        for part, piece in zip(parts, np.split(shuffled, np.cumsum(counts)[:-1]), strict=True):
            part.extend(piece.tolist())
    return _nobody_untested([sorted(part) for part in parts], held, test_groups)


def _too_few(examples: int, split: Literal["train", "validation", "test"], clients: int) -> DataError:
    raised = {"train": "data.tasks.train and .test", "validation": "data.validation", "test": "data.tasks.test"}[split]
    of = "" if split == "train" else f"{split} "
    return DataError(f"{examples} {of}examples cannot be dealt to {clients} clients; lower federation.clients or raise {raised}")


def _shares(clients: int, alpha: float, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    return rng.dirichlet(np.full(clients, min(alpha, EVEN)))


def _cut(shuffled: Ints, shares: npt.NDArray[np.float64]) -> list[Ints]:
    """Cut in proportion to the shares, every boundary rounded to the nearest example."""
    cuts = np.rint(np.cumsum(shares)[:-1] * len(shuffled)).astype(np.int64)
    return np.split(shuffled, cuts)


def _deal_tasks(groups: Ints, clients: int, rng: np.random.Generator) -> list[Ints]:
    count = int(groups.max()) + 1
    parts: list[Ints] = [np.empty(0, dtype=np.int64)] * clients
    for group in range(count):
        holders = range(group, clients, count)
        shuffled = rng.permutation(np.flatnonzero(groups == group))
        if len(shuffled) < len(holders) or not holders:
            raise DataError(
                f"the {len(shuffled)} examples of task number {group} cannot be dealt to its {len(holders)} clients; "
                "set federation.clients so that each has one, or give the task more examples"
            )
        for holder, part in zip(holders, np.array_split(shuffled, len(holders)), strict=True):
            parts[holder] = part
    return parts


def _deal_dirichlet(groups: Ints, clients: int, alpha: float, rng: np.random.Generator) -> list[Ints]:
    pieces: list[list[Ints]] = []
    for group in np.unique(groups):
        shuffled = rng.permutation(np.flatnonzero(groups == group))
        pieces.append(_cut(shuffled, _shares(clients, alpha, rng)))
    return [np.concatenate(of_client) for of_client in zip(*pieces, strict=True)]


def _nobody_empty(parts: list[list[int]]) -> list[list[int]]:
    for part in parts:
        if not part:
            part.append(max(parts, key=len).pop())
    return parts


def _largest_remainder(weights: Ints, total: int, owed: npt.NDArray[np.float64]) -> Ints:
    """Whole numbers in proportion to `weights` that sum to `total`; `owed` (changed in place) is what rounding took."""
    counts, remainders = np.divmod(weights * total, weights.sum())
    fractions = remainders / weights.sum()
    order = np.lexsort((-np.round(fractions + owed, 9), remainders == 0))  # stable, the last key first
    counts[order[: total - counts.sum()]] += 1
    owed += weights * total / weights.sum() - counts
    return counts


def _nobody_untested(parts: list[list[int]], held: list[Counter[int]], groups: Sequence[int]) -> list[list[int]]:
    for client, part in enumerate(parts):
        if not part:
            part.append(_spare(parts, [group for group, _ in held[client].most_common()], groups))
    return parts


def _spare(parts: list[list[int]], wanted: list[int], groups: Sequence[int]) -> int:
    """Take away one example of the first wanted group that is to be had, or of any, from the client with the most."""
    donors = sorted((part for part in parts if len(part) > 1), key=len, reverse=True)
    for group in wanted:
        for part in donors:
            for index in reversed(part):
                if groups[index] == group:
                    part.remove(index)
                    return index
    return donors[0].pop()
