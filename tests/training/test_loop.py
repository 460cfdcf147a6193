import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel

from fedsb.adapters.attach import attach
from fedsb.adapters.state import get_state, parameters_of, set_state
from fedsb.adapters.tuner import adapted_layers, set_basis
from fedsb.basis.spectral import random_basis
from fedsb.data.batches import draw
from fedsb.training.loop import (
    BETAS,
    FINAL_SHARE,
    PERSONAL_SHARE,
    Plan,
    largest_update,
    learning_rate,
    personal_plan,
    round_plan,
    train,
)
from tests import reference
from tests.adapters.samples import adapted, bert, llama, run_config, same, snapshot
from tests.training.samples import labelled, rows


def _plan(**changes: Any) -> Plan:
    settings = {
        "first": 0,
        "count": 3,
        "total": 12,
        "batch_size": 5,
        "microbatch": 2,
        "learning_rate": 1e-2,
        "head_learning_rate": 5e-3,
        "warmup": 2,
        "decay": True,
    }
    return Plan(**(settings | changes))


def _train(model: PeftModel, plan: Plan, client: str = "a", seed: int = 0, **changes: Any) -> float:
    settings = {"kind": "causal", "pad_id": 0} | changes
    examples = labelled(8) if settings["kind"] == "classification" else rows(8)
    return train(model.get_base_model(), parameters_of(model), examples, plan, seed=seed, client=client, **settings)


def _trained(plan: Plan, model: PeftModel | None = None, **changes: Any) -> dict[str, torch.Tensor]:
    model = adapted(llama()) if model is None else model
    _train(model, plan, **changes)
    return get_state(model)


@pytest.mark.parametrize("first", [0, 3])
def test_training_is_adamw_on_the_mean_of_the_sequences_drawn(first: int) -> None:
    plan = _plan(first=first)
    model, naive = adapted(llama()), adapted(llama())
    before = snapshot(model)
    mean_loss = _train(model, plan)
    examples, losses, steps = rows(8), [], []
    for step in range(first, first + 3):
        steps.append(([examples[i] for i in draw(8, step, 5, 0, "a")], plan.learning_rate * plan.factor(step)))
    for count in range(3):
        fresh = adapted(llama())
        reference.train(fresh.get_base_model(), parameters_of(fresh), steps[:count])
        losses.append(reference.batch_loss(fresh.get_base_model(), steps[count][0]).item())
    reference.train(naive.get_base_model(), parameters_of(naive), steps)
    expected, start = get_state(naive), get_state(adapted(llama()))
    for name, core in get_state(model).items():
        torch.testing.assert_close(core, expected[name], atol=2e-4, rtol=0)
        assert (core - start[name]).abs().max() > 1e-3
    assert mean_loss == pytest.approx(sum(losses) / 3, rel=1e-4)
    assert all(torch.equal(p, before[name]) for name, p in snapshot(model).items())
    assert not model.get_base_model().training


@pytest.mark.parametrize("microbatch", [1, 2, 3, 5])
def test_microbatches_give_the_update_of_the_whole_batch(microbatch: int) -> None:
    whole = _trained(_plan(microbatch=99))
    for name, core in _trained(_plan(microbatch=microbatch)).items():
        torch.testing.assert_close(core, whole[name], atol=5e-5, rtol=0)


def test_the_same_call_gives_the_same_bits_whatever_went_before() -> None:
    plan = _plan(first=3)
    dropout: dict[str, Any] = {"attention_dropout": 0.3}
    torch.manual_seed(1)
    first = _trained(plan, adapted(llama(**dropout)))
    used = adapted(llama(**dropout))
    start = get_state(used)
    _train(used, _plan())
    torch.manual_seed(2)
    set_state(used, start)
    assert same(_trained(plan, used), first)
    assert not same(_trained(plan, adapted(llama())), first)  # dropout was on


def test_a_round_depends_on_step_seed_and_client() -> None:
    states = [
        _trained(_plan()),
        _trained(_plan(first=3)),
        _trained(_plan(), seed=1),
        _trained(_plan(), client="b"),
    ]
    assert not any(same(one, two) for i, one in enumerate(states) for two in states[:i])


