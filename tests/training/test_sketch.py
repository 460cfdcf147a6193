"""A client's sketch of its first gradient against naive gradients, row by row."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsb.adapters.attach import attach, initial_state, layout_of, shapes_of
from fedsb.adapters.state import HEAD, set_state
from fedsb.adapters.tuner import adapted_layers
from fedsb.basis.sketch import SketchPlan, sketched_basis
from fedsb.data.batches import Encoded
from fedsb.errors import PrivacyError
from fedsb.training.sketch import Sketcher
from tests.adapters.samples import RANK, bert, llama, run_config
from tests.reference import batch_loss, summed_gradient, truncated
from tests.training.samples import labelled, rows

KINDS = ["causal", "classification"]
HUGE = 1e9  # a bound that clips nothing


def sketcher(kind: str, **changes: Any) -> Sketcher:
    """Of a tiny attached model, before its first round."""
    config = run_config(model={"kind": kind})
    model = attach(bert(**changes) if kind == "classification" else llama(**changes), config)
    state = initial_state(layout_of(model), 1)
    set_state(
        model, {name: 20 * t if name.startswith(HEAD) else t for name, t in state.items()}
    )  # gradients that bounds can clip
    layers = {name: layer.get_base_layer() for name, layer in adapted_layers(model).items()}
    return Sketcher(SketchPlan.of(shapes_of(model), RANK, 0), layers, model.get_base_model(), kind, 0)  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=KINDS)
def one(request: pytest.FixtureRequest) -> Sketcher:
    return sketcher(request.param)


def _rows(one: Sketcher, count: int = 6, seed: int = 0) -> list[Encoded]:
    return labelled(count, seed=seed) if one.kind == "classification" else rows(count, seed=seed)


def _loss(one: Sketcher, part: Sequence[Encoded]) -> Tensor:
    """Σ over rows of their losses, from the model's own logits, without padding."""
    if one.kind == "causal":
        return batch_loss(one.model, part) * len(part)
    logits = [one.model(input_ids=torch.tensor([row.prompt])).logits[0] for row in part]
    return -torch.stack([line.log_softmax(-1)[row.label] for line, row in zip(logits, part, strict=True)]).sum()


def _exact(one: Sketcher, part: Sequence[Encoded]) -> dict[str, Tensor]:
    return summed_gradient(one.layers, [part], lambda rows: _loss(one, rows))


def _naive(one: Sketcher, part: Sequence[Encoded]) -> Tensor:
    """The sketch (size,) of the whole gradient, fp64."""
    found = []
    for name, gradient in _exact(one, part).items():
        omega, psi = (test.double() for test in one.plan.test_matrices(name))
        found += [(gradient @ omega).flatten(), (psi @ gradient).flatten()]
    return torch.cat(found)


