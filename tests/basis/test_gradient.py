"""The estimated first update against the exact SVD of the gradient, which has low rank here: few tokens."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsb.basis.frames import Basis
from fedsb.basis.gradient import Sketch, WholeSum, gradient_basis
from fedsb.basis.spectral import seeded
from fedsb.errors import BasisError
from tests.adapters.samples import llama, tokens
from tests.basis.samples import assert_nearly_equal, far_from_orthonormal, linear_layers
from tests.reference import farthest_angle, relative_distance, summed_gradient, truncated

BATCHES = [tokens(1, 3, seed=1), tokens(1, 3, seed=2)]  # three places each, so gradients of rank 6 at the most
RANK = 6


class Case:
    """A model with its layers and loss, and the gradient that the estimate is of."""

    def __init__(self) -> None:
        self.model = llama(head_dim=8)
        self.layers = linear_layers(self.model)
        self.exact = summed_gradient(self.layers, BATCHES, self.loss)

    def loss(self, ids: Tensor) -> Tensor:
        loss: Tensor = self.model(ids, labels=ids).loss
        return loss

    def basis(self, batches: Any = BATCHES, rank: int = RANK, **settings: Any) -> Basis:
        return gradient_basis(self.layers, batches, self.loss, rank, **({"seed": 0} | settings))

    def first_update(self, basis: Basis) -> dict[str, Tensor]:
        return {name: basis.B[name].double() @ basis.R0[name].double() @ basis.A[name].double() for name in basis.B}


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


def _rms(matrix: Tensor) -> float:
    return float(matrix.square().mean().sqrt())


@pytest.mark.parametrize("sign", [False, True])
@pytest.mark.parametrize("rank", [1, 4, 16])
def test_frames_are_orthonormal(case: Case, sign: bool, rank: int) -> None:
    assert far_from_orthonormal(case.basis(rank=rank, sign=sign)) < 1e-5


def test_frames_are_those_of_the_exact_gradient(case: Case) -> None:
    basis = case.basis()
    for name, matrix in case.exact.items():
        rank = int(torch.linalg.matrix_rank(matrix, rtol=1e-4))
        assert 2 <= rank <= RANK
        left, _, right = truncated(matrix, rank)
        assert farthest_angle(basis.B[name][:, :rank], left) < 5e-3
        assert farthest_angle(basis.A[name][:rank].T, right.T) < 5e-3


def test_frames_of_the_sign_variant_are_those_of_the_sign_of_the_sum(case: Case) -> None:
    basis = case.basis(sign=True, r0_scale=0.5)
    for name, matrix in case.exact.items():
        left, values, right = truncated(matrix.float().sign(), RANK)
        torch.testing.assert_close(basis.R0[name].diagonal().double(), 0.5 * values, atol=1e-3, rtol=5e-3)
        torch.testing.assert_close(
            -basis.B[name].double() @ basis.R0[name].double() @ basis.A[name].double(),
            0.5 * (left * values) @ right,
            atol=0.05 if values[-1] > 0 else 0,
            rtol=0,
        )


def test_the_first_update_is_minus_eta_times_the_gradient_at_root_mean_square_one(case: Case) -> None:
    basis = case.basis(r0_scale=0.01)
    wanted = {name: -0.01 * matrix / _rms(matrix) for name, matrix in case.exact.items()}
    assert relative_distance(wanted, case.first_update(basis)) < 1e-3


@pytest.mark.parametrize("sign", [False, True])
def test_r0_is_a_positive_diagonal_that_grows_with_eta(case: Case, sign: bool) -> None:
    none, one, two = (case.basis(rank=2, sign=sign, r0_scale=eta) for eta in (0.0, 0.01, 0.02))
    for name in none.R0:
        assert not none.R0[name].any()
        diagonal = one.R0[name].diagonal()
        assert torch.equal(one.R0[name], torch.diag(diagonal))
        assert (diagonal >= 0).all()
        assert (diagonal.diff() <= 0).all()
        assert diagonal[0] > 0
        torch.testing.assert_close(two.R0[name], 2 * one.R0[name], atol=0, rtol=1e-4)
    assert_nearly_equal(none, one)
    assert_nearly_equal(two, one)


@pytest.mark.parametrize("sign", [False, True])
def test_a_small_first_update_lowers_the_loss_as_its_slope_says(case: Case, sign: bool) -> None:
    update = case.first_update(case.basis(sign=sign, r0_scale=1e-5))
    before = sum(float(case.loss(ids).detach()) for ids in BATCHES)
    slope = sum(float((update[name] * case.exact[name]).sum()) for name in update)
    for name, layer in case.layers.items():
        layer.weight.data += update[name].float()
    after = sum(float(case.loss(ids).detach()) for ids in BATCHES)
    for name, layer in case.layers.items():
        layer.weight.data -= update[name].float()
    assert slope < 0
    assert 0.7 * slope > after - before > 1.3 * slope


def test_it_depends_on_its_seed_alone_and_leaves_the_global_random_state(case: Case) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = case.basis(rank=2, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert_nearly_equal(case.basis(rank=2, seed=3), first)


@pytest.mark.parametrize("sign", [False, True])
def test_no_trace_is_left_on_the_model(case: Case, sign: bool) -> None:
    weights = {name: p.detach().clone() for name, p in case.model.named_parameters()}
    case.basis(sign=sign)
    for name, p in case.model.named_parameters():
        assert not p.requires_grad
        assert p.grad is None
        assert torch.equal(p, weights[name])
        assert not p._post_accumulate_grad_hooks


def test_no_trace_is_left_when_a_batch_fails(case: Case) -> None:
    def broken() -> Iterator[Tensor]:
        yield BATCHES[0]
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        case.basis(broken())
    assert all(not p.requires_grad and p.grad is None for p in case.model.parameters())


def test_works_where_gradients_are_switched_off(case: Case) -> None:
    expected = case.basis(rank=2)
    with torch.no_grad():
        assert_nearly_equal(case.basis(rank=2), expected)


@pytest.mark.parametrize(("sign", "accumulator"), [(False, Sketch), (True, WholeSum)])
def test_one_layers_gradient_is_alive_at_a_time(
    case: Case, monkeypatch: pytest.MonkeyPatch, sign: bool, accumulator: type
) -> None:
    alive = []
    add = accumulator.add

    def counting(self: Any, matrix: Tensor) -> None:
        alive.append(sum(layer.weight.grad is not None for layer in case.layers.values()))
        add(self, matrix)

    monkeypatch.setattr(accumulator, "add", counting)
    case.basis(sign=sign)
    assert alive == [1] * (len(case.layers) * len(BATCHES))


def _sketch(*parts: Tensor) -> Sketch:
    sketch = Sketch((30, 20), 3, seeded(0, "s"), torch.device("cpu"))
    for part in parts:
        sketch.add(part)
    return sketch


def test_sketches_are_linear() -> None:
    draw = torch.Generator().manual_seed(0)
    one, two = torch.randn(30, 20, generator=draw), torch.randn(30, 20, generator=draw)
    both, apart, whole = _sketch(one, two), (_sketch(one), _sketch(two)), _sketch(one + two)
    for side in ("y", "z"):
        expected = getattr(whole, side)
        torch.testing.assert_close(getattr(both, side), expected, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(getattr(apart[0], side) + getattr(apart[1], side), expected, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(whole.y, (one + two) @ whole.omega, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(whole.z, whole.psi @ (one + two), atol=1e-4, rtol=1e-5)


def test_a_sketch_is_much_smaller_than_the_gradient() -> None:
    sketch = Sketch((1000, 800), 8, seeded(0), torch.device("cpu"))
    assert sketch.y.shape == (1000, 16)
    assert sketch.z.shape == (32, 800)


def test_the_gradient_is_the_sum_over_batches(case: Case) -> None:
    """Summed before the SVD: batches that cancel leave nothing of themselves."""
    parts = [case.basis([ids], r0_scale=1.0) for ids in BATCHES]
    both = case.basis(r0_scale=1.0)
    assert relative_distance(case.first_update(both), case.first_update(parts[0])) > 0.1
    again = case.basis(iter([*BATCHES, *BATCHES]), r0_scale=1.0)  # twice the sum has the same directions and rms 1
    assert relative_distance(case.first_update(both), case.first_update(again)) < 1e-3


def test_no_batches_are_refused(case: Case) -> None:
    with pytest.raises(BasisError, match=r"no examples; give \[basis.public\] some"):
        case.basis([])
    assert not any(p.requires_grad for p in case.model.parameters())


def test_a_rank_that_is_too_large_is_refused_before_any_work(case: Case) -> None:
    def never() -> Iterator[Tensor]:
        raise AssertionError("a batch was asked for")
        yield

    with pytest.raises(BasisError, match=r"adapter.rank = 17 .*k_proj, which is 16"):
        case.basis(never(), rank=17)


@pytest.mark.parametrize("sign", [False, True])
@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_refused(case: Case, factor: float, sign: bool) -> None:
    with pytest.raises(BasisError, match=r"layer .*: the estimated gradient is not finite; use dtype fp32"):
        gradient_basis(case.layers, BATCHES, lambda ids: case.loss(ids) * factor, 2, seed=0, sign=sign)
