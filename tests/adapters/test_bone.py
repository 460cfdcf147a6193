"""Bone's two forms against blocks multiplied one by one (`tests.reference.bone_update`)."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from fedsb.abilities import PROMPTING
from fedsb.adapters.attach import attach, initial_state, layout_of
from fedsb.adapters.bone import BoneConfig, BoneLinear, update_of
from fedsb.adapters.methods import METHODS
from fedsb.adapters.state import get_state, layers_of, parameters_of, set_state
from fedsb.errors import AdapterError
from tests.adapters.samples import RANK, bert, check_differences, gpt2, llama, randomise, run_config, same, snapshot, tokens
from tests.reference import bone_update

FP32, BF16, FP64 = torch.float32, torch.bfloat16, torch.float64
FORMS = pytest.mark.parametrize("form", ["column", "row"])


def _adapted(model: Any, form: Any, *, random: bool = True, **settings: Any) -> PeftModel:
    made = get_peft_model(model, BoneConfig(r=settings.pop("r", RANK), form=form, **settings)).eval()
    if random:
        _randomise(made)
    return made


def _randomise(model: nn.Module, adapter: str = "default", seed: int = 1) -> None:
    randomise(model, adapter, seed)
    with torch.no_grad():
        for name, parameter in parameters_of(model, adapter).items():
            parameter *= 1.0 if name.startswith("head.") else 0.1


def _layer(form: Any, dtype: torch.dtype = FP32, bias: bool = False) -> BoneLinear:
    draw = torch.Generator().manual_seed(3)
    base = nn.Linear(12, 20, bias=bias).to(dtype).requires_grad_(False)
    base.weight.copy_(torch.randn(20, 12, generator=draw))
    layer = BoneLinear(base, "default", RANK, form)
    with torch.no_grad():
        layer.bone("default").copy_(torch.randn(layer.bone("default").shape, generator=draw))
    return layer


def _expected(layer: BoneLinear, x: Tensor) -> Tensor:
    weight, bias = layer.base_layer.weight, layer.base_layer.bias
    update = bone_update(weight, layer.bone("default"), layer.fedsb_bone_form["default"])
    y = x.double() @ (weight.double() + update).T
    return y if bias is None else y + bias.double()


@FORMS
@pytest.mark.parametrize(("dtype", "tolerance"), [(FP32, 1e-5), (FP64, 1e-12), (BF16, 0.03)])
@pytest.mark.parametrize("shape", [(12,), (7, 12), (2, 7, 12), (0, 7, 12)])
def test_forward_is_that_of_every_block(form: str, dtype: torch.dtype, tolerance: float, shape: tuple[int, ...]) -> None:
    layer = _layer(form, dtype)
    if dtype == FP64:
        layer.double()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(4)).to(dtype)
    y = layer(x)
    assert y.dtype == dtype and y.shape == (*shape[:-1], 20)
    torch.testing.assert_close(y.double(), _expected(layer, x), atol=20 * tolerance, rtol=tolerance)


@FORMS
def test_forward_keeps_the_bias_once(form: str) -> None:
    layer, x = _layer(form, bias=True), torch.randn(3, 12)
    torch.testing.assert_close(layer(x).double(), _expected(layer, x), atol=1e-4, rtol=1e-5)


@FORMS
@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (4, 4), (4, 12), (12, 4)])
def test_the_update_is_that_of_every_block_and_linear(form: Any, shape: tuple[int, int]) -> None:
    draw, count = torch.Generator().manual_seed(0), shape[0 if form == "column" else 1] // 4
    weight = torch.randn(shape, generator=draw, dtype=FP64)
    one, other = (torch.randn(count, 4, 4, generator=draw, dtype=FP64) for _ in range(2))
    torch.testing.assert_close(update_of(weight, one, form), bone_update(weight, one, form))
    summed = update_of(weight, one, form) + 3 * update_of(weight, other, form)
    torch.testing.assert_close(update_of(weight, one + 3 * other, form), summed)


@FORMS
def test_bones_of_another_layer_are_refused(form: Any) -> None:
    for count in (1, 2, 15):
        with pytest.raises(AdapterError, match="are not of a layer of"):
            update_of(torch.ones(20, 12), torch.ones(count, 4, 4), form)


@FORMS
def test_gradients_are_those_of_finite_differences(form: str) -> None:
    layer = _layer(form, FP64).double()
    x = torch.randn(2, 3, 12, dtype=FP64, generator=torch.Generator().manual_seed(4), requires_grad=True)

    def loss() -> Tensor:
        found: Tensor = layer(x).square().sum()
        return found

    bone = layer.bone("default")
    check_differences(loss, ((bone, [(0, 0, 0), (2, 1, 3), (1, 3, 0)]), (x, [(0, 0, 0), (1, 2, 11)])))


@FORMS
def test_no_second_weight_is_kept_for_the_backward_pass(form: str) -> None:
    layer, saved = _layer(form), []
    x = torch.randn(2, 3, 12, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        layer(x)
    weight = layer.base_layer.weight
    large = [t for t in saved if t.numel() >= weight.numel()]
    assert large and all(t.data_ptr() == weight.data_ptr() for t in large)


@FORMS
@pytest.mark.parametrize(("build", "task"), [(llama, "CAUSAL_LM"), (bert, "SEQ_CLS")])
def test_a_new_adapter_changes_nothing(build: Any, task: str, form: str) -> None:
    plain = build()
    expected = plain(tokens()).logits
    assert torch.equal(_adapted(plain, form, random=False, task_type=task)(tokens()).logits, expected)


@FORMS
def test_a_whole_model_computes_what_its_changed_weights_compute(form: str) -> None:
    plain = llama()
    model = _adapted(copy.deepcopy(plain), form)
    before = plain(tokens()).logits
    for name, layer in layers_of(model).items():
        weight = plain.get_submodule(name).weight
        weight.data = (weight.double() + bone_update(weight, layer.bone("default"), form)).float()
    expected = plain(tokens()).logits
    assert (expected - before).abs().max() > 0.1
    torch.testing.assert_close(model(tokens()).logits, expected, atol=2e-4, rtol=1e-4)


@FORMS
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_only_bones_are_trained_and_they_are_fp32(form: str, dtype: torch.dtype) -> None:
    model = _adapted(llama(dtype), form, random=False)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 14 and all(name.endswith("fedsb_bone_blocks.default") for name in trained)
    assert {p.dtype for p in trained.values()} == {FP32}
    frozen, start = snapshot(model), get_state(model)
    logits = model(tokens(), labels=tokens())
    assert logits.logits.dtype == dtype
    logits.loss.backward()
    torch.optim.SGD(trained.values(), lr=1.0).step()
    assert all(not torch.equal(start[name], bone) for name, bone in get_state(model).items())
    assert all(torch.equal(frozen[name], p) for name, p in snapshot(model).items())
    shapes = dict(layout_of(model).shapes)
    count, part = (12, "bone") if form == "column" else (8, "bone_row")
    assert shapes[f"model.layers.1.mlp.up_proj.{part}"] == (count, RANK, RANK)


@FORMS
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_merge_and_unmerge_restore_every_bit(form: str, dtype: torch.dtype) -> None:
    model = _adapted(llama(dtype), form)
    before, expected = snapshot(model), model(tokens()).logits
    tolerance = {"atol": 2e-4, "rtol": 1e-4} if dtype == FP32 else {"atol": 0.5, "rtol": 0.1}
    model.merge_adapter()
    torch.testing.assert_close(model(tokens()).logits, expected, **tolerance)
    assert sum(not torch.equal(p, before[name]) for name, p in snapshot(model).items()) == 14
    model.unmerge_adapter()
    assert all(torch.equal(p, before[name]) for name, p in snapshot(model).items())
    assert torch.equal(model(tokens()).logits, expected)
    model.merge_adapter()
    with model.disable_adapter():
        base = model(tokens()).logits
    assert torch.equal(base, llama(dtype)(tokens()).logits)


@FORMS
def test_two_merged_adapters_are_both_of_the_unmerged_weight(form: Any) -> None:
    """W_ab·bone is of W0, whichever adapter was merged first; and I + bone, here 0, need not be invertible."""
    layer = _layer(form)
    layer.update_layer("second", 2, form)
    with torch.no_grad():
        layer.bone("second").copy_(-torch.eye(2))
    weight = layer.base_layer.weight.clone()
    both = weight.double() + sum(bone_update(weight, layer.bone(name), form) for name in ("default", "second"))
    layer.merge(adapter_names=["default", "second"])
    torch.testing.assert_close(layer.base_layer.weight.double(), both, atol=1e-5, rtol=1e-5)
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, weight) and not layer.merged


@FORMS
def test_merge_and_unload_gives_a_plain_model(form: str) -> None:
    model = _adapted(bert(), form, task_type="SEQ_CLS")
    expected, head = model(tokens()).logits, get_state(model)["head.classifier.weight"]
    merged = model.merge_and_unload()
    assert not layers_of(merged) and torch.equal(merged.classifier.weight, head)
    torch.testing.assert_close(merged(tokens()).logits, expected, atol=2e-4, rtol=1e-4)


@FORMS
def test_safe_merge_refuses_nan_and_leaves_the_weights(form: str) -> None:
    model = _adapted(llama(), form)
    layer = layers_of(model)["model.layers.0.self_attn.q_proj"]  # the first to be merged
    with torch.no_grad():
        layer.bone("default")[0, 0, 0] = float("inf")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights. The adapter default"):
        model.merge_adapter(safe_merge=True)
    assert all(torch.equal(p, before[name]) for name, p in snapshot(model).items())
    assert not layer.merged


@FORMS
@pytest.mark.parametrize("low_memory", [False, True])
def test_an_adapter_comes_back(form: str, low_memory: bool, tmp_path: Path) -> None:
    saved = _adapted(bert(), form, task_type="SEQ_CLS")
    saved.save_pretrained(tmp_path)
    assert {
        name.rpartition(".")[2] for name in load_file(tmp_path / "adapter_model.safetensors") if "classifier" not in name
    } == {"fedsb_bone_blocks"}
    loaded = PeftModel.from_pretrained(bert(), tmp_path, low_cpu_mem_usage=low_memory)
    assert loaded.peft_config["default"].form == form
    assert same(get_state(loaded), get_state(saved))
    assert torch.equal(loaded(tokens()).logits, saved(tokens()).logits)
    assert not any(p.requires_grad for p in loaded.parameters())


def test_adapters_of_both_forms_on_one_model() -> None:
    model = _adapted(llama(), "column")
    first = model(tokens()).logits
    model.add_adapter("second", BoneConfig(r=2, form="row"))
    _randomise(model, "second", 2)
    assert torch.equal(model(tokens()).logits, first)
    model.set_adapter("second")
    second = model(tokens()).logits
    assert (first - second).abs().max() > 0.1
    alone = _adapted(llama(), "row", random=False, r=2)
    set_state(alone, get_state(model, "second"))
    torch.testing.assert_close(alone(tokens()).logits, second)
    model.set_adapter("default")
    model.delete_adapter("second")
    assert torch.equal(model(tokens()).logits, first)


LOAD_WITHOUT_US = """
import sys
from transformers import LlamaConfig, LlamaForCausalLM
from peft import PeftModel
model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                                     num_key_value_heads=2, vocab_size=64))
assert not any(name.startswith("fedsb") for name in sys.modules)
PeftModel.from_pretrained(model, sys.argv[1])
"""


def test_an_unmodified_peft_refuses_the_file(tmp_path: Path) -> None:
    _adapted(llama(), "column").save_pretrained(tmp_path)
    run = subprocess.run([sys.executable, "-c", LOAD_WITHOUT_US, tmp_path], capture_output=True, text=True, check=False)
    assert run.returncode == 1 and "FEDSB_BONE" in run.stderr.splitlines()[-1]


def test_names_of_adapters_are_refused_and_not_passed_over() -> None:
    model = _adapted(llama(), "row")
    with pytest.raises(ValueError, match="Bone has no adapter_names"):
        model(tokens(), adapter_names=["default", "__base__"])
    with pytest.raises(ValueError, match="Bone has no adapter_names"):
        model.generate(input_ids=tokens(), adapter_names=["default", "__base__"])


@pytest.mark.parametrize("method", ["bone", "bone-row"])
def test_a_rank_that_does_not_divide_is_refused_with_one_that_does(method: str) -> None:
    for rank, works in ((5, 4), (20, 16), (12, 8), (64, 16)):
        with pytest.raises(
            AdapterError, match=rf"adapter\.rank = {rank} .*q_proj \(32 x 32\).* set it to {works}, which"
        ) as caught:
            attach(llama(), run_config(adapter={"method": method, "rank": rank}))
        assert "adapter.target_modules" in str(caught.value)
        attach(llama(), run_config(adapter={"method": method, "rank": works}))


def test_a_second_adapters_rank_is_checked_too() -> None:
    model = _adapted(llama(), "column")
    with pytest.raises(AdapterError, match=r"adapter\.rank = 3 does not divide both sides of layer .*q_proj"):
        model.add_adapter("second", BoneConfig(r=3))


def test_settings_that_make_no_bone() -> None:
    for settings in ({"r": 0}, {"form": "diagonal"}):
        with pytest.raises(AdapterError, match="make no Bone; set r from 1 on"):
            BoneConfig(**settings)  # type: ignore[arg-type]


def test_layers_without_a_plain_weight_are_refused() -> None:
    with pytest.raises(AdapterError, match=r"transformer\.h\.0\.attn\.c_attn is a Conv1D"):
        _adapted(gpt2(), "column")
    model = llama()
    packed = model.model.layers[0].self_attn.q_proj
    packed.weight = nn.Parameter(packed.weight.to(torch.uint8), requires_grad=False)
    with pytest.raises(AdapterError, match=r"q_proj is a Linear, and Bone adapts .* with unpacked weights only"):
        _adapted(model, "column")


def test_states_of_other_methods_and_of_the_other_form_are_refused() -> None:
    """Also where all layers are square, so that both forms have the same shapes."""
    some = {"target_modules": ["q_proj", "o_proj"]}
    told = {method: {"method": method} | ({} if method in PROMPTING else some) for method in METHODS}
    models = {method: attach(llama(), run_config(adapter=adapter)) for method, adapter in told.items()}
    for method in ("bone", "bone-row"):
        for other, model in models.items():
            if other != method:
                with pytest.raises(AdapterError, match="in only one of model and adapter"):
                    set_state(models[method], initial_state(layout_of(model), 0))
                with pytest.raises(AdapterError, match="in only one of model and adapter"):
                    set_state(model, initial_state(layout_of(models[method]), 0))
