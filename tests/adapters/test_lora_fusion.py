"""LoRAFusion: coefficients of a pool, against the sums written out; the pool's files; magnitudes; counts of the paper."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from fedsb.adapters.lora_fusion import Fusion, LoraFusionConfig, LoraFusionProductConfig
from fedsb.adapters.lora_sb import LoraSbLinear
from fedsb.adapters.pool import members_of, read_lora, read_pool
from fedsb.adapters.state import get_state, layers_of, parameters_of
from fedsb.errors import AdapterError, BasisError
from tests.adapters.samples import llama, randomise, same, snapshot, tokens

FP32, BF16, FP64 = torch.float32, torch.bfloat16, torch.float64
CONFIGS: Any = {"sum": LoraFusionConfig, "product": LoraFusionProductConfig}
READINGS = pytest.mark.parametrize("reading", CONFIGS)


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    """Three plain LoRAs, of ranks 2, 3 and 2; the last adapts attention alone."""
    for number, (rank, alpha, targets) in enumerate([(2, 4, "all-linear"), (3, 3, "all-linear"), (2, 1, ["q_proj", "v_proj"])]):
        model = get_peft_model(llama(), LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets))
        randomise(model, "default", number + 1)
        with torch.no_grad():
            for parameter in parameters_of(model).values():
                parameter *= 0.3
        model.save_pretrained(tmp_path / "pool" / f"member-{number}")
    return tmp_path / "pool"


def _adapted(pool: Path, reading: str, *, random: bool = True, dtype: torch.dtype = FP32, **settings: Any) -> PeftModel:
    config = CONFIGS[reading](**({"r": 3, "pool": members_of(pool), "magnitudes": False} | settings))
    made = get_peft_model(llama(dtype), config).eval()
    if random:
        randomise(made, "default", 5)
    return made


@READINGS
def test_updates_are_the_sums_written_out(pool: Path, reading: str) -> None:
    model, members = _adapted(pool, reading), [read_lora(folder) for folder in members_of(pool)]
    for name, layer in layers_of(model).items():
        c = layer.core("default").coefficients.detach().double()
        pairs = [(i, *member[name]) for i, member in enumerate(members) if name in member]
        expected = torch.zeros(layer.out_features, layer.in_features, dtype=FP64)
        for i, b, a in pairs:
            if reading == "sum":
                expected += c[i] * b.double() @ a.double()
                continue
            for j, _, other in pairs:
                narrow = min(b.shape[1], len(other))  # of different ranks: what is beyond the smaller is zero in it
                expected += c[i] * c[j] * b[:, :narrow].double() @ other[:narrow].double()
        torch.testing.assert_close(layer.get_delta_weight("default").double(), expected, atol=1e-5, rtol=1e-5)
        x = torch.randn(2, 5, layer.in_features)
        y = x.double() @ (layer.base_layer.weight.double() + expected).T
        torch.testing.assert_close(layer(x).double(), y, atol=1e-4, rtol=1e-4)


def test_one_coefficient_of_one_is_that_adapter(pool: Path) -> None:
    model = _adapted(pool, "sum", random=False)
    for number, folder in enumerate(members_of(pool)):
        with torch.no_grad():
            for parameter in parameters_of(model).values():
                parameter.zero_()
                parameter[number] = 1
        alone = PeftModel.from_pretrained(llama(), folder)
        torch.testing.assert_close(model(tokens()).logits, alone(tokens()).logits, atol=1e-4, rtol=1e-4)


def test_the_sum_starts_from_the_base_model_and_the_product_from_the_first_adapter(pool: Path) -> None:
    assert torch.equal(_adapted(pool, "sum", random=False, magnitudes=True)(tokens()).logits, llama()(tokens()).logits)
    first = PeftModel.from_pretrained(llama(), members_of(pool)[0])
    torch.testing.assert_close(_adapted(pool, "product", random=False)(tokens()).logits, first(tokens()).logits)


def test_members_may_have_more_rank_than_a_layer_has_room_for(tmp_path: Path) -> None:
    """As exports that are filled up to the largest layer's rank have."""
    wide = get_peft_model(llama(), LoraConfig(r=20, lora_alpha=20, target_modules="all-linear"))  # k_proj has 16 outputs
    randomise(wide, "default", 1)
    wide.save_pretrained(tmp_path / "pool" / "wide")
    model = get_peft_model(llama(), LoraFusionConfig(r=20, pool=[str(tmp_path / "pool" / "wide")], magnitudes=False)).eval()
    with torch.no_grad():
        for parameter in parameters_of(model).values():
            parameter.fill_(1)
    expected = PeftModel.from_pretrained(llama(), tmp_path / "pool" / "wide")(tokens()).logits
    torch.testing.assert_close(model(tokens()).logits, expected, atol=1e-3, rtol=1e-3)


