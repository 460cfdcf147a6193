import copy
from typing import Any

import pytest
import torch
from torch import nn

from fedsb.adapters.lora_sb import LoraSbConfig, LoraSbLinear
from fedsb.adapters.methods import METHODS
from fedsb.adapters.state import get_state, parameters_of
from fedsb.adapters.tuner import adapted_layers, basis_of, set_basis
from fedsb.basis.frames import Basis
from fedsb.basis.spectral import random_basis
from fedsb.errors import AdapterError, BasisError
from tests.adapters.samples import RANK, adapted, also, bert, gpt2, llama, snapshot, tokens
from tests.reference import adapted_linear, with_updates

CORES = ("lora-sb", "nested-sb", "lora-xs", "ravan", "refreshed-sb", "lorafusion", "lorafusion-product")
OURS = {"nola": "FEDSB_NOLA", "galore": "FEDSB_GALORE"} | (
    dict.fromkeys(CORES, "FEDSB")
    | dict.fromkeys(("bone", "bone-row"), "FEDSB_BONE")
    | dict.fromkeys(("flora", "flora-ones"), "FEDSB_FLORA")
)
TYPES = {name: "LORA" for name in METHODS} | OURS | {"miss": "MISS", "lopa": "FEDSB_LOPA"}
FP32, BF16 = torch.float32, torch.bfloat16


def _layer(weights: torch.dtype, frames: torch.dtype, bias: bool = False) -> LoraSbLinear:
    draw = torch.Generator().manual_seed(3)
    base = nn.Linear(12, 20, bias=bias).to(weights).requires_grad_(False)
    base.weight.copy_(torch.randn(20, 12, generator=draw))
    layer = LoraSbLinear(base, "default", LoraSbConfig(r=RANK).core())
    basis = random_basis({"l": (20, 12)}, RANK, 0).to(frames)
    layer.set_frames("default", basis.B["l"], basis.A["l"])
    with torch.no_grad():
        layer.core("default").weight.copy_(torch.randn(RANK, RANK, generator=draw))
    return layer


def _expected(layer: LoraSbLinear, x: torch.Tensor) -> torch.Tensor:
    frames, core = layer.frames("default"), layer.core("default").weight
    y = adapted_linear(layer.get_base_layer().weight, frames.B, core, frames.A, x)
    bias = layer.get_base_layer().bias
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize(("build", "task"), [(llama, "CAUSAL_LM"), (bert, "SEQ_CLS")])
def test_a_new_adapter_changes_nothing(build: Any, task: str) -> None:
    plain = build()
    expected = plain(tokens()).logits
    assert torch.equal(adapted(plain, random=False, task_type=task)(tokens()).logits, expected)


@pytest.mark.parametrize(
    ("weights", "frames", "tolerance"), [(FP32, FP32, 1e-5), (FP32, BF16, 1e-5), (BF16, FP32, 0.02), (BF16, BF16, 0.04)]
)
@pytest.mark.parametrize("shape", [(12,), (7, 12), (2, 7, 12), (0, 7, 12)])
def test_forward_is_w0_x_plus_b_r_a_x(
    weights: torch.dtype, frames: torch.dtype, tolerance: float, shape: tuple[int, ...]
) -> None:
    layer = _layer(weights, frames)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(4)).to(weights)
    y, expected = layer(x), _expected(layer, x)
    assert y.dtype == weights
    assert y.shape == (*shape[:-1], 20)
    torch.testing.assert_close(y.double(), expected, atol=tolerance * 5, rtol=tolerance)


def test_forward_keeps_the_bias_once() -> None:
    layer = _layer(FP32, FP32, bias=True)
    x = torch.randn(3, 12)
    torch.testing.assert_close(layer(x).double(), _expected(layer, x), atol=1e-5, rtol=1e-5)


def test_gradient_of_the_core_is_that_of_the_formula() -> None:
    layer = _layer(FP32, FP32)
    x, upstream = torch.randn(2, 7, 12), torch.randn(2, 7, 20)
    layer(x).backward(upstream)
    frames = layer.frames("default")
    whole = upstream.flatten(0, 1).double().T @ x.flatten(0, 1).double()  # (out, in), of the full weight
    expected = frames.B.double().T @ whole @ frames.A.double().T
    torch.testing.assert_close(layer.core("default").weight.grad.double(), expected, atol=1e-4, rtol=1e-5)


def test_a_whole_model_computes_what_its_merged_weights_compute() -> None:
    plain = llama()
    model = adapted(copy.deepcopy(plain))
    before = plain(tokens()).logits
    with_updates(plain, basis_of(model), get_state(model))
    expected = plain(tokens()).logits
    assert (expected - before).abs().max() > 0.1
    torch.testing.assert_close(model(tokens()).logits, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_only_cores_are_trained_and_they_are_fp32(dtype: torch.dtype) -> None:
    model = adapted(llama(dtype))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if name.endswith("fedsb_core.default.weight")}
    assert len(trained) == 14
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {FP32}
    assert model(tokens()).logits.dtype == dtype