def test_clients_with_dropout_do_not_share_their_masks() -> None:
    model = adapted(llama(attention_dropout=0.5))
    one_row = rows(1)
    found = []
    for client in ("a", "b"):
        set_state(model, get_state(adapted(llama())))
        train(
            model.get_base_model(),
            parameters_of(model),
            one_row,
            _plan(),
            kind="causal",
            pad_id=0,
            seed=0,
            client=client,
        )
        found.append(get_state(model))
    assert not same(*found)


def test_no_steps_change_nothing() -> None:
    model = adapted(llama())
    before = get_state(model)
    assert math.isnan(_train(model, _plan(count=0)))
    assert same(get_state(model), before)


def test_a_head_has_its_own_learning_rate() -> None:
    model = attach(bert(hidden_dropout_prob=0, attention_probs_dropout_prob=0), run_config(model={"kind": "classification"}))
    shapes = {name.removesuffix(".core"): p for name, p in parameters_of(model).items() if name.endswith(".core")}
    layers = {name: tuple(model.get_base_model().get_submodule(name).base_layer.weight.shape) for name in shapes}
    set_basis(model, random_basis(layers, 4, 0))
    before = get_state(model)
    plan = _plan(count=1, warmup=0, decay=False, learning_rate=1e-2, head_learning_rate=1e-4)
    _train(model, plan, kind="classification")
    moved = {name: float((t - before[name]).abs().max()) for name, t in get_state(model).items()}
    for name, most in moved.items():  # the first step of AdamW moves a number by its learning rate
        assert most == pytest.approx(1e-4 if name.startswith("head.") else 1e-2, rel=1e-2)


def test_training_lowers_the_loss() -> None:
    model = adapted(llama(), random=False)
    plan = _plan(count=40, total=40, batch_size=8, microbatch=8, learning_rate=0.05)
    first = reference.batch_loss(model.get_base_model(), rows(8)).item()
    _train(model, plan)
    assert reference.batch_loss(model.get_base_model(), rows(8)).item() < 0.7 * first


@pytest.mark.parametrize(
    ("warmup", "decay", "expected"),
    [
        (0, False, [1, 1, 1, 1, 1]),
        (0, True, [1, 0.82, 0.64, 0.46, 0.28]),
        (3, False, [0.25, 0.5, 0.75, 1, 1]),
        (1, True, [0.5, 0.82, 0.64, 0.46, 0.28]),
    ],
)
def test_the_schedule_warms_up_and_falls_to_a_tenth(warmup: int, decay: bool, expected: list[float]) -> None:
    plan = _plan(total=5, warmup=warmup, decay=decay)
    assert [plan.factor(step) for step in range(5)] == pytest.approx(expected)
    assert _plan(total=5, warmup=0, decay=True).factor(5) == pytest.approx(FINAL_SHARE)


def test_the_automatic_learning_rate_keeps_the_size_of_a_step() -> None:
    """Learning rate times rank is the same for every rank, and half of it with a basis from gradients."""
    assert learning_rate(run_config(adapter={"rank": 2})) == 0.04
    for rank in (16, 32, 64):
        assert learning_rate(run_config(adapter={"rank": rank})) * rank == pytest.approx(0.64)
        assert learning_rate(run_config(adapter={"rank": rank}, basis={"source": "weights"})) * rank == pytest.approx(0.64)
    public = {"source": "public", "public": {"name": "open", "source": "gym:chain_sum", "train": 4}}
    assert learning_rate(run_config(adapter={"rank": 32}, basis=public)) == pytest.approx(1e-2)
    assert learning_rate(run_config(train={"learning_rate": 0.3})) == 0.3


