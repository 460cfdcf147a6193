"""DyLoRA against the truncated product, formed as a matrix; what a step moves and what it leaves."""

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from fedsb.adapters.dylora import at_rank, drawn_rank
from fedsb.adapters.methods import METHODS
from fedsb.adapters.state import get_state, layers_of, parameters_of, set_state
from fedsb.data.batches import collate
from fedsb.privacy.mechanism import Mechanism
from fedsb.privacy.noise import KeyStream
from fedsb.training.loop import largest_update, train
from fedsb.training.loss import causal_loss
from fedsb.training.private import add_clipped, gradients_of_records, train_private
from tests.adapters.samples import llama, randomise, run_config, same, tokens
from tests.training.samples import rows
from tests.training.test_loop import _plan

R, ALPHA = 5, 3
EVERY_RANK = pytest.mark.parametrize("rank", range(1, R + 1))


def dylora(model: Any = None) -> PeftModel:
    """A LoRA of rank 5 with random A and B."""
    config = LoraConfig(r=R, lora_alpha=ALPHA, target_modules="all-linear")
    peft_model = get_peft_model(model or llama(), config).eval()
    randomise(peft_model, "default", 1)
    return peft_model


def truncated(state: dict[str, Tensor], layer: str, rank: int) -> Tensor:
    """(α/b)·B[:, :b]·A[:b], one rank after the other, fp64."""
    a, b = state[f"{layer}.A"].double(), state[f"{layer}.B"].double()
    return ALPHA / rank * sum((torch.outer(b[:, k], a[k]) for k in range(rank)), torch.zeros(len(b), a.shape[1]).double())


def cut(rank: int) -> nn.Module:
    """The plain model with the truncated updates in its weights, and differentiable factors in place of none."""
    model, state = llama(), get_state(dylora())
    for name in layers_of(dylora()):
        weight = model.get_submodule(name).weight
        weight.data = (weight.double() + truncated(state, name, rank)).float()
    return model  # type: ignore[no-any-return]


@EVERY_RANK
def test_forward_is_that_of_the_truncated_update(rank: int) -> None:
    model = dylora()
    whole = model(tokens()).logits
    with at_rank(model, rank), torch.no_grad():
        logits = model(tokens()).logits
    torch.testing.assert_close(logits, cut(rank)(tokens()).logits, atol=1e-3, rtol=1e-3)
    assert torch.equal(model(tokens()).logits, whole), "it is over when it is over"
    assert torch.equal(logits, whole) == (rank == R)


@EVERY_RANK
def test_the_chain_at_a_rank_is_the_truncated_update(rank: int) -> None:
    state, method = get_state(dylora()), METHODS["dylora"]
    assert method.nested and method.chain
    for name in layers_of(dylora()):
        whole = {part: state[f"{name}.{part}"].double() for part in "AB"}
        parts = {part: t[tuple(map(slice, method.cut(part, tuple(t.shape), rank)))] for part, t in whole.items()}
        chain = method.chain(parts, None, None, ALPHA / rank)
        torch.testing.assert_close(chain[0] @ chain[1], truncated(state, name, rank))
        assert chain[1].shape[0] == rank


@pytest.mark.parametrize("frozen", [False, True])
@EVERY_RANK
def test_gradients_are_those_of_finite_differences_where_it_learns_and_none_elsewhere(rank: int, frozen: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7)).double()
    model = get_peft_model(net, LoraConfig(r=R, lora_alpha=ALPHA, target_modules=["0", "2"]))  # type: ignore[arg-type]
    x = torch.randn(4, 6, dtype=torch.float64)
    randomise(model, "default", 1)
    parameters = parameters_of(model)
    with at_rank(model, rank, frozen):
        model(x).square().sum().backward()
    learns = range(rank - 1, rank) if frozen else range(rank)
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        gradient = parameter.grad if name.endswith("A") else parameter.grad.T
        numbers = parameter.data if name.endswith("A") else parameter.data.T
        for row in range(R):
            step, ends = 1e-6, []
            for move in (step, -2 * step):
                numbers[row, 3] += move
                with at_rank(model, rank), torch.no_grad():
                    ends.append(float(model(x).square().sum()))
            numbers[row, 3] += step
            slope = (ends[0] - ends[1]) / (2 * step) if row in learns else 0.0
            assert float(gradient[row, 3]) == pytest.approx(slope, rel=1e-5, abs=1e-6)


