import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsb.adapters.state import Layout, get_state, parameters_of, set_state
from fedsb.adapters.tuner import adapted_layers
from fedsb.errors import AdapterError
from tests.adapters.samples import RANK, adapted, also, bert, llama, same

shapes = st.lists(st.lists(st.integers(0, 4), max_size=3).map(tuple), min_size=1, max_size=6)


def test_a_state_names_the_cores_and_the_head_in_order() -> None:
    model = adapted(bert(), task_type="SEQ_CLS")
    state = get_state(model)
    assert list(state) == [f"{name}.core" for name in adapted_layers(model)] + [
        "head.classifier.weight",
        "head.classifier.bias",
    ]
    assert {tuple(t.shape) for name, t in state.items() if name.endswith(".core")} == {(RANK, RANK)}
    assert next(iter(get_state(adapted(llama())))) == "model.layers.0.self_attn.q_proj.core"


def test_get_state_copies_and_set_state_puts_it_back() -> None:
    model = adapted(bert(), task_type="SEQ_CLS")
    state = get_state(model)
    kept = {name: tensor.clone() for name, tensor in state.items()}
    with torch.no_grad():
        for parameter in parameters_of(model).values():
            parameter += 1
    assert same(state, kept)
    assert not any(torch.equal(t, kept[name]) for name, t in get_state(model).items())
    set_state(model, state)
    assert same(get_state(model), kept)
    assert all(t.dtype == torch.float32 and t.is_contiguous() for t in state.values())


def test_each_adapter_has_its_own_state() -> None:
    model = adapted(llama())
    also(model, "second", 2)
    first, second = get_state(model), get_state(model, "second")
    set_state(model, first, "second")
    assert same(get_state(model, "second"), first)
    assert not same(first, second)


@pytest.mark.parametrize("change", ["fewer", "more", "other", "shape", "a shape that broadcasts"])
def test_a_state_of_another_model_is_refused_before_anything_changed(change: str) -> None:
    model = adapted(llama())
    before = get_state(model)
    state = {name: tensor + 1 for name, tensor in before.items()}
    last = list(state)[-1]
    if change == "more":
        state["model.layers.9.mlp.up_proj.core"] = torch.zeros(RANK, RANK)
    elif change == "shape":
        state[last] = torch.zeros(RANK + 1, RANK + 1)
    elif change == "a shape that broadcasts":
        state[last] = torch.zeros(1, RANK)
    else:
        tensor = state.pop(last)
        if change == "other":
            state[last + "x"] = tensor
    complaint = "has shape" if "shape" in change else "is in only one of model and adapter"
    with pytest.raises(AdapterError, match=f"{complaint}.*; use an adapter"):
        set_state(model, state)
    assert same(get_state(model), before)


@settings(deadline=None, max_examples=60, database=None)
@given(shapes)
def test_flatten_and_unflatten_are_inverse(shapes: list[tuple[int, ...]]) -> None:
    state = {f"layer {i}": torch.randn(shape) for i, shape in enumerate(shapes)}
    layout = Layout.of(state)
    flat = layout.flatten(dict(reversed(state.items())))  # the layout's order counts, not the state's
    assert flat.shape == (layout.size,) == (sum(t.numel() for t in state.values()),)
    assert same(layout.unflatten(flat), state)


def test_flatten_lays_rows_one_after_another() -> None:
    layout = Layout((("b", (2, 2)), ("a", (1,))))
    state = {"a": torch.tensor([9.0]), "b": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}
    assert layout.flatten(state).tolist() == [1, 2, 3, 4, 9]
    assert layout.flatten(state | {"b": state["b"].T}).tolist() == [1, 3, 2, 4, 9]


@pytest.mark.parametrize("flat", [torch.zeros(4), torch.zeros(6), torch.zeros(5, 1), torch.zeros(1, 5)])
def test_a_vector_of_another_size_is_refused(flat: torch.Tensor) -> None:
    with pytest.raises(AdapterError, match="a state of 5 numbers was expected"):
        Layout((("b", (2, 2)), ("a", (1,)))).unflatten(flat)


def test_a_layout_is_known_by_its_fingerprint() -> None:
    layouts = [
        Layout((("a", (2, 3)), ("b", (4,)))),
        Layout((("b", (4,)), ("a", (2, 3)))),
        Layout((("a", (3, 2)), ("b", (4,)))),
        Layout((("a", (2, 3)), ("c", (4,)))),
        Layout((("a", (2, 3)),)),
    ]
    assert len({layout.fingerprint for layout in layouts}) == len(layouts)
    assert layouts[0].fingerprint == Layout.of({"a": torch.zeros(2, 3), "b": torch.zeros(4)}).fingerprint
