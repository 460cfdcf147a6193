"""FLoRA: inputs and outputs of W0 multiplied, against the dense W0∘(B·A), against PEFT's HiRA, and row by row."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import HiraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from fedsb.abilities import PROMPTING
from fedsb.adapters.attach import attach, initial_state, layout_of
from fedsb.adapters.flora import FloraConfig, FloraLinear, start_of_a
from fedsb.adapters.methods import METHODS
from fedsb.adapters.state import get_state, layers_of, parameters_of, set_state
from fedsb.errors import AdapterError
from tests.adapters.samples import RANK, bert, check_differences, gpt2, llama, randomise, run_config, same, snapshot, tokens

FP32, BF16, FP64 = torch.float32, torch.bfloat16, torch.float64
FORMS = pytest.mark.parametrize("form", ["residual", "ones"])


def _adapted(model: Any, form: Any, *, random: bool = True, **settings: Any) -> PeftModel:
    made = get_peft_model(model, FloraConfig(r=settings.pop("r", RANK), form=form, **settings)).eval()
    if random:
        _randomise(made)
    return made


def _also(model: PeftModel, name: str, seed: int, **settings: Any) -> None:
    model.add_adapter(name, FloraConfig(**settings))
    _randomise(model, name, seed)


def _randomise(model: nn.Module, adapter: str = "default", seed: int = 1) -> None:
    """Factors of W0 that stay of size 1, so that two layers of tiny models do not saturate."""
    randomise(model, adapter, seed)
    with torch.no_grad():
        for name, parameter in parameters_of(model, adapter).items():
            parameter *= 1.0 if name.startswith("head.") else 0.5


def _layer(form: Any, dtype: torch.dtype = FP32, bias: bool = False, **settings: Any) -> FloraLinear:
    draw = torch.Generator().manual_seed(3)
    base = nn.Linear(12, 20, bias=bias).to(dtype).requires_grad_(False)
    base.weight.copy_(torch.randn(20, 12, generator=draw))
    layer = FloraLinear(base, "default", FloraConfig(r=RANK, form=form, **settings))
    with torch.no_grad():
        for parameter in layer.trained("default").values():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
    return layer


def _dense(layer: FloraLinear, form: str, scale: float = 1.0) -> Tensor:
    """W' (out, in) in fp64, entry by entry."""
    a, b = (parameter.detach().double() for parameter in layer.trained("default").values())
    weight, factor = layer.base_layer.weight.double(), torch.zeros(layer.out_features, layer.in_features, dtype=FP64)
    for o in range(layer.out_features):
        for i in range(layer.in_features):
            factor[o, i] = (1.0 if form == "residual" else 0.0) + scale * sum(b[o, j] * a[j, i] for j in range(len(a)))
    return weight * factor


@FORMS
@pytest.mark.parametrize(("dtype", "tolerance"), [(FP32, 1e-5), (FP64, 1e-12), (BF16, 0.03)])
@pytest.mark.parametrize("shape", [(12,), (7, 12), (2, 7, 12), (0, 7, 12)])
def test_forward_is_that_of_the_dense_weight(form: str, dtype: torch.dtype, tolerance: float, shape: tuple[int, ...]) -> None:
    layer = _layer(form, dtype)
    if dtype == FP64:
        layer.double()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(4)).to(dtype)
    y = layer(x)
    assert y.dtype == dtype and y.shape == (*shape[:-1], 20)
    torch.testing.assert_close(y.double(), x.double() @ _dense(layer, form).T, atol=40 * tolerance, rtol=tolerance)


@FORMS
def test_a_bias_is_added_once_and_is_not_multiplied(form: str) -> None:
    layer, x = _layer(form, bias=True), torch.randn(3, 12)
    expected = x.double() @ _dense(layer, form).T + layer.base_layer.bias.double()
    torch.testing.assert_close(layer(x).double(), expected, atol=1e-4, rtol=1e-5)


