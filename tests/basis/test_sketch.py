"""What a sketch consists of, and the basis from it against the exact SVD; how it is taken: test_sketch_capture."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedsb.adapters.state import Layout
from fedsb.basis.frames import Basis
from fedsb.basis.sketch import SketchPlan, sketched_basis
from fedsb.basis.spectral import seeded
from fedsb.errors import BasisError
from tests.basis.samples import SHAPES, decaying, far_from_orthonormal, with_spectrum
from tests.reference import farthest_angle, truncated

RANK = 4
PLAN = SketchPlan.of(SHAPES, RANK, 0, 3)
MATRICES = {name: with_spectrum(*shape, decaying(16), seed) for seed, (name, shape) in enumerate(SHAPES.items())}


def sketch_of(plan: SketchPlan, matrices: dict[str, Tensor]) -> Tensor:
    """The sketch (size,) of known matrices, in fp64 up to the last step."""
    parts = []
    for name, matrix in matrices.items():
        omega, psi = (test.double() for test in plan.test_matrices(name))
        parts += [(matrix.double() @ omega).flatten(), (psi @ matrix.double()).flatten()]
    return torch.cat(parts).float()


def _held(basis: Basis, name: str, matrix: Tensor) -> float:
    """‖Bᵀ·G·Aᵀ‖_F."""
    return float(torch.linalg.matrix_norm(basis.B[name].double().T @ matrix.double() @ basis.A[name].double().T))


def _best(matrix: Tensor, rank: int) -> float:
    """The most that any frames of this rank can hold."""
    return float(truncated(matrix, rank)[1].square().sum().sqrt())


# what a sketch consists of


def test_a_plan_lays_out_its_sketch_as_a_state_is_laid_out() -> None:
    layout = Layout(PLAN.tensors)
    assert layout.shapes == (
        ("wide.Y", (16, 7)),
        ("wide.Z", (7, 40)),
        ("tall.Y", (40, 7)),
        ("tall.Z", (7, 16)),
        ("square.Y", (24, 7)),
        ("square.Z", (7, 24)),
    )
    flat = torch.arange(float(PLAN.size))
    assert layout.size == PLAN.size == 7 * (56 + 56 + 48)
    state = layout.unflatten(flat)
    for name, (y, z) in PLAN.split(flat).items():
        assert torch.equal(y, state[f"{name}.Y"])
        assert torch.equal(z, state[f"{name}.Z"])
    assert torch.equal(layout.flatten(state), flat)


def test_several_sketches_are_split_at_once() -> None:
    flat = torch.randn(3, PLAN.size, generator=seeded(0))
    for name, (y, z) in PLAN.split(flat).items():
        assert y.shape[:1] == z.shape[:1] == (3,)
        assert torch.equal(y[1], PLAN.split(flat[1])[name][0])
        assert torch.equal(z[2], PLAN.split(flat[2])[name][1])


def test_a_sketch_is_no_wider_than_its_layer() -> None:
    plan = SketchPlan.of(SHAPES, 14, 0, 8)
    assert [plan.width(shape) for shape in SHAPES.values()] == [16, 16, 22]


def test_a_sketch_is_much_smaller_than_the_gradient() -> None:
    assert SketchPlan.of({"l": (4096, 4096)}, 64, 0).size < 4096 * 4096 / 28


def test_a_rank_that_is_too_large_is_refused() -> None:
    with pytest.raises(BasisError, match=r"adapter.rank = 17 .* layer wide, which is 16"):
        SketchPlan.of(SHAPES, 17, 0)


def test_a_sketch_narrower_than_the_rank_is_refused() -> None:
    with pytest.raises(BasisError, match="an oversampling of -1 leaves a sketch narrower than the rank"):
        SketchPlan.of(SHAPES, RANK, 0, -1)


@pytest.mark.parametrize("size", [0, 1, PLAN.size - 1, PLAN.size + 1])
def test_a_sketch_of_another_size_is_refused(size: int) -> None:
    for take in (PLAN.split, lambda flat: sketched_basis(PLAN, flat)):
        with pytest.raises(BasisError, match=rf"a sketch of {PLAN.size} numbers was expected and \({size},\) came"):
            take(torch.zeros(size))


def test_test_matrices_follow_from_seed_and_layer_alone() -> None:
    state = torch.get_rng_state()
    omega, psi = PLAN.test_matrices("square")
    assert torch.equal(torch.get_rng_state(), state)
    assert omega.shape == (24, 7) and psi.shape == (7, 24)
    again = SketchPlan.of({"other": (30, 30), "square": SHAPES["square"]}, RANK, 0, 3).test_matrices("square")
    assert torch.equal(omega, again[0]) and torch.equal(psi, again[1])
    different = [omega, psi.T, *SketchPlan.of(SHAPES, RANK, 1, 3).test_matrices("square")[:1]]
    different.append(SketchPlan.of({"x": (24, 24)}, RANK, 0, 3).test_matrices("x")[0])
    assert len({float(m[0, 0]) for m in different}) == 4


@pytest.mark.parametrize("oversampling", [0, 8, 60])
def test_a_sketch_is_about_as_long_as_the_gradient(oversampling: int) -> None:
    shapes = {f"l{i}": (200, 120) for i in range(6)}
    matrices = {name: with_spectrum(200, 120, decaying(20, 0.9), seed) for seed, name in enumerate(shapes)}
    sketch = sketch_of(SketchPlan.of(shapes, 32, 0, oversampling), matrices)
    exact = sum(float(m.square().sum()) for m in matrices.values()) ** 0.5
    assert float(sketch.norm()) == pytest.approx(exact, rel=0.15)


# the basis from it


@settings(deadline=None, max_examples=25, database=None)
@given(st.integers(1, 6), st.integers(20, 40), st.integers(14, 40), st.integers(0, 100))
def test_a_gradient_of_low_rank_is_held_whole(rank: int, out: int, width: int, seed: int) -> None:
    matrix = with_spectrum(out, width, decaying(rank, 0.8), seed)
    plan = SketchPlan.of({"l": (out, width)}, 6, seed, 2)
    basis = sketched_basis(plan, sketch_of(plan, {"l": matrix}))
    b, a = basis.B["l"].double(), basis.A["l"].double()
    torch.testing.assert_close(b @ (b.T @ matrix.double() @ a.T) @ a, matrix.double(), atol=1e-5, rtol=0)
    assert far_from_orthonormal(basis) < 1e-6
    assert basis.B["l"].dtype == basis.A["l"].dtype == torch.float32
    assert not basis.R0["l"].any()


@settings(deadline=None, max_examples=20, database=None)
@given(st.sampled_from([(0.5, 0.999), (0.7, 0.98), (0.85, 0.8)]), st.integers(0, 50))
def test_of_a_decaying_spectrum_nearly_as_much_is_held_as_can_be(decay: tuple[float, float], seed: int) -> None:
    base, share = decay
    matrix = with_spectrum(60, 50, decaying(50, base), seed)
    plan = SketchPlan.of({"l": (60, 50)}, 8, seed)
    assert _held(sketched_basis(plan, sketch_of(plan, {"l": matrix})), "l", matrix) > share * _best(matrix, 8)


def test_more_columns_hold_more() -> None:
    matrix = with_spectrum(120, 100, torch.arange(1, 101).double() ** -0.5)
    held = []
    for oversampling in (0, 8, 32, 92):
        plan = SketchPlan.of({"l": (120, 100)}, 8, 0, oversampling)
        held.append(_held(sketched_basis(plan, sketch_of(plan, {"l": matrix})), "l", matrix))
    assert held == sorted(held)
    assert held[0] > 3 * float(matrix.norm()) * 8 / 110  # a random basis holds r/√(out·in)


def test_the_leading_directions_are_those_of_the_exact_svd() -> None:
    plan = SketchPlan.of({"l": (60, 50)}, 4, 0)
    matrix = with_spectrum(60, 50, decaying(50, 0.5))
    basis = sketched_basis(plan, sketch_of(plan, {"l": matrix}))
    left, _, right = truncated(matrix, 2)
    assert farthest_angle(basis.B["l"], left) < 0.1  # of the space, not of a vector
    assert farthest_angle(basis.A["l"].T, right.T) < 0.1


def test_clients_sketches_add_up_to_that_of_their_sum() -> None:
    clients = [{n: with_spectrum(*shape, decaying(16), seed) for n, shape in SHAPES.items()} for seed in range(4)]
    pooled = {name: torch.stack([c[name] for c in clients]).sum(0) for name in SHAPES}
    summed = torch.stack([sketch_of(PLAN, c) for c in clients]).sum(0)
    torch.testing.assert_close(summed, sketch_of(PLAN, pooled), atol=1e-5, rtol=1e-5)
    one, other = sketched_basis(PLAN, summed), sketched_basis(PLAN, sketch_of(PLAN, pooled))
    for name in SHAPES:
        assert farthest_angle(one.B[name], other.B[name]) < 1e-3
        assert farthest_angle(one.A[name].T, other.A[name].T) < 1e-3


def test_signs_and_scale_of_the_sketch_do_not_matter() -> None:
    """Up to fp32's own range; the largest entry of each column of B and each row of A is positive."""
    flat = sketch_of(PLAN, MATRICES)
    basis = sketched_basis(PLAN, flat)
    for factor in (-1.0, 1e-25, 1e30):
        other = sketched_basis(PLAN, flat * factor)
        for name in SHAPES:
            torch.testing.assert_close(basis.B[name], other.B[name], atol=1e-5, rtol=0)
            torch.testing.assert_close(basis.A[name], other.A[name], atol=1e-5, rtol=0)
    for name in SHAPES:
        for vectors in (basis.B[name].T, basis.A[name]):
            assert (vectors.gather(1, vectors.abs().argmax(1, keepdim=True)) > 0).all()