def test_the_plans_of_a_run_follow_one_another() -> None:
    config = run_config(
        train={"steps": 7, "batch_size": 3, "microbatch": 2, "learning_rate": 0.1, "warmup_steps": 4},
        federation={"rounds": 3},
        personal={"steps": 5},
    )
    plans = [round_plan(config, server_round) for server_round in (1, 2, 3)]
    assert [(p.first, p.count, p.total) for p in plans] == [(0, 7, 21), (7, 7, 21), (14, 7, 21)]
    assert all((p.batch_size, p.microbatch, p.learning_rate, p.warmup, p.decay) == (3, 2, 0.1, 4, True) for p in plans)
    own = personal_plan(config)
    assert (own.first, own.count) == (21, 5)
    assert own.learning_rate == pytest.approx(0.1 * PERSONAL_SHARE)
    assert [own.factor(step) for step in range(21, 26)] == [1.0] * 5
    given = personal_plan(run_config(personal={"learning_rate": 0.07}))
    assert given.learning_rate == 0.07
    assert not round_plan(run_config(train={"schedule": "constant"}), 1).decay


def _moved(gradients: Sequence[float], plan: Plan, dtype: torch.dtype = torch.float64) -> list[float]:
    """Where the plan's AdamW steps have moved a number from 0, after each."""
    number = torch.zeros(1, dtype=dtype, requires_grad=True)
    optimiser = torch.optim.AdamW([number], lr=plan.learning_rate, betas=BETAS, weight_decay=0.0)
    places = []
    for step, gradient in enumerate(gradients, plan.first):
        optimiser.param_groups[0]["lr"] = plan.learning_rate * plan.factor(step)
        number.grad = torch.full((1,), gradient, dtype=dtype)
        optimiser.step()
        places.append(number.item())
    return places


def _steady(count: int) -> Plan:
    return _plan(count=count, total=count, warmup=0, decay=False, learning_rate=1.0)


@pytest.mark.parametrize("count", [1, 2, 3, 20, 400])
def test_the_largest_step_is_that_of_growing_gradients(count: int) -> None:
    """The bound is attained, and beyond the 3.16 times the learning rate that are often named."""
    first, second = BETAS
    places = [0.0, *_moved([(second / first) ** t for t in range(count)], _steady(count))]
    largest = largest_update(_steady(count))[0] - largest_update(_steady(count - 1))[0]
    assert abs(places[-1] - places[-2]) == pytest.approx(largest, rel=1e-6)
    assert (largest > (1 - first) / math.sqrt(1 - second)) == (count == 400)


gradients = st.lists(
    st.floats(-(2.0**60), 2.0**60, width=32) | st.sampled_from([0.0, 1e-30, 1e-8, 1.0, -1.0, 1e30]), min_size=1, max_size=40
)


@given(gradients, st.integers(0, 30), st.integers(0, 5), st.booleans())
def test_no_gradients_move_a_number_further_than_the_bound(gradients: list[float], first: int, warmup: int, decay: bool) -> None:
    plan = _plan(first=first, count=len(gradients), total=70, warmup=warmup, decay=decay, learning_rate=0.3)
    assert abs(_moved(gradients, plan, torch.float32)[-1]) <= largest_update(plan)[0] * (1 + 1e-5)


@pytest.mark.parametrize("first", [0, 6])
def test_real_training_stays_within_the_bound_and_comes_near_it(first: int) -> None:
    """So the bound has the learning rates and steps of `train`."""
    plan = _plan(first=first, count=6, learning_rate=1e-2, head_learning_rate=1e-4)
    model = attach(bert(hidden_dropout_prob=0, attention_probs_dropout_prob=0), run_config(model={"kind": "classification"}))
    layers = {name: tuple(layer.base_layer.weight.shape) for name, layer in adapted_layers(model).items()}
    set_basis(model, random_basis(layers, 4, 0))
    before = get_state(model)
    _train(model, plan, kind="classification")
    core, head = largest_update(plan)
    for most, heads in ((core, False), (head, True)):
        names = [name for name in before if name.startswith("head.") == heads]
        moved = max(float((get_state(model)[name] - before[name]).abs().max()) for name in names)
        assert 0.7 * most < moved <= most * (1 + 1e-4)


def test_no_steps_move_nothing() -> None:
    assert largest_update(_plan(count=0)) == (0, 0)