def _apart(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("microbatch", [1, 4, 100])
def test_the_sum_is_the_sketch_of_the_summed_gradient(one: Sketcher, microbatch: int) -> None:
    drawn = _rows(one)
    found = one.summed(drawn, microbatch)
    assert found.shape == (one.plan.size,) and found.dtype == torch.float32
    assert _apart(found, _naive(one, drawn)) < 1e-5


def test_clients_sketches_add_up_to_that_of_all_their_rows(one: Sketcher) -> None:
    clients = [_rows(one, count, seed) for seed, count in enumerate((1, 5, 3))]
    pooled = [row for client in clients for row in client]
    assert _apart(torch.stack([one.summed(client) for client in clients]).sum(0), one.summed(pooled)) < 1e-6


@pytest.mark.parametrize("microbatch", [2, 3, 100])
def test_rows_in_a_microbatch_have_the_sketches_that_they_have_alone(one: Sketcher, microbatch: int) -> None:
    drawn = _rows(one)
    alone = {tuple(row.prompt): one.clipped([row], HUGE, 1).vector for row in drawn}
    assert len({len(row) for row in drawn}) > 2
    ordered = sorted(drawn, key=len)
    found = list(one._one_by_one(drawn, microbatch))
    assert len(found) == len(drawn)
    for row, sketch in zip(ordered, found, strict=True):
        assert _apart(sketch, alone[tuple(row.prompt)]) < 2e-6  # what padding changes in the model's own rounding
        assert _apart(sketch, _naive(one, [row])) < 1e-5


def test_each_row_is_clipped_over_all_layers_together(one: Sketcher) -> None:
    drawn = _rows(one)
    exact = [_naive(one, [row]) for row in drawn]
    norms = [float(sketch.norm()) for sketch in exact]
    bound = sorted(norms)[2]
    found = one.clipped(drawn, bound)
    assert found.bound == bound
    expected = sum(sketch * min(1.0, bound / norm) for sketch, norm in zip(exact, norms, strict=True))
    assert isinstance(expected, Tensor)
    assert _apart(found.vector, expected) < 1e-5
    assert _apart(found.vector, _naive(one, drawn)) > 0.1
    assert _apart(one.clipped(drawn, HUGE).vector, one.summed(drawn)) < 1e-6


@pytest.mark.parametrize("bound", [1e-3, 0.1])
def test_one_row_more_moves_the_sum_by_the_bound_at_the_most(one: Sketcher, bound: float) -> None:
    drawn = _rows(one)
    whole = one.clipped(drawn, bound).vector.double()
    for left_out in range(len(drawn)):
        rest = one.clipped(drawn[:left_out] + drawn[left_out + 1 :], bound).vector.double()
        assert bound * 0.9 < float((whole - rest).norm()) <= bound * (1 + 1e-5)


def test_no_rows_give_zeros(one: Sketcher) -> None:
    nothing = one.clipped([], 1.0)
    for vector in (nothing.vector, one.summed([])):
        assert torch.equal(vector, torch.zeros(one.plan.size))


def test_a_row_whose_gradient_is_not_finite_counts_as_zero_and_spoils_no_other() -> None:
    one = sketcher("causal")
    good = rows(3)
    bad = Encoded([60, 61], [5])
    assert not any(60 in row.prompt + row.completion for row in good)
    one.model.get_input_embeddings().weight.data[60] = float("nan")
    assert not one.summed([*good, bad]).isfinite().all()
    with_bad, without = one.clipped([*good, bad], 1.0, 4), one.clipped(good, 1.0, 4)
    assert _apart(with_bad.vector, without.vector) < 1e-6


def test_a_bound_that_is_none_is_refused_before_any_work() -> None:
    one = sketcher("causal")
    with pytest.raises(PrivacyError, match="a clip of 0 bounds nothing"):
        Sketcher(one.plan, one.layers, None, "causal", 0).clipped(rows(2), 0)


def test_the_model_is_left_as_it_was(one: Sketcher) -> None:
    before = {name: (p.requires_grad, p.detach().clone()) for name, p in one.model.named_parameters()}
    assert any(trained for trained, _ in before.values())
    one.clipped(_rows(one), 1.0)
    for name, p in one.model.named_parameters():
        assert p.requires_grad == before[name][0] and p.grad is None
        assert torch.equal(p, before[name][1])


def test_a_model_in_bf16(one: Sketcher) -> None:
    narrow = sketcher(one.kind, dtype=torch.bfloat16) if one.kind == "causal" else one
    found = narrow.clipped(_rows(one), HUGE).vector
    assert found.dtype == torch.float32
    assert _apart(found, one.summed(_rows(one))) < 0.1


@pytest.mark.parametrize("clipped", [False, True])
def test_the_basis_holds_most_of_what_any_can_hold_of_the_gradient(one: Sketcher, clipped: bool) -> None:
    drawn = _rows(one)
    sketch = one.clipped(drawn, HUGE).vector if clipped else one.summed(drawn)
    basis = sketched_basis(one.plan, sketch)
    held = best = 0.0
    for name, gradient in _exact(one, drawn).items():
        held += float((basis.B[name].double().T @ gradient @ basis.A[name].double().T).square().sum())
        best += float(truncated(gradient, RANK)[1].square().sum())
    assert held**0.5 > (0.8 if one.kind == "causal" else 0.93) * best**0.5  # a random Llama's gradients are nearly flat