def test_a_little_noise_costs_a_little_and_pure_noise_leaves_a_random_basis() -> None:
    flat = sketch_of(PLAN, MATRICES)
    noise = torch.randn(PLAN.size, generator=seeded(3))
    exact = sketched_basis(PLAN, flat)
    shares = []
    for std in (0.0, 0.003, 0.03, 0.3, 1e6):
        basis = sketched_basis(PLAN, flat + std * noise)
        assert far_from_orthonormal(basis) < 1e-6
        shares.append(sum(_held(basis, n, MATRICES[n]) / _held(exact, n, MATRICES[n]) for n in SHAPES) / len(SHAPES))
    assert shares == sorted(shares, reverse=True)
    assert shares[1] > 0.99
    assert shares[2] > 0.8
    assert shares[4] < 0.4  # r/√(out·in) is 0.16


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_rank_deficient_sketch_is_filled_up(rank: int) -> None:
    values = decaying(16) * (torch.arange(16) < rank)
    matrices = {name: with_spectrum(*shape, values) for name, shape in SHAPES.items()}
    for jitter in (0.0, 1e-12):
        flat = sketch_of(PLAN, matrices) + jitter * torch.randn(PLAN.size, generator=seeded(4))
        basis = sketched_basis(PLAN, flat)
        assert far_from_orthonormal(basis) < 1e-6
        for name, matrix in matrices.items():
            assert _held(basis, name, matrix) == pytest.approx(float(matrix.double().norm()), abs=1e-6)


def test_a_bf16_basis_is_rounded_as_any_other() -> None:
    assert far_from_orthonormal(sketched_basis(PLAN, sketch_of(PLAN, MATRICES)).to(torch.bfloat16)) < 1e-2


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
@pytest.mark.parametrize(("place", "layer"), [(0, "wide"), (PLAN.size - 1, "square")])
def test_a_sketch_that_is_not_finite_is_refused(odd: float, place: int, layer: str) -> None:
    flat = sketch_of(PLAN, MATRICES)
    flat[place] = odd
    with pytest.raises(BasisError, match=f"layer {layer}: the summed sketch of the gradient is not finite"):
        sketched_basis(PLAN, flat)
