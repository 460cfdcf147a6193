import pytest
import torch
from transformers import LlamaForCausalLM

from fedsb.adapters.attach import HEAD_SPREAD, STANDARDISED_SPREAD, attach, initial_state, layout_of, shapes_of
from fedsb.adapters.state import Layout, get_state, parameters_of, set_state
from fedsb.adapters.tuner import adapted_layers, set_basis
from fedsb.basis.spectral import random_basis
from fedsb.errors import AdapterError, BasisError
from tests.adapters.samples import ALL, RANK, bert, gpt2, llama, run_config, same, tokens

CLASSES = {"kind": "classification"}


def test_all_linear_layers_but_the_output_head() -> None:
    model = attach(llama(), run_config())
    names = {name.rpartition(".")[2] for name in shapes_of(model)}
    assert names == set(ALL)
    assert len(shapes_of(model)) == 14
    assert shapes_of(model)["model.layers.1.mlp.up_proj"] == (48, 32)
    assert not model.training


def test_a_classifier_gets_a_head_to_train() -> None:
    model = attach(bert(), run_config(model=CLASSES))
    assert "bert.pooler.dense" in shapes_of(model)
    assert "classifier" not in shapes_of(model)
    assert [name for name, _ in layout_of(model).shapes if name.startswith("head.")] == [
        "head.classifier.weight",
        "head.classifier.bias",
    ]


def test_the_layers_asked_for() -> None:
    model = attach(llama(), run_config(adapter={"target_modules": ["q_proj", "v_proj"]}))
    assert {name.rpartition(".")[2] for name in shapes_of(model)} == {"q_proj", "v_proj"}
    assert len(shapes_of(model)) == 4


def test_targets_that_match_nothing_are_told_with_those_that_would() -> None:
    with pytest.raises(AdapterError) as caught:
        attach(llama(), run_config(adapter={"target_modules": ["query"]}))
    assert "adapter.target_modules = ['query'] matches no layer of smollm2-135m-instruct" in str(caught.value)
    assert "its linear layers are down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj" in str(caught.value)


def test_a_rank_that_is_too_large() -> None:
    with pytest.raises(BasisError, match=r"adapter\.rank = 20 .*k_proj, which is 16; lower the rank to 16"):
        attach(llama(), run_config(adapter={"rank": 20}))


def test_a_model_without_linear_layers() -> None:
    with pytest.raises(AdapterError, match="Conv1D"):
        attach(gpt2(), run_config())


@pytest.mark.parametrize("kind", ["causal", "classification"])
def test_an_outline_has_the_layout_of_the_model(kind: str) -> None:
    model = llama() if kind == "causal" else bert()
    with torch.device("meta"):
        outline = type(model)(model.config).requires_grad_(False)
    config = run_config(model={"kind": kind})
    outlined = attach(outline, config)
    assert {p.device.type for p in outlined.get_base_model().parameters() if not p.requires_grad} == {"meta"}
    attached = attach(model, config)
    assert layout_of(outlined) == layout_of(attached) == Layout.of(get_state(attached))
    assert layout_of(outlined).fingerprint == layout_of(attached).fingerprint
    assert shapes_of(outlined) == shapes_of(attached)


def test_the_initial_state_is_the_base_model() -> None:
    model = attach(llama(), run_config())
    expected = llama()(tokens()).logits
    set_basis(model, random_basis(shapes_of(model), RANK, 0))
    set_state(model, initial_state(layout_of(model), 3))
    assert torch.equal(model(tokens()).logits, expected)


def test_everybody_starts_from_one_head() -> None:
    layout = layout_of(attach(bert(), run_config(model=CLASSES)))
    state = initial_state(layout, 3)
    torch.manual_seed(99)
    assert same(state, initial_state(layout, 3))
    weight = state["head.classifier.weight"]
    assert not torch.equal(weight, initial_state(layout, 4)["head.classifier.weight"])
    assert 0.5 < float(weight.std()) / STANDARDISED_SPREAD < 1.5
    names = {
        "head.classifier.dense.weight": (8, 8),
        "head.classifier.dense.bias": (8,),
        "head.classifier.out_proj.weight": (3, 8),
    }
    several = initial_state(Layout(tuple(names.items())), 3)["head.classifier.dense.weight"]
    assert 0.5 < float(several.std()) / HEAD_SPREAD < 1.5
    assert all(not t.any() for name, t in state.items() if name != "head.classifier.weight")


def test_attach_leaves_the_class_of_the_model_alone() -> None:
    model = attach(llama(), run_config())
    assert isinstance(model.get_base_model(), LlamaForCausalLM)
    assert all(not layer.core("default").weight.any() for layer in adapted_layers(model).values())


def test_each_target_must_match() -> None:
    """One name that matches does not hide another that matches nothing."""
    config = run_config(adapter={"target_modules": ["q_proj", "k_porj"]})
    with pytest.raises(AdapterError, match="k_porj matches no linear layer"):
        attach(llama(), config)


def test_a_head_is_an_fp32_master_on_a_bf16_model() -> None:
    model = attach(bert().bfloat16(), run_config(model=CLASSES))
    assert {p.dtype for name, p in parameters_of(model).items()} == {torch.float32}
    state = get_state(model)
    state["head.classifier.weight"] += 1e-4  # lost if it were rounded to bf16
    set_state(model, state)
    assert torch.equal(get_state(model)["head.classifier.weight"], state["head.classifier.weight"])
    assert torch.isfinite(model.get_base_model()(input_ids=tokens(2)).logits).all()
