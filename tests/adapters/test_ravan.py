"""RAVAN against a naive dense version: one head, one matrix at a time, in fp64."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from opacus import GradSampleModule
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from fedsb.adapters.attach import attach, initial_state, layout_of, shapes_of
from fedsb.adapters.lora_sb import LoraSbConfig, LoraSbLinear
from fedsb.adapters.methods import METHODS
from fedsb.adapters.ravan import Heads, RavanConfig
from fedsb.adapters.state import get_state, parameters_of, set_state
from fedsb.adapters.tuner import adapted_layers, basis_of, set_basis
from fedsb.basis.spectral import heads_basis, random_basis
from fedsb.data.batches import collate
from fedsb.errors import AdapterError, BasisError
from fedsb.training.loop import learning_rate
from fedsb.training.loss import causal_loss
from fedsb.training.start import basis_source, build_basis, can_rebuild, needs_weights
from tests.adapters.samples import also, bert, gpt2, llama, randomise, run_config, same, snapshot, tokens
from tests.training.samples import rows

R, H = 3, 4


def ravan(model: Any, **settings: Any) -> PeftModel:
    """The model with random heads and scales."""
    peft_model = get_peft_model(model, RavanConfig(**({"r": R, "heads": H} | settings))).eval()
    randomise(peft_model, "default", 1)
    return peft_model


def update(b: Tensor, a: Tensor, heads: Tensor, scales: Tensor) -> Tensor:
    """Σ_i s_i·B_i·H_i·A_i, head by head, fp64."""
    h, r, _ = heads.shape
    total = torch.zeros(b.shape[0], a.shape[1], dtype=torch.float64)
    for i in range(h):
        part = slice(i * r, (i + 1) * r)
        total += scales[i].double() * (b[:, part].double() @ heads[i].double() @ a[part].double())
    return total


def layer_of(out: int = 20, in_: int = 14, dtype: torch.dtype = torch.float32) -> LoraSbLinear:
    draw = torch.Generator().manual_seed(3)
    base = nn.Linear(in_, out).to(dtype).requires_grad_(False)
    layer = LoraSbLinear(base, "default", RavanConfig(r=R, heads=H).core())
    basis = heads_basis({"l": (out, in_)}, R, H, 0)
    layer.set_frames("default", basis.B["l"], basis.A["l"])
    with torch.no_grad():
        layer.core("default").heads.copy_(torch.randn(H, R, R, generator=draw))
        layer.core("default").scales.copy_(torch.randn(H, generator=draw))
    return layer


def expected(layer: LoraSbLinear) -> Tensor:
    frames, core = layer.frames("default"), layer.core("default")
    return update(frames.B, frames.A, core.heads.detach(), core.scales.detach())


@pytest.mark.parametrize("shape", [(14,), (7, 14), (2, 7, 14), (0, 7, 14)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_forward_is_the_sum_of_heads(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    layer = layer_of(dtype=dtype)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(4)).to(dtype)
    base = layer.get_base_layer()
    whole = x.double() @ (base.weight.double() + expected(layer)).T + base.bias.double()
    y = layer(x)
    assert y.dtype == dtype and y.shape == (*shape[:-1], 20)
    torch.testing.assert_close(y.double(), whole, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(layer.get_delta_weight("default").double(), expected(layer), atol=1e-5, rtol=1e-5)


def test_gradients_are_those_of_finite_differences() -> None:
    layer = layer_of().double()
    core: Heads = layer.core("default")
    x = torch.randn(5, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(4), requires_grad=True)
    loss = layer(x).square().sum()
    gradients = torch.autograd.grad(loss, [core.heads, core.scales, x])
    with torch.no_grad():
        for tensor, gradient in zip((core.heads, core.scales, x), gradients, strict=True):
            flat, step = tensor.view(-1), 1e-5
            for place in range(0, flat.numel(), 5):
                kept = float(flat[place])
                ends = []
                for end in (kept + step, kept - step):
                    flat[place] = end
                    ends.append(float(layer(x).square().sum()))
                flat[place] = kept
                slope = (ends[0] - ends[1]) / (2 * step)
                assert float(gradient.flatten()[place]) == pytest.approx(slope, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(("build", "task"), [(llama, "CAUSAL_LM"), (bert, "SEQ_CLS")])
def test_new_heads_change_nothing_and_only_they_learn(build: Any, task: str) -> None:
    plain = build()
    logits = plain(tokens()).logits
    model = get_peft_model(plain, RavanConfig(r=R, heads=H, task_type=task)).eval()
    torch.testing.assert_close(model(tokens()).logits, logits, rtol=0, atol=0)
    trained = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad and "fedsb" in name}
    assert trained == {"heads", "scales"}
    frozen, start = snapshot(model), get_state(model)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):  # a scale has a gradient once its head is not zero
        optimiser.zero_grad()
        model(tokens()).logits.square().sum().backward()
        optimiser.step()
    assert all(not torch.equal(start[name], t) for name, t in get_state(model).items() if name.endswith("heads"))
    assert all((p != 1).any() for name, p in parameters_of(model).items() if name.endswith("scales"))
    assert all(torch.equal(frozen[name], p) for name, p in snapshot(model).items())


def test_a_state_is_the_products_and_scales_restart_at_one() -> None:
    model = ravan(llama())
    updates = {name: expected(layer) for name, layer in adapted_layers(model).items()}
    state = get_state(model)
    assert {tuple(t.shape) for t in state.values()} == {(H, R, R)} and len(state) == 14
    set_state(model, state)
    assert all(torch.equal(p, torch.ones(H)) for name, p in parameters_of(model).items() if name.endswith("scales"))
    assert same(get_state(model), state)
    for name, layer in adapted_layers(model).items():
        torch.testing.assert_close(expected(layer), updates[name], atol=1e-5, rtol=1e-5)
    assert [name for name, _ in layout_of(model).shapes] == list(state)
    with pytest.raises(AdapterError, match=r"q_proj.heads has shape \(1, 3, 3\) where the model has \(4, 3, 3\)"):
        set_state(model, {name: t[:1] for name, t in state.items()})


def test_the_mean_of_products_is_the_mean_of_updates_and_that_of_both_apart_is_not() -> None:
    draw = torch.Generator().manual_seed(0)
    basis = heads_basis({"l": (20, 14)}, R, H, 0)
    b, a = basis.B["l"], basis.A["l"]
    clients = [(torch.randn(H, R, R, generator=draw), torch.randn(H, generator=draw)) for _ in range(5)]
    mean = torch.stack([update(b, a, heads, scales) for heads, scales in clients]).mean(0)
    products = torch.stack([scales[:, None, None] * heads for heads, scales in clients]).mean(0)
    chain = METHODS["ravan"].chain({"heads": products.double()}, b.double(), a.double(), 1.0)
    found = torch.linalg.multi_dot(chain)
    assert float((found - mean).norm() / mean.norm()) < 1e-6
    apart = update(b, a, *(torch.stack(part).mean(0) for part in zip(*clients, strict=True)))
    assert float((apart - mean).norm() / mean.norm()) > 0.1


def test_frames_are_orthonormal_over_all_heads_where_they_fit_and_normal_elsewhere() -> None:
    basis = heads_basis({"wide": (600, 12), "narrow": (11, 600)}, R, H, 7)
    eye = torch.eye(R * H)
    for frame in (basis.B["wide"], basis.A["wide"].T, basis.A["narrow"].T):
        torch.testing.assert_close(frame.T @ frame, eye, atol=1e-5, rtol=0)
    lengths = torch.cat([heads_basis({"narrow": (11, 600)}, R, H, seed).B["narrow"].norm(dim=0) for seed in range(50)])
    assert 0.9 < float(lengths.square().mean()) < 1.1 and float(lengths.std()) > 0.1
    assert not basis.R0
    assert basis.fingerprint == heads_basis({"wide": (600, 12), "narrow": (11, 600)}, R, H, 7).fingerprint
    assert basis.fingerprint != heads_basis({"wide": (600, 12), "narrow": (11, 600)}, R, H, 8).fingerprint


def test_heads_side_by_side_are_a_block_diagonal_core_of_lora_sb() -> None:
    """On the basis of rank h·r of the same seed, which is the same one."""
    model = ravan(llama(), r=2)
    sb = get_peft_model(llama(), LoraSbConfig(r=2 * H)).eval()
    assert basis_of(model).fingerprint == basis_of(sb).fingerprint
    set_state(sb, {name.replace("heads", "core"): torch.block_diag(*t) for name, t in get_state(model).items()})
    torch.testing.assert_close(model(tokens()).logits, sb(tokens()).logits, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("save_basis", [True, False])
@pytest.mark.parametrize("low_memory", [True, False])
def test_an_adapter_comes_back(tmp_path: Path, save_basis: bool, low_memory: bool) -> None:
    saved = ravan(bert(), task_type="SEQ_CLS", save_basis=save_basis, seed=5)
    saved.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(bert(), tmp_path, low_cpu_mem_usage=low_memory)
    assert isinstance(loaded.peft_config["default"], RavanConfig)
    assert isinstance(PeftConfig.from_pretrained(tmp_path), RavanConfig)
    assert torch.equal(loaded(tokens()).logits, saved(tokens()).logits)
    assert same(get_state(loaded), get_state(saved)) and basis_of(loaded).fingerprint == basis_of(saved).fingerprint
    for name, parameter in parameters_of(saved).items():
        assert torch.equal(parameter, parameters_of(loaded)[name]), "scales too, so that training goes on"


def test_a_basis_of_another_seed_and_an_unknown_method_are_refused(tmp_path: Path) -> None:
    ravan(llama(), save_basis=False).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    text = path.read_text()
    path.write_text(text.replace('"seed": 0', '"seed": 1'))
    with pytest.raises(BasisError, match="is not the one this core was trained on"):
        PeftModel.from_pretrained(llama(), tmp_path)
    path.write_text(text.replace('"ravan"', '"magic"'))
    with pytest.raises(AdapterError, match="of the method 'magic', which this version does not have"):
        PeftModel.from_pretrained(llama(), tmp_path)


def test_merge_and_unmerge() -> None:
    plain = llama()
    model = ravan(copy.deepcopy(plain))
    before, logits = snapshot(model), model(tokens()).logits
    for name, layer in adapted_layers(model).items():
        weight = plain.get_submodule(name).weight
        weight.data = (weight.double() + expected(layer)).float()
    torch.testing.assert_close(plain(tokens()).logits, logits, atol=1e-3, rtol=1e-3)
    model.merge_adapter()
    torch.testing.assert_close(model(tokens()).logits, logits, atol=1e-3, rtol=1e-3)
    model.unmerge_adapter()
    for name, p in snapshot(model).items():
        torch.testing.assert_close(p, before[name], atol=1e-5, rtol=1e-5)
    merged = model.merge_and_unload()
    for p, q in zip(merged.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_batch_of_several_adapters_also_with_those_of_lora_sb() -> None:
    model = ravan(llama())
    model.add_adapter("second", RavanConfig(r=R, heads=H))
    model.add_adapter("other", RavanConfig(r=2, heads=2, seed=9))
    for place, name in enumerate(("second", "other")):
        randomise(model, name, 2 + place)
    also(model, "whole", 4, r=R * H)  # on the very frames of RAVAN's
    model.eval()
    names = ["second", "__base__", "default", "whole", "other", "default"]
    mixed = model(tokens(6), adapter_names=names).logits
    for row, name in enumerate(names):
        ids = tokens(6)[row : row + 1]
        if name == "__base__":
            with model.disable_adapter():
                alone = model(ids).logits
        else:
            model.set_adapter(name)
            alone = model(ids).logits
        torch.testing.assert_close(mixed[row : row + 1], alone, atol=1e-3, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
def test_each_record_has_gradients_of_heads_and_scales_of_its_own() -> None:
    model, batch = ravan(llama()), rows(4)
    transformer, parameters = model.get_base_model(), parameters_of(model)
    wrapped = GradSampleModule(model, loss_reduction="mean")
    wrapped.train()
    causal_loss(transformer, collate(batch, 0, "causal")).backward()  # type: ignore[no-untyped-call]
    found: dict[str, Tensor] = {name: p.grad_sample.detach() for name, p in parameters.items()}  # type: ignore[attr-defined]
    wrapped.to_standard_module()
    assert sum(name.endswith("scales") for name in found) == 14
    for place, row in enumerate(batch):
        alone = torch.autograd.grad(causal_loss(transformer, collate([row], 0, "causal")), list(parameters.values()))
        for name, gradient in zip(parameters, alone, strict=True):
            torch.testing.assert_close(found[name][place], gradient, atol=1e-5, rtol=1e-3, msg=name)


def test_a_run_has_it_from_the_seed_and_starts_from_the_base_model() -> None:
    config = run_config(adapter={"method": "ravan", "heads": 2})
    model = attach(llama(), config)
    basis = build_basis(config, model, None, torch.device("cpu"))
    assert {tuple(b.shape)[1] for b in basis.B.values()} == {8} and not basis.R0
    assert can_rebuild(config) and not needs_weights(config) and basis_source(config) == "random"
    state = initial_state(layout_of(model), 0)
    assert {tuple(t.shape) for t in state.values()} == {(2, 4, 4)} and not any(t.any() for t in state.values())
    assert shapes_of(model).keys() == basis.B.keys()


@pytest.mark.parametrize(("rank", "heads", "rate"), [(32, 4, 0.01), (64, 1, 0.01), (4, 4, 0.04), (32, None, 0.01)])
def test_the_automatic_rate_is_that_of_a_core_with_as_many_numbers(rank: int, heads: int | None, rate: float) -> None:
    config = run_config(adapter={"method": "ravan", "rank": rank, "heads": heads})
    assert learning_rate(config) == pytest.approx(rate)
    count = rank * rank * config.head_count
    assert rate == 0.04 or learning_rate(config) * math.sqrt(count) == pytest.approx(0.64)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(BasisError, match=r"adapter.rank = 17 .*k_proj, which is 16; lower the rank to 16"):
        attach(llama(), run_config(adapter={"method": "ravan", "rank": 17, "heads": 1}))
    with pytest.raises(BasisError, match=r"adapter.rank = 17 .*k_proj, which is 16"):
        get_peft_model(llama(), RavanConfig(r=17, heads=1))
    with pytest.raises(AdapterError, match=r"c_attn is a Conv1D, and ravan adapts"):
        get_peft_model(gpt2(), RavanConfig(r=2))
    with pytest.raises(ValueError, match="heads = 0"):
        RavanConfig(r=2, heads=0)
    with pytest.raises(ValueError, match="RAVAN's heads have random ones"):
        RavanConfig(r=2, basis="weights")
    model = get_peft_model(llama(), RavanConfig(r=R, heads=H))
    with pytest.raises(BasisError, match="use the basis that was built for this model"):
        set_basis(model, random_basis(shapes_of(model), R, 0))