def test_layers_below_learn_through_frozen_rows() -> None:
    """Rows before the b-th are constants and not absent: the gradient of what comes before them goes through."""
    through = []
    for rows_before in (True, False):
        model = dylora()
        if not rows_before:
            with torch.no_grad():
                for layer in layers_of(model).values():
                    layer.lora_B["default"].weight[:, :2] = 0
        ids = model.get_input_embeddings()(tokens()).detach().requires_grad_()
        with at_rank(model, 3, frozen=True):
            (gradient,) = torch.autograd.grad(model(inputs_embeds=ids).logits.square().mean(), ids)
        through.append(gradient)
    assert not torch.allclose(*through)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_step_moves_only_what_it_trains_whatever_momentum_there_is(frozen: bool) -> None:
    model = dylora()
    optimiser = torch.optim.AdamW(parameters_of(model).values(), lr=0.1, weight_decay=0.1)
    for rank in (R, 2, 4, 1):
        before = get_state(model)
        optimiser.zero_grad()
        with at_rank(model, rank, frozen):
            model(tokens(), labels=tokens()).loss.backward()
            optimiser.step()
        learns = range(rank - 1, rank) if frozen else range(rank)
        for name, after in get_state(model).items():
            moved = (after != before[name]).any(1 if name.endswith("A") else 0)
            assert [bool(m) for m in moved] == [k in learns for k in range(R)], name


def test_a_step_that_fails_leaves_the_whole_rank_and_what_does_not_learn() -> None:
    model = dylora()
    state, whole = get_state(model), model(tokens()).logits
    with pytest.raises(RuntimeError, match="stop"), at_rank(model, 2):
        with torch.no_grad():
            for parameter in parameters_of(model).values():
                parameter += 1
        raise RuntimeError("stop")
    for name, tensor in get_state(model).items():
        rest = (slice(2, None),) if name.endswith("A") else (slice(None), slice(2, None))
        assert torch.equal(tensor[rest], state[name][rest]) and not torch.equal(tensor, state[name])
    set_state(model, state)
    assert torch.equal(model(tokens()).logits, whole)


def test_what_cannot_be_is_refused() -> None:
    model = dylora()
    for rank in (0, R + 1):
        with pytest.raises(ValueError, match=f"rank {rank} is not one of 1 to {R}"), at_rank(model, rank):
            pass
    with pytest.raises(ValueError, match="has no LoRA with the name default"), at_rank(llama(), 1):
        pass
    model.merge_adapter()
    dora = get_peft_model(llama(), LoraConfig(r=R, target_modules=["q_proj"], use_dora=True))
    for other in (model, dora):
        with (
            pytest.raises(ValueError, match="merged, or of a variant such as DoRA, have"),
            at_rank(other, 1),
        ):
            pass


def test_a_merged_model_is_the_whole_rank() -> None:
    model = dylora()
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(merged(tokens()).logits, cut(R)(tokens()).logits, atol=1e-3, rtol=1e-3)


def test_ranks_are_drawn_uniformly_and_again_the_same() -> None:
    config = run_config(adapter={"method": "dylora", "rank": 8, "smallest_rank": 3}, train={"steps": 20})
    drawn = [drawn_rank(config, "a", step) for step in range(6000)]
    assert drawn == [drawn_rank(config, "a", step) for step in range(6000)]
    counts = Counter(drawn)
    assert sorted(counts) == [3, 4, 5, 6, 7, 8]
    assert sum((count - 1000) ** 2 / 1000 for count in counts.values()) < 25.7  # χ² with 5 degrees of freedom, p = 1e-4
    assert drawn != [drawn_rank(config, "b", step) for step in range(6000)]
    other = config.model_copy(update={"seed": 1})
    assert drawn != [drawn_rank(other, "a", step) for step in range(6000)]


