from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedsb.basis.frames import Basis
from fedsb.basis.spectral import (
    check_rank,
    frames_from_sketches,
    leading_frames,
    random_basis,
    random_orthonormal,
    seeded,
    weights_basis,
)
from fedsb.errors import BasisError
from tests.basis.samples import (
    SHAPES,
    assert_nearly_equal,
    decaying,
    far_from_orthonormal,
    linear_layers,
    with_spectrum,
)
from tests.reference import farthest_angle, truncated


def _global_random_state_is_untouched(build: Callable[[], Basis]) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = build()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert_nearly_equal(build(), first)


@pytest.mark.parametrize("rank", [1, 3, 16])
def test_random_frames_are_orthonormal(rank: int) -> None:
    assert far_from_orthonormal(random_basis(SHAPES, rank, 0)) < 1e-6


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_frames_of_the_weights_are_orthonormal(rank: int) -> None:
    assert far_from_orthonormal(weights_basis(linear_layers(), rank, 0)) < 1e-5


def test_a_random_basis_depends_on_its_seed_alone() -> None:
    _global_random_state_is_untouched(lambda: random_basis(SHAPES, 3, 7))
    basis = random_basis(SHAPES, 3, 7)
    assert random_basis(dict(reversed(SHAPES.items())), 3, 7).fingerprint == basis.fingerprint
    assert random_basis(SHAPES, 3, 8).fingerprint != basis.fingerprint
    alone = random_basis({"tall": SHAPES["tall"]}, 3, 7)
    assert torch.equal(alone.B["tall"], basis.B["tall"])
    assert torch.equal(alone.A["tall"], basis.A["tall"])
    assert not any(r0.any() for r0 in basis.R0.values())


def test_layers_and_sides_have_frames_of_their_own() -> None:
    basis = random_basis({"one": (24, 24), "two": (24, 24)}, 3, 0)
    frames = [basis.B["one"], basis.B["two"], basis.A["one"].T, basis.A["two"].T]
    for i, one in enumerate(frames):
        for two in frames[:i]:
            assert farthest_angle(one, two) > 0.5


def test_a_random_basis_stays_the_same_from_release_to_release() -> None:
    """Adapters saved without their basis depend on it; on another LAPACK a difference would be in the last bits."""
    b = random_orthonormal(4, 2, seeded(0, "basis", "layer", "B"))
    expected = torch.tensor([[-0.240162, -0.219201], [-0.077754, -0.919912], [-0.646735, -0.136437], [-0.719730, 0.295124]])
    torch.testing.assert_close(b, expected, atol=1e-5, rtol=0)


def test_random_frames_are_uniform_and_not_biased_by_the_factorisation() -> None:
    frames = torch.stack([random_orthonormal(3, 2, seeded(seed)) for seed in range(600)])
    assert frames.mean(0).abs().max() < 0.1  # LAPACK's own signs would make the diagonal negative
    torch.testing.assert_close(frames.square().mean(0), torch.full((3, 2), 1 / 3), atol=0.06, rtol=0)


def test_seeds_are_told_apart_by_role() -> None:
    draws = [torch.rand(1, generator=g) for g in (seeded(0, "a"), seeded(1, "a"), seeded(0, "b"), seeded(0, "a", ""), seeded(0))]
    assert len({float(d) for d in draws}) == 5
    assert float(torch.rand(1, generator=seeded(0, "a"))) == float(draws[0])


@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (40, 40)])
def test_leading_frames_are_those_of_the_exact_svd(shape: tuple[int, int]) -> None:
    matrix = with_spectrum(*shape, decaying(40, 0.85))
    b, s, a = leading_frames(matrix, 6, seeded(0))
    left, values, right = truncated(matrix, 6)
    assert b.dtype == s.dtype == a.dtype == torch.float32
    torch.testing.assert_close(s.double(), values, atol=1e-5, rtol=1e-4)
    assert farthest_angle(b, left) < 1e-3
    assert farthest_angle(a.T, right.T) < 1e-3
    torch.testing.assert_close((b * s) @ a, ((left * values) @ right).float(), atol=1e-4, rtol=0)