def test_a_head_is_trained_along_with_the_cores() -> None:
    model = adapted(bert(), task_type="SEQ_CLS")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    head = {name for name in trained if "modules_to_save" in name}
    assert {name.rpartition(".")[2] for name in head} == {"weight", "bias"}
    assert len(head) == 2
    assert all("fedsb_core" in name for name in trained - head)
    assert len(trained - head) == 13
    assert not any("classifier" in name for name in adapted_layers(model))


def test_training_changes_cores_only() -> None:
    model = adapted(llama(), random=False)
    frozen, start = snapshot(model), get_state(model)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(tokens(), labels=tokens()).loss.backward()
    optimiser.step()
    assert all(not torch.equal(start[name], core) for name, core in get_state(model).items())
    after = snapshot(model)
    assert frozen.keys() == after.keys()
    assert all(torch.equal(frozen[name], after[name]) for name in frozen)


def test_adapters_on_one_basis_hold_it_once() -> None:
    model = adapted(llama(BF16))
    also(model, "second", 2)
    also(model, "other", 3, seed=9)

    def shared(one: str, two: str) -> set[bool]:
        layers = adapted_layers(model).values()
        return {
            getattr(layer.frames(one), side).data_ptr() == getattr(layer.frames(two), side).data_ptr()
            for layer in layers
            for side in "BA"
        }

    assert shared("default", "second") == {True}
    assert shared("default", "other") == {False}
    for moved in (BF16, "cpu", FP32):
        model.to(moved)
        assert shared("default", "second") == {True}
    model.delete_adapter("second")
    assert model(tokens()).logits.isfinite().all()
    assert all("second" not in layer.fedsb_basis and "second" not in layer.fedsb_core for layer in adapted_layers(model).values())


@pytest.mark.parametrize("dtype", [BF16, torch.float64])
def test_a_cast_model_still_computes(dtype: torch.dtype) -> None:
    model = adapted(llama())
    expected = model(tokens()).logits
    actual = model.to(dtype)(tokens()).logits
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.float(), expected, atol=0.25 if dtype == BF16 else 1e-3, rtol=0.1)


def test_set_basis_puts_b_a_and_r0_in_place() -> None:
    model = adapted(llama(), random=False, basis="later")
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in adapted_layers(model).items()}
    assert all(float(layer.frames("default").B.abs().sum()) == 0 for layer in adapted_layers(model).values())
    basis = random_basis(shapes, RANK, 5)
    basis = Basis(basis.B, basis.A, {name: torch.full((RANK, RANK), float(i)) for i, name in enumerate(shapes)})
    set_basis(model, basis)
    assert basis_of(model).fingerprint == basis.fingerprint == model.peft_config["default"].basis_fingerprint
    assert all(torch.equal(core, basis.R0[name.removesuffix(".core")]) for name, core in get_state(model).items())


def test_how_a_basis_lies_in_memory_changes_no_bit() -> None:
    """QR yields columns, a file rows; products of the two round differently, so a resumed run would not be the same run."""
    base, x = nn.Linear(40, 72).requires_grad_(False), torch.randn(5, 40)
    basis = random_basis({"l": (72, 40)}, 8, 0)
    results = []
    for b in (basis.B["l"].contiguous(), basis.B["l"].T.contiguous().T):
        layer = LoraSbLinear(base, "default", LoraSbConfig(r=8).core())
        layer.set_frames("default", b, basis.A["l"].T.contiguous().T if results else basis.A["l"])
        with torch.no_grad():
            layer.core("default").weight.fill_(0.3)
        assert layer.frames("default").B.is_contiguous() and layer.frames("default").A.is_contiguous()
        results.append(layer(x))
    assert torch.equal(*results)


@pytest.mark.parametrize("change", ["rank", "rank 1", "out", "in", "fewer", "more"])
def test_a_basis_of_another_model_is_refused_and_nothing_changes(change: str) -> None:
    model = adapted(llama())
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in adapted_layers(model).items()}
    last = list(shapes)[-1]
    rank = {"rank": 2 * RANK, "rank 1": 1}.get(change, RANK)
    out, width = shapes[last]
    if change in ("out", "in"):
        shapes[last] = (out + (change == "out"), width + (change == "in"))
    elif change == "fewer":
        del shapes[last]
    elif change == "more":
        shapes["model.layers.2.mlp.down_proj"] = (32, 48)
    state, fingerprint = get_state(model), basis_of(model).fingerprint
    with pytest.raises(BasisError, match="use the basis that was built for this model"):
        set_basis(model, random_basis(shapes, rank, 7))
    assert basis_of(model).fingerprint == fingerprint
    assert all(torch.equal(core, state[name]) for name, core in get_state(model).items())