@READINGS
def test_gradients_are_those_of_finite_differences(reading: str) -> None:
    """The released code's gradient is 2·c·⟨…⟩, which is 0 at c = 0 and of the wrong sign below."""
    core = Fusion(3, 2, product=reading == "product").double()
    draw = torch.Generator().manual_seed(0)
    z, w = (torch.randn(4, 6, dtype=FP64, generator=draw) for _ in range(2))
    for c in ([0.0, 0.0, 0.0], [-0.4, 0.3, 1.1]):
        with torch.no_grad():
            core.coefficients.copy_(torch.tensor(c))
        core.zero_grad()
        (core(z) * w).sum().backward()
        for place in range(3):
            with torch.no_grad():
                core.coefficients[place] += 1e-5
                above = (core(z) * w).sum()
                core.coefficients[place] -= 2e-5
                below = (core(z) * w).sum()
                core.coefficients[place] += 1e-5
            assert core.coefficients.grad is not None
            found = float(core.coefficients.grad[place])
            assert float((above - below) / 2e-5) == pytest.approx(found, rel=1e-6, abs=1e-8)
            assert (abs(found) > 0.01) == (reading == "sum" or any(c))
        torch.testing.assert_close(core(z), z @ core.weight.T)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_magnitudes_scale_what_comes_out_but_for_the_bias(bias: bool, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(1)
    base = nn.Linear(12, 20, bias=bias).to(dtype).requires_grad_(False)
    layer = LoraSbLinear(base, "default", Fusion(2, 3, product=False), magnitudes=True)
    layer.set_frames("default", torch.randn(20, 6, generator=draw), torch.randn(6, 12, generator=draw))
    with torch.no_grad():
        for parameter in layer.trained("default").values():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
    c, m = (parameter.detach().double() for parameter in layer.trained("default").values())
    frames = layer.frames("default")
    product = frames.B.double() @ torch.block_diag(*(value * torch.eye(3) for value in c)).double() @ frames.A.double()
    weight = m[:, None] * (base.weight.double() + product)
    x = torch.randn(3, 4, 12, generator=draw).to(dtype)
    expected = x.double() @ weight.T + (base.bias.double() if bias else 0)
    close = {"atol": 1e-4, "rtol": 1e-4} if dtype == FP32 else {"atol": 0.5, "rtol": 0.05}
    torch.testing.assert_close(layer(x).double(), expected, **close)
    layer.update_layer("plain", nn.Linear(3, 3, bias=False))
    mixed = layer(x, adapter_names=["default", "__base__", "default"])
    torch.testing.assert_close(mixed[[0, 2]], layer(x)[[0, 2]], **close)
    torch.testing.assert_close(mixed[1], base(x)[1], **close)
    before = base.weight.clone()
    layer.merge(adapter_names=["default"])
    torch.testing.assert_close(layer(x).double(), expected, **close)
    layer.unmerge()
    assert torch.equal(base.weight, before)


def test_counts_are_the_papers() -> None:
    """flan-t5-large, q and v, a pool of 20: 144 layers, of which 48 blocks share coefficients in the released code."""
    with init_empty_weights():
        sizes_of = {"d_model": 1024, "d_kv": 64, "num_heads": 16, "d_ff": 8, "num_layers": 24, "num_decoder_layers": 24}
        config = T5Config(vocab_size=8, feed_forward_proj="gated-gelu", **sizes_of)
        model = T5ForConditionalGeneration(config)
        settings = {"r": 16, "heads": 20, "basis": "later", "target_modules": ["q", "v"]}
        made = get_peft_model(model, LoraFusionConfig(**settings))  # type: ignore[arg-type]
    sizes = {name: parameter.numel() for name, parameter in parameters_of(made).items()}
    magnitudes = sum(size for name, size in sizes.items() if name.endswith("magnitude"))
    coefficients = sum(size for name, size in sizes.items() if name.endswith("fusion"))
    assert len(sizes) == 2 * 144 and magnitudes == 147_456 and coefficients == 144 * 20
    blocks = {".".join(name.split(".")[:3]) for name in sizes}
    assert magnitudes + 20 * len(blocks) == 148_416, "the paper's count, where the matrices of a block share coefficients"
    with init_empty_weights():
        lora = get_peft_model(T5ForConditionalGeneration(config), LoraConfig(r=16, target_modules=["q", "v"]))
    assert sum(parameter.numel() for parameter in parameters_of(lora).values()) == 4_718_592


@pytest.mark.parametrize("whole", [False, True])
def test_a_saved_mixture_comes_back(pool: Path, whole: bool, tmp_path: Path) -> None:
    saved = _adapted(pool, "sum", magnitudes=True, save_basis=whole)
    saved.save_pretrained(tmp_path / "saved")
    tensors = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert any("fedsb_B" in name for name in tensors) == whole
    if not whole:
        assert sum(t.numel() for t in tensors.values()) == sum(t.numel() for t in get_state(saved).values())
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "saved")
    assert isinstance(loaded.peft_config["default"], LoraFusionConfig) and same(get_state(loaded), get_state(saved))
    torch.testing.assert_close(loaded(tokens()).logits, saved(tokens()).logits)
    weights = members_of(pool)[0] / "adapter_model.safetensors"
    weights.write_bytes((members_of(pool)[1] / "adapter_model.safetensors").read_bytes())
    (members_of(pool)[0] / "adapter_config.json").write_text((members_of(pool)[1] / "adapter_config.json").read_text())
    if whole:
        PeftModel.from_pretrained(llama(), tmp_path / "saved")
        return
    with pytest.raises(BasisError, match='the basis rebuilt here from basis = "pool"'):
        PeftModel.from_pretrained(llama(), tmp_path / "saved")