def test_with_draw_round_all_have_one_rank_a_round() -> None:
    config = run_config(
        adapter={"method": "dylora", "rank": 8, "draw": "round"},
        train={"steps": 5},
        federation={"rounds": 40},
        personal={"steps": 12},
    )
    ranks = [drawn_rank(config, "a", step) for step in range(5 * 40 + 12)]
    assert ranks == [drawn_rank(config, "b", step) for step in range(5 * 40 + 12)]
    rounds = [set(ranks[start : start + 5]) for start in range(0, 200, 5)]
    assert all(len(of) == 1 for of in rounds) and len(set(map(str, rounds))) > 4
    assert len(set(ranks[200:])) == 1, "personalisation is one round more"


def test_the_loop_takes_each_step_at_its_rank_and_stays_within_reach() -> None:
    """Against the same loop written out here."""
    config = run_config(adapter={"method": "dylora", "rank": R}, train={"steps": 6})
    ours, theirs = dylora(), dylora()
    plan, data, around = _plan(count=6, batch_size=4, microbatch=4), rows(9), METHODS["dylora"].around
    assert around is not None
    start = get_state(ours)
    told = {"kind": "causal", "pad_id": 0, "seed": 0, "client": "c"}
    train(ours.get_base_model(), parameters_of(ours), data, plan, around=around(config, ours, "c"), **told)  # type: ignore[arg-type]
    chosen = iter([drawn_rank(config, "c", step) for step in range(6)])
    open_: list[Any] = []

    def stepwise(step: int) -> Any:
        open_.append(at_rank(theirs, next(chosen)))
        return open_[-1]

    train(theirs.get_base_model(), parameters_of(theirs), data, plan, around=stepwise, **told)  # type: ignore[arg-type]
    assert len(open_) == 6 and same(get_state(ours), get_state(theirs))
    most = largest_update(plan)[0]
    moved = {name: float((t - start[name]).abs().max()) for name, t in get_state(ours).items()}
    assert 0 < max(moved.values()) <= most


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_of_records_at_a_rank(frozen: bool) -> None:
    """Opacus sees A and B as they are used: a hook on A's output would hide the factor from it."""
    model, batch = dylora(), rows(3)
    transformer, parameters = model.get_base_model(), parameters_of(model)
    model.train()
    with gradients_of_records(transformer, parameters), at_rank(model, 3, frozen) as masks:
        (causal_loss(transformer, collate(batch, 0, "causal")) * 3).backward()  # type: ignore[no-untyped-call]
        for parameter, mask in masks:
            parameter.grad_sample *= mask  # type: ignore[attr-defined]
        found = {name: p.grad_sample.clone() for name, p in parameters.items()}  # type: ignore[attr-defined]
        sums = {name: torch.zeros_like(p) for name, p in parameters.items()}
        add_clipped(sums, parameters, 1e9, 3)
    for place, row in enumerate(batch):
        model.zero_grad()
        with at_rank(model, 3, frozen):
            causal_loss(transformer, collate([row], 0, "causal")).backward()  # type: ignore[no-untyped-call]
        for name, parameter in parameters.items():
            torch.testing.assert_close(found[name][place], parameter.grad, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("frozen", [False, True])
def test_private_steps_put_no_noise_where_they_train_nothing(frozen: bool) -> None:
    config = run_config(adapter={"method": "dylora", "rank": R, "draw": "round", "frozen": frozen})
    model = dylora()
    before, around = get_state(model), METHODS["dylora"].around
    assert around is not None
    rank = drawn_rank(config, "c", 0)
    train_private(
        model.get_base_model(),
        parameters_of(model),
        rows(6),
        _plan(count=2),
        Mechanism(1.0, 0.5, 1.0),
        KeyStream(),
        kind="causal",
        pad_id=0,
        around=around(config, model, "c"),
    )
    learns = range(rank - 1, rank) if frozen else range(rank)
    for name, after in get_state(model).items():
        moved = (after != before[name]).any(1 if name.endswith("A") else 0)
        assert [bool(m) for m in moved] == [k in learns for k in range(R)], name