def test_a_rank_that_is_too_large_names_the_smallest_layer() -> None:
    with pytest.raises(BasisError, match=r"adapter.rank = 17 .* layer model.layers.0.self_attn.k_proj, which is 16; lower"):
        adapted(llama(), r=17)
    model = adapted(llama())
    with pytest.raises(BasisError, match=r"adapter.rank = 33 .*k_proj, which is 16"):
        also(model, "second", 1, r=33)


def test_a_layer_that_is_not_linear_is_refused() -> None:
    with pytest.raises(AdapterError, match=r"transformer\.h\.0\.attn\.c_attn is a Conv1D"):
        adapted(gpt2())


def test_merge_and_unmerge() -> None:
    model = adapted(llama())
    before, expected = snapshot(model), model(tokens()).logits
    model.merge_adapter()
    assert all(layer.merged for layer in adapted_layers(model).values())
    torch.testing.assert_close(model(tokens()).logits, expected, atol=2e-4, rtol=1e-4)
    changed = [name for name, p in snapshot(model).items() if not torch.equal(p, before[name])]
    assert len(changed) == 14
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    torch.testing.assert_close(model(tokens()).logits, expected, atol=2e-4, rtol=1e-4)
    model.unmerge_adapter()
    for name, p in snapshot(model).items():
        torch.testing.assert_close(p, before[name], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(model(tokens()).logits, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_merge_and_unload_gives_a_plain_model(dtype: torch.dtype) -> None:
    plain = llama(dtype)
    model = adapted(copy.deepcopy(plain))
    with_updates(plain, basis_of(model), get_state(model))
    merged = model.merge_and_unload()
    assert type(merged) is type(plain)
    assert not adapted_layers(merged)
    for (name, p), q in zip(merged.named_parameters(), plain.parameters(), strict=True):
        tolerance = {"atol": 1e-6, "rtol": 1e-6} if dtype == FP32 else {"atol": 1e-3, "rtol": 1e-2}
        torch.testing.assert_close(p, q, **tolerance, msg=name)


def test_merge_and_unload_keeps_the_trained_head() -> None:
    model = adapted(bert(), task_type="SEQ_CLS")
    expected, head = model(tokens()).logits, get_state(model)["head.classifier.weight"]
    merged = model.merge_and_unload()
    assert torch.equal(merged.classifier.weight, head)
    torch.testing.assert_close(merged(tokens()).logits, expected, atol=2e-4, rtol=1e-4)


def test_safe_merge_refuses_nan_and_leaves_the_weights() -> None:
    model = adapted(llama())
    layer = adapted_layers(model)["model.layers.0.self_attn.q_proj"]  # the first to be merged
    with torch.no_grad():
        layer.core("default").weight[0, 0] = float("nan")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights. The adapter default"):
        model.merge_adapter(safe_merge=True)
    assert all(torch.equal(p, before[name]) for name, p in snapshot(model).items())
    assert not layer.merged


def test_disable_adapter_gives_the_base_model_back() -> None:
    plain = llama()
    expected = plain(tokens()).logits
    model = adapted(plain)
    trained = model(tokens()).logits
    with model.disable_adapter():
        assert torch.equal(model(tokens()).logits, expected)
    assert torch.equal(model(tokens()).logits, trained)
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(model(tokens()).logits, expected, atol=1e-4, rtol=1e-4)


def test_only_the_active_adapter_counts_and_is_trained() -> None:
    model = adapted(llama())
    also(model, "second", 2)
    first = model(tokens()).logits
    model.set_adapter("second")
    second = model(tokens()).logits
    assert (first - second).abs().max() > 0.1
    assert {p.requires_grad for p in parameters_of(model, "default").values()} == {False}
    assert {p.requires_grad for p in parameters_of(model, "second").values()} == {True}
    model.set_adapter("default")
    assert torch.equal(model(tokens()).logits, first)


def test_the_table_of_methods_builds_what_it_says() -> None:
    for name, method in METHODS.items():
        config = method.config(RANK, float(RANK), {"target_modules": "all-linear"} | ({"heads": 3} if method.heads else {}))
        assert config.peft_type.value == TYPES[name]
        assert set(method.frames) <= {"B", "A"} and method.parts
        assert [method.chain, method.dense, method.output].count(None) == 2
        sizes = {"out": 7, "in": 9, "r": RANK, "out/r": 3, "in/r": 5, "h": 3, "k": 6}
        sizes |= {"tokens": 2, "hidden": 4, "tokens*r": 2 * RANK, "out*r": 7 * RANK}
        for part, letters in method.parts.items():
            shape = tuple(sizes[letter] for letter in letters)
            assert method.fits(part, shape, RANK) and (method.fits(part, shape, RANK + 1) != ("r" in letters))
            assert not method.fits(part, (*shape, 1), RANK) and not method.fits("other", shape, RANK)
