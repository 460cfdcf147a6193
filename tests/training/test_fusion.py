"""A mixture of states: what is trained, what it starts from and what is left of it."""

from typing import Any

import pytest
import torch

from fedsb.adapters.lora_sb import LoraSbLinear
from fedsb.adapters.state import get_state, parameters_of
from fedsb.data.batches import Encoded
from fedsb.errors import AdapterError
from fedsb.training.fusion import fuse, mixed
from fedsb.training.loop import Plan
from tests.adapters.samples import adapted, bert, llama, randomise, same, tokens

ROWS = [Encoded([3, 4, 5], [6 + i % 3, 9]) for i in range(8)]


def _pool(model: Any, count: int = 3) -> list[dict[str, torch.Tensor]]:
    found = []
    for seed in range(count):
        randomise(model, "default", seed)
        found.append({name: 0.1 * tensor for name, tensor in get_state(model).items()})
    return found


@pytest.mark.parametrize(("build", "task"), [(llama, "CAUSAL_LM"), (bert, "SEQ_CLS")])
def test_a_model_computes_with_the_mixture_and_keeps_it(build: Any, task: str) -> None:
    model = adapted(build(), task_type=task)
    pool = _pool(model)
    with mixed(model, pool, 1) as coefficients:
        assert coefficients.keys() == pool[0].keys() and {tuple(c.shape) for c in coefficients.values()} == {(3,)}
        at_start = model(tokens()).logits
        with torch.no_grad():
            for number, c in enumerate(coefficients.values()):
                c.copy_(torch.tensor([0.5, -1.0, 0.1 * number]))
        mixture = model(tokens()).logits
    expected = {name: 0.5 * pool[0][name] - pool[1][name] + 0.1 * i * pool[2][name] for i, name in enumerate(pool[0])}
    for name, tensor in get_state(model).items():
        torch.testing.assert_close(tensor, expected[name])
    torch.testing.assert_close(model(tokens()).logits, mixture)
    assert not any("parametrizations" in name for name, _ in model.named_modules())
    with torch.no_grad():
        for name, parameter in parameters_of(model).items():
            parameter.copy_(pool[1][name])
    torch.testing.assert_close(model(tokens()).logits, at_start)


def test_training_moves_the_coefficients_alone_and_lowers_the_loss() -> None:
    model = adapted(llama())
    pool, frozen = _pool(model), {name: p.clone() for name, p in model.named_parameters() if "fedsb_core" not in name}
    plan = Plan(0, 12, 12, 8, 4, 0.05, 1.0, 0, False)
    told = {"kind": "causal", "pad_id": 0, "seed": 0, "client": "new"}
    losses = []
    for count in (1, 12):
        short = Plan(0, count, 12, 8, 4, 0.05, 1.0, 0, False)
        state, coefficients = fuse(model, model.get_base_model(), pool, 2, ROWS, short, **told)  # type: ignore[arg-type]
        losses.append(
            float(model(torch.tensor([[3, 4, 5, 6, 9]]), labels=torch.tensor([[-100, -100, -100, 6, 9]])).loss.detach())
        )
    assert losses[1] < losses[0]
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, torch.tensordot(coefficients[name], torch.stack([s[name] for s in pool]), 1))
        assert (coefficients[name] - torch.tensor([0.0, 0.0, 1.0])).abs().max() <= plan.learning_rate * 12 * 1.2
    assert all(torch.equal(frozen[name], p) for name, p in model.named_parameters() if name in frozen)
    again, _ = fuse(model, model.get_base_model(), pool, 2, ROWS, plan, **told)  # type: ignore[arg-type]
    assert same(again, state)


def test_the_mixture_of_cores_is_the_sum_of_their_updates() -> None:
    """LoRAFusion's sum on one basis: Σ c_i·B·R_i·A is the update of the core Σ c_i·R_i."""
    model = adapted(llama())
    pool, updates = _pool(model), []
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoraSbLinear)}
    for state in pool:
        with torch.no_grad():
            for name, parameter in parameters_of(model).items():
                parameter.copy_(state[name])
        updates.append({name: layer.get_delta_weight("default").detach() for name, layer in layers.items()})
    with mixed(model, pool, 0) as coefficients, torch.no_grad():
        for c in coefficients.values():
            c.copy_(torch.tensor([0.2, 0.3, -0.7]))
    for name, layer in layers.items():
        expected = 0.2 * updates[0][name] + 0.3 * updates[1][name] - 0.7 * updates[2][name]
        torch.testing.assert_close(layer.get_delta_weight("default").detach(), expected, atol=1e-5, rtol=1e-4)


def test_states_of_another_shape_are_refused_before_anything_changes() -> None:
    model = adapted(llama())
    pool = _pool(model)
    before = get_state(model)
    name = next(iter(pool[2]))
    for bad in (pool[2] | {name: torch.zeros(3, 3)}, {n: t for n, t in pool[2].items() if n != name}):
        with (
            pytest.raises(AdapterError, match="is not in all adapters of the pool, or of another shape"),
            mixed(model, [*pool[:2], bad], 0),
        ):
            pass
    assert same(get_state(model), before) and not any("parametrizations" in name for name, _ in model.named_modules())