def test_leading_frames_of_a_flat_spectrum_hold_nearly_as_much() -> None:
    """A random matrix has no gap to converge on, but what the frames hold must come close to the best possible."""
    matrix = torch.randn(200, 100, generator=seeded(1))
    b, _, a = leading_frames(matrix, 8, seeded(0))
    held = torch.linalg.matrix_norm(b.T @ matrix @ a.T)
    assert held > 0.97 * truncated(matrix, 8)[1].square().sum().sqrt()


def test_the_weights_basis_spans_what_the_exact_svd_of_w0_spans() -> None:
    layers = {}
    for seed, (name, shape) in enumerate(SHAPES.items()):
        layers[name] = nn.Linear(shape[1], shape[0], bias=False).requires_grad_(False)
        layers[name].weight.copy_(with_spectrum(*shape, decaying(min(shape)), seed))
    basis = weights_basis(layers, 5, 0)
    for name, layer in layers.items():
        left, _, right = truncated(layer.weight, 5)
        assert farthest_angle(basis.B[name], left) < 1e-3
        assert farthest_angle(basis.A[name].T, right.T) < 1e-3
    assert not any(r0.any() for r0 in basis.R0.values())
    _global_random_state_is_untouched(lambda: weights_basis(layers, 5, 0))


def test_bf16_weights_have_an_fp32_basis() -> None:
    layer = nn.Linear(16, 24, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    layer.weight.copy_(with_spectrum(24, 16, decaying(16)))
    basis = weights_basis({"l": layer}, 4, 0)
    assert basis.B["l"].dtype == torch.float32
    assert farthest_angle(basis.B["l"], truncated(layer.weight, 4)[0]) < 1e-3


def _sketched(matrix: torch.Tensor, k: int, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    omega = torch.randn(matrix.shape[1], k, generator=seeded(0, "o"))
    psi = torch.randn(size, matrix.shape[0], generator=seeded(0, "p"))
    return matrix @ omega, psi @ matrix, psi


@settings(deadline=None, max_examples=25, database=None)
@given(st.integers(1, 6), st.integers(20, 40), st.integers(14, 40), st.integers(0, 100))
def test_sketches_recover_a_matrix_of_low_rank(rank: int, out: int, width: int, seed: int) -> None:
    matrix = with_spectrum(out, width, decaying(rank, 0.8), seed)
    b, s, a = frames_from_sketches(*_sketched(matrix, rank + 4, 2 * rank + 8), rank)
    torch.testing.assert_close((b * s) @ a, matrix, atol=1e-5, rtol=0)
    torch.testing.assert_close(s.double(), truncated(matrix, rank)[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(b.T @ b, torch.eye(rank), atol=1e-5, rtol=0)
    torch.testing.assert_close(a @ a.T, torch.eye(rank), atol=1e-5, rtol=0)


def test_sketches_of_a_decaying_matrix_find_its_leading_part() -> None:
    matrix = with_spectrum(60, 50, decaying(50, 0.5))
    b, s, a = frames_from_sketches(*_sketched(matrix, 12, 24), 4)
    left, values, right = truncated(matrix, 4)
    torch.testing.assert_close(s.double(), values, atol=1e-3, rtol=0.01)
    assert farthest_angle(b, left) < 0.05
    assert farthest_angle(a.T, right.T) < 0.05


def test_a_rank_that_is_too_large_names_the_smallest_layer() -> None:
    check_rank(SHAPES, 16)
    for build in (lambda: check_rank(SHAPES, 17), lambda: random_basis(SHAPES, 17, 0)):
        with pytest.raises(BasisError, match=r"adapter.rank = 17 .* layer wide, which is 16; lower the rank to 16"):
            build()
    with pytest.raises(BasisError, match=r"adapter.rank = 17 .*k_proj, which is 16"):
        weights_basis(linear_layers(), 17, 0)