def test_alpha_makes_the_sum_a_mean() -> None:
    summed, mean, tripled = (_layer("residual", **settings) for settings in ({}, {"alpha": 1}, {"alpha": 3 * RANK}))
    x = torch.randn(5, 12)
    for layer, scale in ((summed, 1.0), (mean, 1 / RANK), (tripled, 3.0)):
        torch.testing.assert_close(layer(x).double(), x.double() @ _dense(layer, "residual", scale).T, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(
            layer.get_delta_weight("default").double(),
            _dense(layer, "residual", scale) - layer.base_layer.weight,
            atol=1e-5,
            rtol=1e-5,
        )


@FORMS
def test_gradients_are_those_of_finite_differences(form: str) -> None:
    layer = _layer(form, FP64).double()
    x = torch.randn(2, 3, 12, dtype=FP64, generator=torch.Generator().manual_seed(4), requires_grad=True)

    def loss() -> Tensor:
        found: Tensor = layer(x).square().sum()
        return found

    a, b = layer.trained("default").values()
    check_differences(loss, ((a, [(0, 0), (3, 11)]), (b, [(0, 0), (19, 2)]), (x, [(0, 0, 0), (1, 2, 11)])))


@FORMS
def test_a_new_adapter_changes_nothing(form: str) -> None:
    for build, task in ((llama, "CAUSAL_LM"), (bert, "SEQ_CLS")):
        plain = build()
        expected = plain(tokens()).logits
        torch.testing.assert_close(_adapted(plain, form, random=False, task_type=task)(tokens()).logits, expected)


def test_it_equals_hira_of_peft_on_the_same_factors() -> None:
    ours = _adapted(llama(), "residual")
    peft = get_peft_model(llama(), HiraConfig(r=RANK, target_modules="all-linear")).eval()
    state = get_state(ours)
    with torch.no_grad():
        for name, layer in peft.named_modules():
            if hasattr(layer, "hira_A"):
                path = name.removeprefix("base_model.model.")
                layer.hira_A["default"].copy_(state[f"{path}.a"])
                layer.hira_B["default"].copy_(state[f"{path}.b"])
    torch.testing.assert_close(ours(tokens()).logits, peft(tokens()).logits, atol=1e-4, rtol=1e-4)
    assert (ours(tokens()).logits - llama()(tokens()).logits).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_rows_of_a_batch_go_through_adapters_of_their_own(dtype: torch.dtype) -> None:
    """Of different ranks, scales and forms, and of none."""
    model = _adapted(llama(dtype), "residual")
    _also(model, "wide", 2, r=6, alpha=2.0)
    _also(model, "ones", 3, r=3, form="ones")
    names = ["wide", "__base__", "ones", "default", "ones"]
    ids = tokens(rows=5)
    ids[4] = ids[0]
    mixed = model(ids, adapter_names=names).logits
    for row, name in enumerate(names):
        with model.disable_adapter() if name == "__base__" else _set(model, name):
            alone = model(ids[row : row + 1]).logits[0]
        close = {"atol": 1e-4, "rtol": 1e-4} if dtype == FP32 else {"atol": 0.5, "rtol": 0.1}
        torch.testing.assert_close(mixed[row], alone, **close)
    assert (mixed[0] - mixed[4]).abs().max() > 0.1, "the same text through two adapters"


def _set(model: PeftModel, name: str) -> Any:
    model.set_adapter(name)
    return torch.no_grad()


@pytest.mark.parametrize("beams", [1, 2])
def test_generate_with_an_adapter_for_each_row(beams: int) -> None:
    model = _adapted(llama(), "residual")
    _also(model, "ones", 3, r=3, form="ones")
    ids, names = tokens(rows=3), ["ones", "default", "__base__"]
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    mixed = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=names, **settings)
    for row, name in enumerate(names):
        one = ids[row : row + 1]
        with model.disable_adapter() if name == "__base__" else _set(model, name):
            alone = model.generate(input_ids=one, attention_mask=torch.ones_like(one), **settings)
        assert torch.equal(mixed[row], alone[0])


def test_one_product_with_w0_serves_all_rows_whatever_their_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = _layer("ones")
    for name in ("second", "third"):
        layer.update_layer(name, FloraConfig(r=2, form="ones"))
    widths: list[tuple[int, ...]] = []
    times = functional.linear
    monkeypatch.setattr(functional, "linear", lambda x, weight: (widths.append(tuple(x.shape)), times(x, weight))[1])
    x = torch.randn(3, 5, 12)
    layer(x, adapter_names=["default", "second", "third"])
    layer(x, adapter_names=["default", "__base__", "third"])
    assert widths == [(3, 5, RANK, 12), (3, 5, RANK + 1, 12)], "W0·x itself only where a row needs it"


def test_names_that_cannot_be_are_refused() -> None:
    model = _adapted(llama(), "residual")
    with pytest.raises(ValueError, match="non-existing adapter"):
        model(tokens(), adapter_names=["default", "nobody"])
    with pytest.raises(ValueError, match="1 names for a batch of 2 rows"):
        model(tokens(), adapter_names=["default"])
    model.merge_adapter()
    with pytest.raises(ValueError, match="cannot be combined with merged"):
        model(tokens(), adapter_names=["default", "default"])


@FORMS
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_only_the_vectors_are_trained_and_they_are_fp32(form: str, dtype: torch.dtype) -> None:
    model = _adapted(llama(dtype), form, random=False)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 28 and {p.dtype for p in trained.values()} == {FP32}
    frozen, start = snapshot(model), get_state(model)
    logits = model(tokens(), labels=tokens())
    assert logits.logits.dtype == dtype
    logits.loss.backward()
    torch.optim.SGD(trained.values(), lr=1.0).step()
    moved = {name for name, tensor in get_state(model).items() if not torch.equal(start[name], tensor)}
    assert moved == {name for name in start if form == "ones" or name.endswith(".b")}, "A has no gradient while B is zero"
    assert all(torch.equal(frozen[name], p) for name, p in snapshot(model).items())


def test_small_changes_of_ones_count_in_a_bf16_model_too() -> None:
    """1.003 is 1 in bf16."""
    model = _adapted(llama(BF16), "ones", random=False, r=1)
    plain = model(tokens()).logits
    with torch.no_grad():
        for parameter in parameters_of(model).values():
            parameter += 0.003
    assert not torch.equal(model(tokens()).logits, plain)


