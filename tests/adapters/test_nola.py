"""NOLA: coefficients of random matrices, against the sums written out; what is drawn, kept, saved and rounded."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fedsb.adapters import random_sums
from fedsb.adapters.coefficients import pack, unpack
from fedsb.adapters.nola import NolaConfig, NolaLinear, expanded
from fedsb.adapters.random_sums import Side, combined
from fedsb.adapters.state import get_state, parameters_of, set_state
from fedsb.basis.spectral import seeded
from fedsb.errors import AdapterError
from tests.adapters.samples import bert, check_differences, llama, randomise, same, snapshot, tokens

FP32, BF16, FP64 = torch.float32, torch.bfloat16, torch.float64
RANK, BASES = 3, 5


def _adapted(model: Any, *, random: bool = True, **settings: Any) -> PeftModel:
    made = get_peft_model(model, NolaConfig(**({"r": RANK, "bases": BASES, "seed": 7} | settings))).eval()
    if random:
        randomise(made, "default", 1)
    return made


def _layer(dtype: torch.dtype = FP32, bias: bool = False, **settings: Any) -> NolaLinear:
    draw = torch.Generator().manual_seed(3)
    base = nn.Linear(12, 20, bias=bias).to(dtype).requires_grad_(False)
    base.weight.copy_(torch.randn(20, 12, generator=draw))
    layer = NolaLinear(base, "default", NolaConfig(**({"r": RANK, "bases": BASES, "seed": 7} | settings)))
    with torch.no_grad():
        for parameter in layer.trained("default").values():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
    return layer


def _factor(coefficients: Tensor, side: str, length: int, rank: int = RANK, seed: int = 7) -> Tensor:
    """A (r, in) or B (out, r) in fp64: one random matrix after the other."""
    shape = (rank, length) if side == "A" else (length, rank)
    draw, total = seeded(seed, "nola", side, f"{rank} x {length}"), torch.zeros(shape, dtype=FP64)
    for coefficient in coefficients:
        matrix = torch.empty(shape).uniform_(-1, 1, generator=draw) / len(coefficients) ** 0.5
        total += coefficient.double() * matrix.double()
    if side == "A":
        start = seeded(seed, "nola", side, f"{rank} x {length}", "start")
        total += torch.empty(shape).uniform_(-(length**-0.5), length**-0.5, generator=start).double()
    return total


def _delta(layer: NolaLinear, scale: float = 1.0) -> Tensor:
    alpha, beta = (parameter.detach() for parameter in layer.trained("default").values())
    return scale * _factor(beta, "B", layer.out_features) @ _factor(alpha, "A", layer.in_features)


@pytest.mark.parametrize(("dtype", "tolerance"), [(FP32, 1e-5), (BF16, 0.03)])
@pytest.mark.parametrize("shape", [(12,), (7, 12), (2, 7, 12), (0, 7, 12)])
def test_forward_is_that_of_the_sums(dtype: torch.dtype, tolerance: float, shape: tuple[int, ...]) -> None:
    layer = _layer(dtype, bias=True)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(4)).to(dtype)
    expected = x.double() @ (layer.base_layer.weight.double() + _delta(layer)).T + layer.base_layer.bias.double()
    y = layer(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, atol=20 * tolerance, rtol=tolerance)
    torch.testing.assert_close(layer.get_delta_weight("default").double(), _delta(layer), atol=1e-5, rtol=1e-5)


def test_alpha_scales_the_update() -> None:
    layer = _layer(alpha=6.0)
    torch.testing.assert_close(layer.get_delta_weight("default").double(), _delta(layer, 2.0), atol=1e-5, rtol=1e-5)


def test_gradients_are_those_of_finite_differences() -> None:
    layer = _layer(FP64).double()
    x = torch.randn(2, 3, 12, dtype=FP64, generator=torch.Generator().manual_seed(4), requires_grad=True)

    def loss() -> Tensor:
        found: Tensor = layer(x).square().sum()
        return found

    alpha, beta = layer.trained("default").values()
    check_differences(loss, ((alpha, [(0,), (4,)]), (beta, [(0,), (4,)]), (x, [(0, 0, 0), (1, 2, 11)])))


def test_several_batches_add_up_their_gradients() -> None:
    """A and B are made once for all of them, and gradients go through what was made each time."""
    one, two = _adapted(llama()), _adapted(llama())
    ids = tokens(rows=4)
    one(ids, labels=ids).loss.backward()
    for half in (ids[:2], ids[2:]):
        (two(half, labels=half).loss / 2).backward()
    for name, parameter in parameters_of(one).items():
        grad = parameters_of(two)[name].grad
        assert grad is not None and parameter.grad is not None and parameter.grad.abs().max() > 0
        torch.testing.assert_close(grad, parameter.grad, atol=1e-5, rtol=1e-3)


def test_a_new_adapter_changes_nothing_and_training_does() -> None:
    for build, task in ((llama, "CAUSAL_LM"), (bert, "SEQ_CLS")):
        plain = build()
        expected = plain(tokens()).logits
        model = _adapted(plain, random=False, task_type=task)
        assert torch.equal(model(tokens()).logits, expected)
    model = _adapted(llama(), random=False)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    frozen, first = snapshot(model), model(tokens(), labels=tokens()).loss
    optimiser = torch.optim.AdamW(trained.values(), lr=0.02)
    for _ in range(5):
        optimiser.zero_grad()
        model(tokens(), labels=tokens()).loss.backward()
        optimiser.step()
    assert model(tokens(), labels=tokens()).loss.item() < first.item() - 0.01
    assert all(torch.equal(frozen[name], p) for name, p in snapshot(model).items())
    assert len(trained) == 28 and {p.dtype for p in trained.values()} == {FP32}
    assert all(p.abs().max() > 0 for p in trained.values()), "both sides learn once B is not 0"


def test_the_random_matrices_are_the_same_bits_for_every_dtype_and_a_smaller_k_has_the_first_ones() -> None:
    one, other = _layer(FP32), _layer(BF16)
    assert all(torch.equal(a, b) for a, b in zip(one.factors("default"), other.factors("default"), strict=True))
    side = Side("A", 12, RANK, 7)
    ((_, many),) = list(side.chunks(9))
    ((_, few),) = list(side.chunks(4))
    torch.testing.assert_close(few * 4**0.5, many[:4] * 9**0.5)
    assert many.abs().max() <= 1 / 3


def test_no_more_than_a_chunk_is_there_at_a_time_and_nothing_of_it_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [factor.detach() for factor in _layer().factors("default")]
    monkeypatch.setattr(random_sums, "CHUNK", 2 * RANK * 20)  # two matrices of B
    drawn = [len(matrices) for _, matrices in Side("B", 20, RANK, 7).chunks(BASES)]
    assert drawn == [2, 2, 1]
    layer, saved = _layer(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(tuple(t.shape)), t)[1], lambda t: t):
        torch.stack([factor.sum() for factor in layer.factors("default")]).sum().backward()  # type: ignore[no-untyped-call]
    assert all(BASES not in shape for shape in saved)
    for factor, whole in zip(layer.factors("default"), expected, strict=True):
        torch.testing.assert_close(factor.detach(), whole)
    alpha = layer.trained("default")["alpha"]
    assert alpha.grad is not None
    naive = [float(matrix.sum()) for _, matrices in Side("A", 12, RANK, 7).chunks(BASES) for matrix in matrices]
    torch.testing.assert_close(alpha.grad, torch.tensor(naive))


def test_matrices_are_drawn_once_a_pass_for_all_layers_of_one_length(monkeypatch: pytest.MonkeyPatch) -> None:
    model, drawn = _adapted(llama()), []
    chunks = Side.chunks
    monkeypatch.setattr(Side, "chunks", lambda self, count: (drawn.append((self.side, self.length)), chunks(self, count))[1])
    loss = model(tokens(), labels=tokens()).loss
    sides = {("A", 32), ("A", 48), ("B", 32), ("B", 16), ("B", 48)}
    assert sorted(drawn) == sorted(sides)
    drawn.clear()
    loss.backward()
    assert sorted(drawn) == sorted(sides)
    drawn.clear()
    with torch.no_grad():
        for _ in range(3):
            model(tokens())
    assert sorted(drawn) == sorted(sides), "A and B are kept while the coefficients stay"


def test_nobody_elses_random_numbers_are_touched() -> None:
    model = _adapted(llama())
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    model(tokens(), labels=tokens()).loss.backward()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_changed_coefficients_are_seen() -> None:
    model, other = _adapted(llama()), _adapted(llama())
    first = model(tokens()).logits
    randomise(other, "default", 2)
    expected = other(tokens()).logits
    assert (first - expected).abs().max() > 0.01
    set_state(model, get_state(other))
    torch.testing.assert_close(model(tokens()).logits, expected)
    for parameter, source in zip(parameters_of(model).values(), parameters_of(_adapted(llama())).values(), strict=True):
        parameter.data = source.detach().clone()
    torch.testing.assert_close(model(tokens()).logits, first)
    torch.testing.assert_close(copy.deepcopy(model)(tokens()).logits, first)


def test_a_warm_pass_asks_each_layer_for_its_own_coefficients_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = _adapted(llama()), []
    trained = NolaLinear.trained
    with torch.no_grad():
        model(tokens())
        monkeypatch.setattr(NolaLinear, "trained", lambda self, name: (asked.append(self), trained(self, name))[1])
        model(tokens())
    assert len(asked) == 2 * 14, "A and B of each layer"


def test_an_adapter_made_without_a_count_of_versions_works() -> None:
    with torch.inference_mode():
        model = _adapted(llama())
        found = model(tokens()).logits
    torch.testing.assert_close(found, _adapted(llama())(tokens()).logits)


@pytest.mark.parametrize(
    ("layers", "bases", "numbers"), [(32, 128, 57_344), (40, 256, 143_360), (80, 512, 573_440)], ids=["7B", "13B", "70B"]
)
def test_as_many_numbers_as_the_papers_table_says(layers: int, bases: int, numbers: int) -> None:
    """LLaMA-2: seven linear layers a block, k + k numbers each."""
    with init_empty_weights():
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, hidden_size=128, intermediate_size=256, vocab_size=8))
        made = get_peft_model(model, NolaConfig(r=16, bases=bases))
    assert sum(parameter.numel() for parameter in parameters_of(made).values()) == numbers


def test_merging_includes_what_was_learnt_and_unmerging_restores_every_bit() -> None:
    model = _adapted(llama())
    before, expected = snapshot(model), model(tokens()).logits
    model.merge_adapter()
    torch.testing.assert_close(model(tokens()).logits, expected, atol=2e-4, rtol=1e-4)
    assert sum(not torch.equal(p, before[name]) for name, p in snapshot(model).items()) == 14
    model.unmerge_adapter()
    assert all(torch.equal(p, before[name]) for name, p in snapshot(model).items())
    torch.testing.assert_close(model.merge_and_unload()(tokens()).logits, expected, atol=2e-4, rtol=1e-4)


def test_rows_of_a_batch_go_through_adapters_of_their_own() -> None:
    model = _adapted(llama())
    for name, seed, settings in (("wide", 2, {"r": 6, "alpha": 2.0}), ("second", 3, {"r": RANK, "seed": 9})):
        model.add_adapter(name, NolaConfig(**({"bases": 4} | settings)))  # type: ignore[arg-type]
        randomise(model, name, seed)
    names, ids = ["wide", "__base__", "second", "default"], tokens(rows=4)
    mixed = model(ids, adapter_names=names).logits
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                alone = model(ids[row : row + 1]).logits[0]
        else:
            model.set_adapter(name)
            alone = model(ids[row : row + 1]).logits[0]
        torch.testing.assert_close(mixed[row], alone, atol=1e-4, rtol=1e-4)
    before = model(ids, adapter_names=["second", "__base__", "second", "default"]).logits
    model.delete_adapter("wide")
    assert not any("wide" in layer.shared for _, layer in _nola_layers(model))
    assert torch.equal(model(ids, adapter_names=["second", "__base__", "second", "default"]).logits, before)


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_file_has_the_coefficients_and_nothing_else_and_comes_back(
    low_memory: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    saved = _adapted(llama())
    saved.save_pretrained(tmp_path)
    (tensor,) = load_file(tmp_path / "adapter_model.safetensors").values()
    assert tensor.shape == (28, BASES) and json.loads((tmp_path / "adapter_config.json").read_text())["seed"] == 7
    loaded = PeftModel.from_pretrained(llama(dtype), tmp_path, low_cpu_mem_usage=low_memory)
    assert same(get_state(loaded), get_state(saved))
    assert not any(p.requires_grad for p in loaded.parameters())
    for (_, one), (_, other) in zip(_nola_layers(saved), _nola_layers(loaded), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.factors("default"), other.factors("default"), strict=True))
    if dtype == FP32:
        assert torch.equal(loaded(tokens()).logits, saved(tokens()).logits)


def _nola_layers(model: nn.Module) -> list[tuple[str, NolaLinear]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, NolaLinear)]


def test_a_head_is_in_the_file_too(tmp_path: Path) -> None:
    saved = _adapted(bert(), task_type="SEQ_CLS")
    saved.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(bert(), tmp_path)
    assert same(get_state(loaded), get_state(saved)) and any(name.startswith("head.") for name in get_state(loaded))


@pytest.mark.parametrize(("bits", "error"), [(16, 1e-3), (8, 0.5 / 127 + 4e-3), (4, 0.5 / 7 + 4e-3)])
def test_coefficients_in_fewer_bits(bits: int, error: float, tmp_path: Path) -> None:
    rows = torch.randn(6, 33, generator=torch.Generator().manual_seed(0))
    rows[2] = 0
    rows[3] *= 1e-6
    packed = pack(rows, bits)
    numbers = sum(t.numel() * t.element_size() for t in packed.values())
    assert numbers == -(-rows.numel() * bits // 8) + (2 * len(rows) if bits < 16 else 0)
    back = unpack(packed, 6, 33)
    off = (back - rows).abs().amax(1)
    floor = 1e-7 if bits == 16 else 0.0  # fp16 has no smaller steps
    assert (off <= error * rows.abs().amax(1) + floor).all() and (bits < 16 or off[0] > 0)
    assert torch.equal(back[2], rows[2])
    saved = _adapted(llama(), bits=bits)
    saved.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    for name, tensor in get_state(loaded).items():
        true = get_state(saved)[name]
        assert not torch.equal(tensor, true) and (tensor - true).abs().max() <= error * true.abs().max()


def test_files_that_are_not_of_this_model_are_refused(tmp_path: Path) -> None:
    _adapted(llama()).save_pretrained(tmp_path / "small")
    config = json.loads((tmp_path / "small" / "adapter_config.json").read_text())
    (tmp_path / "small" / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj"]}))
    with pytest.raises(AdapterError, match="holds other coefficients than 4 times 5"):
        PeftModel.from_pretrained(llama(), tmp_path / "small")
    (tmp_path / "small" / "adapter_model.safetensors").unlink()
    torch.save({}, tmp_path / "small" / "adapter_model.bin")
    with pytest.raises(AdapterError, match="and so no NOLA"):
        PeftModel.from_pretrained(llama(), tmp_path / "small")


def test_a_file_with_too_few_codes_is_refused() -> None:
    packed = pack(torch.ones(4, 5), 4)
    with pytest.raises(AdapterError, match="holds other coefficients than 6 times 5"):
        unpack(packed, 6, 5)


def test_settings_that_make_no_nola() -> None:
    for settings in ({"r": 0}, {"bases": 0}, {"bits": 5}):
        with pytest.raises(AdapterError, match="make no NOLA; set r and bases from 1 on"):
            NolaConfig(**settings)


def test_a_state_is_expanded_to_what_the_layers_have() -> None:
    model = _adapted(llama())
    layers = {name.removeprefix("base_model.model."): layer for name, layer in _nola_layers(model)}
    parts = {name: {part: p.detach() for part, p in layer.trained("default").items()} for name, layer in layers.items()}
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
    found = expanded(parts, shapes, RANK, 7)
    for name, layer in layers.items():
        a, b = layer.factors("default")
        torch.testing.assert_close(found[name]["A"], a.detach())
        torch.testing.assert_close(found[name]["B"], b.detach())
    assert torch.equal(combined(torch.zeros(1, 4), Side("B", 5, 2, 0)), torch.zeros(1, 5, 2))
