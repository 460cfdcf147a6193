"""LoRA-SB on a basis that is refreshed, by itself: whose turn it is, and what that leaves alone."""

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from fedsb.adapters.lora_sb import LoraSbConfig
from fedsb.adapters.refreshed_sb import RefreshedSbConfig, turn_of
from fedsb.adapters.state import get_state, parameters_of
from fedsb.adapters.tuner import adapted_layers
from tests.adapters.samples import llama

R, H = 3, 4
TOKENS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


def model_of(base: Any) -> PeftModel:
    return get_peft_model(base, RefreshedSbConfig(r=R, heads=H)).eval()


def train(model: PeftModel, turns: list[int]) -> None:
    """A step in each of some turns, by AdamW, whose momentum outlives a turn."""
    optimiser = torch.optim.AdamW(parameters_of(model).values(), lr=0.1, weight_decay=0.1)
    for turn in turns:
        optimiser.zero_grad()
        with turn_of(model, turn):
            model(input_ids=TOKENS, labels=TOKENS).loss.backward()
            optimiser.step()


def test_a_turn_trains_its_core_and_leaves_the_others_bit_for_bit() -> None:
    model = model_of(llama())
    train(model, [0, 0, 1])
    before = get_state(model)
    train(model, [2, 2])
    for name, heads in get_state(model).items():
        assert torch.equal(heads[[0, 1, 3]], before[name][[0, 1, 3]]) and heads[:2].any() and not heads[3].any()
        assert heads[2].any()
    assert all(bool((p == 1).all()) for name, p in parameters_of(model).items() if name.endswith("scales"))


def test_the_first_turn_is_lora_sb_on_the_first_frames() -> None:
    """The same steps of the same AdamW on a core between B_0 and A_0."""
    ours, theirs = model_of(llama()), get_peft_model(llama(), LoraSbConfig(r=R)).eval()
    for name, layer in adapted_layers(theirs).items():
        frames = adapted_layers(ours)[name].frames("default")
        layer.set_frames("default", frames.B[:, :R].clone(), frames.A[:R].clone())
    train(ours, [0, 0, 0])
    optimiser = torch.optim.AdamW(parameters_of(theirs).values(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        theirs(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimiser.step()
    cores = get_state(theirs)
    for name, heads in get_state(ours).items():
        torch.testing.assert_close(heads[0], cores[name.replace(".heads", ".core")], atol=1e-4, rtol=1e-3)


def test_the_model_is_the_sum_of_all_cores() -> None:
    """Against an unmodified model with the sum, taken core by core in fp64, in its weights."""
    base = llama()
    model = model_of(copy.deepcopy(base))
    train(model, [0, 1, 2, 3])
    dense = copy.deepcopy(base)
    with torch.no_grad():
        for name, layer in adapted_layers(model).items():
            frames, heads = layer.frames("default"), layer.core("default").heads.double()
            total = torch.zeros(layer.out_features, layer.in_features, dtype=torch.float64)
            for i in range(H):
                part = slice(i * R, (i + 1) * R)
                total += frames.B[:, part].double() @ heads[i] @ frames.A[part].double()
            weight: Any = dense.get_submodule(name).weight
            weight.add_(total.float())
        torch.testing.assert_close(model(TOKENS).logits, dense(TOKENS).logits, atol=1e-4, rtol=1e-4)


def test_gradients_of_a_later_turn_count_the_cores_before_it() -> None:
    """By finite differences of the loss, at cores that are not zero."""
    model = model_of(llama())
    train(model, [0, 0, 1])
    parameter = next(p for name, p in parameters_of(model).items() if name.endswith("heads"))
    parameter.grad = None
    with turn_of(model, 1):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    gradient, step = parameter.grad, 1e-2
    assert gradient is not None and not gradient[2:].any()
    with torch.no_grad():
        for i, j in ((0, 0), (1, 2)):
            losses = []
            for sign in (1, -2):
                parameter[1, i, j] += sign * step
                losses.append(float(model(input_ids=TOKENS, labels=TOKENS).loss))
            parameter[1, i, j] += step
            assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(float(gradient[1, i, j]), rel=0.05, abs=1e-4)


def test_what_has_no_turns_is_refused() -> None:
    with pytest.raises(ValueError, match="turn 4 is not one of 0 to 3"), turn_of(model_of(llama()), 4):
        pass
    for config in (LoraSbConfig(r=R), LoraConfig(r=R, target_modules="all-linear")):
        with pytest.raises(ValueError, match="no cores in turn"), turn_of(get_peft_model(llama(), config), 0):
            pass