@FORMS
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_merge_and_unmerge_restore_every_bit(form: str, dtype: torch.dtype) -> None:
    model = _adapted(llama(dtype), form)
    before, expected = snapshot(model), model(tokens()).logits
    model.merge_adapter()
    close = {"atol": 2e-4, "rtol": 1e-4} if dtype == FP32 else {"atol": 1.0, "rtol": 0.1}
    torch.testing.assert_close(model(tokens()).logits, expected, **close)
    assert sum(not torch.equal(p, before[name]) for name, p in snapshot(model).items()) == 14
    model.unmerge_adapter()
    assert all(torch.equal(p, before[name]) for name, p in snapshot(model).items())
    assert torch.equal(model(tokens()).logits, expected)


def test_several_active_adapters_add_up_each_to_w0() -> None:
    layer, x = _layer("residual"), torch.randn(4, 12)
    layer.update_layer("ones", FloraConfig(r=2, form="ones"))
    with torch.no_grad():
        for parameter in layer.trained("ones").values():
            parameter.copy_(torch.randn(parameter.shape))
    layer.set_adapter(["default", "ones"])
    deltas = sum((layer.get_delta_weight(name) for name in ("default", "ones")), layer.base_layer.weight)
    torch.testing.assert_close(layer(x), x @ deltas.T, atol=1e-4, rtol=1e-4)
    layer.merge(adapter_names=["default", "ones"])
    torch.testing.assert_close(layer.base_layer.weight, deltas, atol=1e-5, rtol=1e-5)


@FORMS
@pytest.mark.parametrize("low_memory", [False, True])
def test_an_adapter_comes_back_and_its_file_is_small(form: str, low_memory: bool, tmp_path: Path) -> None:
    saved = _adapted(bert(), form, task_type="SEQ_CLS")
    saved.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(t.numel() for t in tensors.values()) == sum(t.numel() for t in get_state(saved).values())
    rounded = PeftModel.from_pretrained(bert().bfloat16(), tmp_path, low_cpu_mem_usage=low_memory)
    layers, true = (
        {name: t for name, t in get_state(model).items() if not name.startswith("head.")} for model in (rounded, saved)
    )
    assert same(layers, true), "masters are fp32, whatever the model is"
    loaded = PeftModel.from_pretrained(bert(), tmp_path, low_cpu_mem_usage=low_memory)
    assert loaded.peft_config["default"].form == form
    assert same(get_state(loaded), get_state(saved))
    assert torch.equal(loaded(tokens()).logits, saved(tokens()).logits)


def test_the_start_is_from_the_seed_and_of_size_one() -> None:
    for method in ("flora", "flora-ones"):
        model = attach(llama(), run_config(adapter={"method": method, "rank": 3}))
        state = initial_state(layout_of(model), 3)
        assert same(state, initial_state(layout_of(model), 3))
        a = torch.cat([t[1:].flatten() for name, t in state.items() if name.rpartition(".")[2] in ("a", "a_ones")])
        assert float(a.std()) == pytest.approx(1, abs=0.1)
        set_state(model, state)
        torch.testing.assert_close(model(tokens()).logits, llama()(tokens()).logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(start_of_a((2, 5), None, ones=True)[0], torch.ones(5))


def test_states_of_other_methods_and_of_the_other_form_are_refused() -> None:
    some = {"target_modules": ["q_proj", "o_proj"]}
    told = {method: {"method": method} | ({} if method in PROMPTING else some) for method in METHODS}
    models = {method: attach(llama(), run_config(adapter=adapter)) for method, adapter in told.items()}
    for method in ("flora", "flora-ones"):
        for other in set(METHODS) - {method}:
            with pytest.raises(AdapterError, match="in only one of model and adapter"):
                set_state(models[method], initial_state(layout_of(models[other]), 0))
            with pytest.raises(AdapterError, match="in only one of model and adapter"):
                set_state(models[other], initial_state(layout_of(models[method]), 0))


def test_settings_that_make_no_flora() -> None:
    for settings in ({"r": 0}, {"form": "diagonal"}):
        with pytest.raises(AdapterError, match="make no FLoRA; set r from 1 on"):
            FloraConfig(**settings)  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match='form = "ones" adds nothing; leave it out'):
        FloraConfig(r=4, alpha=1, form="ones")


def test_layers_without_a_plain_weight_are_refused() -> None:
    with pytest.raises(AdapterError, match=r"transformer\.h\.0\.attn\.c_attn is a Conv1D, and FLoRA adapts"):
        _adapted(gpt2(), "residual")


@FORMS
def test_a_whole_model_computes_what_its_changed_weights_compute(form: str) -> None:
    plain = llama()
    model = _adapted(copy.deepcopy(plain), form)
    for name, layer in layers_of(model).items():
        plain.get_submodule(name).weight.data += layer.get_delta_weight("default").detach()
    torch.testing.assert_close(model(tokens()).logits, plain(tokens()).logits, atol=2e-4, rtol=1e-4)