def test_only_the_mixture_is_trained(pool: Path) -> None:
    model = _adapted(pool, "sum", random=False, magnitudes=True)
    frozen, start = snapshot(model), get_state(model)
    model(tokens(), labels=tokens()).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 28 and {p.dtype for p in trained} == {FP32}
    torch.optim.SGD(trained, lr=1.0).step()
    assert all(not torch.equal(start[name], t) for name, t in get_state(model).items())
    assert all(torch.equal(frozen[name], p) for name, p in snapshot(model).items())


def test_merge_restores_every_bit(pool: Path) -> None:
    model = _adapted(pool, "product", magnitudes=True)
    before, expected = snapshot(model), model(tokens()).logits
    model.merge_adapter()
    torch.testing.assert_close(model(tokens()).logits, expected, atol=2e-4, rtol=1e-4)
    model.unmerge_adapter()
    assert all(torch.equal(p, before[name]) for name, p in snapshot(model).items())


def test_pools_that_cannot_be_are_refused(pool: Path, tmp_path: Path) -> None:
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers_of(_adapted(pool, "sum")).items()}
    with pytest.raises(BasisError, match="holds no folders with adapter_config.json; fill it with `fedsb export"):
        members_of(tmp_path / "nothing")
    with pytest.raises(BasisError, match=r"holds 3 adapters, and adapter\.heads = 4; set it to 3"):
        read_pool(pool, shapes, 3, 4)
    with pytest.raises(BasisError, match=r"member-1: has rank 3, and the run 2; set adapter\.rank = 3"):
        read_pool(pool, shapes, 2, 3)
    without = {name: shape for name, shape in shapes.items() if "up_proj" not in name}
    with pytest.raises(BasisError, match=r"member-0: adapts .*up_proj, which the run does not; add it"):
        read_pool(pool, without, 3, 3)
    wide = {name: (out, in_ + 1) for name, (out, in_) in shapes.items()}
    with pytest.raises(BasisError, match="has another shape than in this model; take the adapter out"):
        read_pool(pool, wide, 3, 3)
    file = members_of(pool)[0] / "adapter_config.json"
    told = json.loads(file.read_text())
    for change, said in (
        ({"use_dora": True}, "has use_dora, and a pool takes plain LoRAs"),
        ({"rank_pattern": {"q_proj": 1}}, "has rank_pattern"),
        ({"init_lora_weights": "pissa"}, "has init_lora_weights = pissa"),
        ({"r": 0}, "is no adapter that can be read"),
        ({"r": "x"}, "is no adapter that can be read"),
        ({"lora_alpha": None}, "is no adapter that can be read"),
        ({"peft_type": "IA3"}, "is of type IA3"),
        ({"bias": "all"}, "with bias all"),
    ):
        file.write_text(json.dumps(told | change))
        with pytest.raises(BasisError, match=said):
            read_lora(file.parent)
    file.write_text("[]")
    with pytest.raises(BasisError, match="is no adapter that can be read"):
        read_lora(file.parent)
    file.write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(BasisError, match="is no adapter that can be read"):
        read_lora(file.parent)
    file.write_text("{")
    with pytest.raises(BasisError, match="is no adapter that can be read"):
        read_lora(file.parent)
    file.write_text(json.dumps(told))
    (file.parent / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(BasisError, match="is no adapter that can be read"):
        read_lora(file.parent)


def test_scales_of_peft_are_in_b(pool: Path) -> None:
    file = members_of(pool)[0] / "adapter_config.json"
    plain = read_lora(file.parent)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_rslora": True}))
    for layer, (b, a) in read_lora(file.parent).items():
        torch.testing.assert_close(b, plain[layer][0] * 2**0.5)
        assert torch.equal(a, plain[layer][1])


def test_what_a_member_does_not_adapt_is_zero_in_its_part(pool: Path) -> None:
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers_of(_adapted(pool, "sum")).items()}
    basis = read_pool(pool, shapes, 3, 3)
    b = basis.B["model.layers.0.mlp.up_proj"]
    assert b.shape == (48, 9) and not b[:, 6:].any() and b[:, :2].all() and not b[:, 2].any()


def test_settings_that_make_no_pool(pool: Path) -> None:
    with pytest.raises(ValueError, match="pool lists 0 adapters and heads = 0; list each folder"):
        LoraFusionConfig(r=3)
    with pytest.raises(ValueError, match="pool lists 3 adapters and heads = 2"):
        LoraFusionConfig(r=3, pool=[str(folder) for folder in members_of(pool)], heads=2)


def test_a_method_that_this_version_lacks(tmp_path: Path, pool: Path) -> None:
    _adapted(pool, "sum").save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"method": "magic"}))
    with pytest.raises(AdapterError, match="of the method 'magic'"):
        PeftModel.from_pretrained(llama(), tmp_path / "saved")
