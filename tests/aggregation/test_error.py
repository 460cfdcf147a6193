import pytest
import torch
from torch import Tensor

from fedsb.adapters.lora_sb import LORA_SB
from fedsb.adapters.state import Layout
from fedsb.aggregation.error import AggregationError
from fedsb.aggregation.mean import Mean
from fedsb.basis.frames import Basis
from fedsb.basis.spectral import random_basis, seeded
from tests.reference import mean_update, relative_distance

RANK = 8
SHAPES = {f"layer {i}": (40 + 8 * i, 64 - 8 * i) for i in range(6)}
WEIGHTS = [5, 1, 30, 12]


def _states(count: int = 4, offset: float = 0.0) -> list[dict[str, Tensor]]:
    found = []
    for client in range(count):
        draw = torch.Generator().manual_seed(client)
        found.append({f"{name}.core": torch.randn(RANK, RANK, generator=draw) + offset for name in SHAPES})
    return found


def _basis() -> Basis:
    return random_basis(SHAPES, RANK, 0)


def _mean_of(states: list[dict[str, Tensor]], weights: list[int]) -> dict[str, Tensor]:
    layout = Layout.of(states[0])
    mean = Mean(layout.size)
    for state, weight in zip(states, weights, strict=True):
        mean.add(layout.flatten(state), weight)
    return layout.unflatten(mean.result())


def _measured(aggregate: dict[str, Tensor], seed: int = 0) -> float:
    error = AggregationError(LORA_SB, _basis(), SHAPES, 1.0, seeded(seed, "probe"))
    for state, weight in zip(_states(), WEIGHTS, strict=True):
        error.add(state, weight)
    return error.result(aggregate)


def _exact(aggregate: dict[str, Tensor]) -> float:
    basis = _basis()
    return relative_distance(mean_update(basis, _states(), WEIGHTS), mean_update(basis, [aggregate], [1]))


def test_the_true_mean_has_only_the_error_of_rounding() -> None:
    found = _measured(_mean_of(_states(), WEIGHTS))
    assert 0 < found < 1e-7
    exact = {
        name: sum(w * s[name].double() for s, w in zip(_states(), WEIGHTS, strict=True)) / sum(WEIGHTS) for name in _states()[0]
    }
    assert _measured(exact) < 1e-14


def _wrong(name: str) -> dict[str, Tensor]:
    states, true = _states(), _mean_of(_states(), WEIGHTS)
    return {
        "unweighted": _mean_of(states, [1, 1, 1, 1]),
        "one client forgotten": _mean_of(states[:3], WEIGHTS[:3]),
        "one client alone": states[2],
        "a tenth too large": {key: 1.1 * core for key, core in true.items()},
        "transposed": {key: core.T for key, core in true.items()},
        "one layer lost": {key: core * (i > 0) for i, (key, core) in enumerate(true.items())},
        "one number off": {key: core + 0.01 * (torch.arange(64).view(8, 8) == 9) for key, core in true.items()},
    }[name]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "name",
    [
        "unweighted",
        "one client forgotten",
        "one client alone",
        "a tenth too large",
        "transposed",
        "one layer lost",
        "one number off",
    ],
)
def test_a_wrong_aggregate_is_told_by_its_size(name: str, seed: int) -> None:
    exact = _exact(_wrong(name))
    assert exact > 1e-3
    several = sum(_measured(_wrong(name), 10 * seed + i) for i in range(5)) / 5
    assert several == pytest.approx(exact, rel=0.3)


def test_a_single_measurement_is_of_the_right_order() -> None:
    exact = _exact(_wrong("unweighted"))
    assert all(0.6 * exact < _measured(_wrong("unweighted"), seed) < 1.6 * exact for seed in range(20))


def test_a_new_round_starts_from_nothing() -> None:
    """The trap of the list that is never cleared: an old round must not count into the next."""
    error = AggregationError(LORA_SB, _basis(), SHAPES, 1.0, seeded(0))
    for state in _states(offset=3.0):
        error.add(state, 7)
    error.start()
    for state, weight in zip(_states(), WEIGHTS, strict=True):
        error.add(state, weight)
    assert error.result(_mean_of(_states(), WEIGHTS)) < 1e-7


def test_updates_that_are_all_zero() -> None:
    zero = {name: torch.zeros_like(core) for name, core in _states()[0].items()}
    error = AggregationError(LORA_SB, _basis(), SHAPES, 1.0, seeded(0))
    error.add(zero, 1)
    assert error.result(zero) == 0


def test_a_bf16_basis_and_a_head_beside_the_cores() -> None:
    error = AggregationError(LORA_SB, _basis().to(torch.bfloat16), SHAPES, 1.0, seeded(0))
    for state, weight in zip(_states(), WEIGHTS, strict=True):
        error.add(state | {"head.score.weight": torch.ones(2, 2)}, weight)
    assert error.result(_mean_of(_states(), WEIGHTS)) < 1e-7
