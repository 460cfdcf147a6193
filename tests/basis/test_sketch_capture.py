"""Sketches taken in the backward pass against the gradient that they are of, which is never formed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fedsb.basis.sketch import SketchPlan, sketches
from fedsb.basis.spectral import seeded
from fedsb.errors import BasisError
from tests.adapters.samples import llama, tokens
from tests.basis.samples import linear_layers
from tests.basis.test_sketch import RANK, sketch_of
from tests.reference import summed_gradient


class Case:
    """A model with its layers, a batch of three, and the loss summed over them."""

    def __init__(self) -> None:
        self.model = llama(head_dim=8)
        self.layers = linear_layers(self.model)
        self.ids = tokens(3, 6, seed=1)
        self.plan = SketchPlan.of({name: tuple(layer.weight.shape) for name, layer in self.layers.items()}, RANK, 0, 2)  # type: ignore[misc]

    def loss(self, ids: Tensor) -> Tensor:
        losses: Tensor = sum(self.model(row[None], labels=row[None]).loss for row in ids)  # type: ignore[assignment]
        return losses

    def batched(self) -> Tensor:
        """The same by one forward pass: rows are of one length, so the mean over all tokens is that of the rows' means."""
        loss: Tensor = self.model(self.ids, labels=self.ids).loss * len(self.ids)
        return loss

    def exact(self, ids: Tensor) -> dict[str, Tensor]:
        return summed_gradient(self.layers, [ids], self.loss)

    def sketches(self, examples: int) -> Tensor:
        return sketches(self.plan, self.layers, self.batched, examples)


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


def test_one_sketch_of_all_is_that_of_the_summed_gradient(case: Case) -> None:
    found = case.sketches(1)
    assert found.shape == (1, case.plan.size) and found.dtype == torch.float32
    torch.testing.assert_close(found[0], sketch_of(case.plan, case.exact(case.ids)), atol=1e-6, rtol=1e-4)


def test_one_sketch_an_example_is_that_of_its_own_gradient(case: Case) -> None:
    found = case.sketches(3)
    assert found.shape == (3, case.plan.size)
    for row, ids in zip(found, case.ids, strict=True):
        exact = sketch_of(case.plan, case.exact(ids[None]))
        assert float((row - exact).norm() / exact.norm()) < 1e-6


def test_sketches_add_up(case: Case) -> None:
    torch.testing.assert_close(case.sketches(3).sum(0), case.sketches(1)[0], atol=1e-6, rtol=1e-5)


class Shapes(TorchDispatchMode):
    """Notes the shape of everything that is computed, but not of views of what was there before."""

    def __init__(self, before: list[Tensor]) -> None:
        super().__init__()
        self.before = {t.untyped_storage().data_ptr() for t in before}
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, tuple | list) else [result]:
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in self.before:
                self.seen.add(tuple(t.shape))
        return result


def test_no_gradient_matrix_is_ever_formed() -> None:
    model = llama(hidden_size=36, intermediate_size=52, num_attention_heads=4, num_key_value_heads=2, head_dim=10)
    layers, ids = linear_layers(model), tokens(2, 7)
    shapes: dict[str, tuple[int, int]] = {name: tuple(layer.weight.shape) for name, layer in layers.items()}  # type: ignore[misc]
    whole = {shape[::step] for shape in shapes.values() for step in (1, -1)}
    for examples in (1, 2):
        with Shapes(list(model.parameters())) as watch:
            sketches(SketchPlan.of(shapes, RANK, 0, 2), layers, lambda: model(ids, labels=ids).loss, examples)
        assert (examples, 36, 6) in watch.seen  # what a Y is added from
        assert not {shape[-2:] for shape in watch.seen} & whole
    with Shapes(list(model.parameters())) as watch:  # and it would be seen
        summed_gradient(layers, [ids], lambda part: model(part, labels=part).loss)
    assert {shape[-2:] for shape in watch.seen} >= set(shapes.values())


def test_no_trace_is_left_on_the_model(case: Case) -> None:
    weights = {name: p.detach().clone() for name, p in case.model.named_parameters()}
    case.sketches(3)

    def broken() -> Tensor:
        case.batched()
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        sketches(case.plan, case.layers, broken, 3)
    for name, p in case.model.named_parameters():
        assert not p.requires_grad and p.grad is None
        assert torch.equal(p, weights[name])
    assert not any(layer._forward_hooks for layer in case.layers.values())


def test_parameters_that_are_trained_get_no_gradient_from_it(case: Case) -> None:
    head = case.model.lm_head.weight.requires_grad_(True)
    try:
        expected = case.sketches(1)
        assert head.grad is None
    finally:
        head.requires_grad_(False)
    assert torch.equal(case.sketches(1), expected)


def test_works_where_gradients_are_switched_off(case: Case) -> None:
    expected = case.sketches(3)
    with torch.no_grad():
        assert torch.equal(case.sketches(3), expected)


def test_a_model_in_bf16_is_sketched_in_fp32(case: Case) -> None:
    model = llama(torch.bfloat16, head_dim=8)
    found = sketches(case.plan, linear_layers(model), lambda: model(case.ids, labels=case.ids).loss * 3, 3)
    assert found.dtype == torch.float32
    exact = case.sketches(3)
    assert float((found - exact).norm() / exact.norm()) < 0.1


@contextmanager
def _toy(forward: Callable[[nn.Linear, Tensor], Tensor]) -> Iterator[Callable[[int], tuple[Tensor, Tensor]]]:
    """A layer (5, 5) in a net of its own; gives the sketches and the exact gradient's sketch of a batch of four."""
    layer = nn.Linear(5, 5)
    layer.weight.data = torch.randn(5, 5, generator=seeded(1))
    layer.bias.data.zero_()
    layer.requires_grad_(False)
    plan, x = SketchPlan.of({"l": (5, 5)}, 2, 0, 1), torch.randn(4, 3, 5, generator=seeded(2))

    def loss() -> Tensor:
        return forward(layer, x).square().sum()

    def run(examples: int) -> tuple[Tensor, Tensor]:
        exact = summed_gradient({"l": layer}, [x], lambda part: forward(layer, part).square().sum())
        return sketches(plan, {"l": layer}, loss, examples), sketch_of(plan, exact)

    yield run


@pytest.mark.parametrize("examples", [1, 4])
def test_a_layer_that_is_used_twice_adds_both(examples: int) -> None:
    with _toy(lambda layer, x: layer(layer(x).tanh())) as run:
        found, exact = run(examples)
        torch.testing.assert_close(found.sum(0), exact, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("examples", [1, 4])
def test_a_layer_that_sees_one_vector_an_example(examples: int) -> None:
    with _toy(lambda layer, x: layer(x[:, 0])) as run:
        found, exact = run(examples)
        torch.testing.assert_close(found.sum(0), exact, atol=1e-4, rtol=1e-5)


def test_a_layer_that_sees_tokens_as_one_list_cannot_tell_examples_apart() -> None:
    with _toy(lambda layer, x: layer(x.reshape(-1, 5))) as run:
        torch.testing.assert_close(run(1)[0][0], run(1)[1], atol=1e-4, rtol=1e-5)
        with pytest.raises(BasisError, match="layer l sees the tokens of several examples as one list"):
            run(4)


def test_other_layers_than_planned_are_refused(case: Case) -> None:
    name, layer = next(iter(case.layers.items()))
    for layers in ({name: layer}, case.layers | {name: nn.Linear(3, 3)}, case.layers | {"x": layer}):
        with pytest.raises(BasisError, match=r"layer .* is not the same in sketch plan and model"):
            sketches(case.plan, layers, case.batched, 1)
