import copy
import dataclasses
import errno
import json
import os
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftConfig, PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from fedsb.basis.frames import Basis
from fedsb.errors import BasisError, DiskError, StoreError
from fedsb.store.adapters import StoredAdapter, load
from fedsb.store.export import core_config, export_core, export_lora, modules_to_save, target_modules
from fedsb.store.files import sha256_of
from tests.store.samples import basis, linear_shapes, litter, publish, state

# PEFT 0.21.2 asks transformers 5.23 for a name that the latter calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
SHAPES = {"model.layers.0.q_proj": (8, 6), "model.layers.1.q_proj": (8, 6)}


def _llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config)
    model.train(False)
    return model


def _bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=64,
        max_position_embeddings=32,
        id2label={0: "a", 1: "b", 2: "c"},
    )
    model = BertForSequenceClassification(config)
    model.train(False)
    return model


def _merged(model: nn.Module, stored: StoredAdapter, frames: Basis) -> nn.Module:
    """By hand: W + s B R A in every adapted layer, and the head put in place."""
    merged = copy.deepcopy(model)
    for layer, core in ((layer, parts["core"]) for layer, parts in stored.layers.items()):
        change = frames.B[layer].float() @ core @ frames.A[layer].float()
        merged.get_submodule(layer).weight.data += change  # type: ignore[operator]
    merged.load_state_dict(stored.head, strict=False)
    return merged


def _stored(tmp_path: Path, frames: Basis, head: dict[str, torch.Tensor] | None = None) -> StoredAdapter:
    tensors = state(7, tuple(frames.B)) | (head or {})
    publish(tmp_path / "store", "hospital-a", tensors, frames.fingerprint)
    return load(tmp_path / "store", "hospital-a")


def _adapted(model: nn.Module) -> set[str]:
    """Layers of the base model on which PEFT has put a LoRA."""
    names = (name for name, module in model.named_modules() if hasattr(module, "lora_A") and len(module.lora_A))
    return {name.removeprefix("base_model.model.") for name in names}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmodified_peft_computes_the_same_from_an_export(tmp_path: Path, dtype: torch.dtype) -> None:
    model = _llama()
    shapes = {name: shape for name, shape in linear_shapes(model).items() if name != "lm_head"}
    frames = basis(shapes, dtype=dtype)
    stored = _stored(tmp_path, frames)
    out = export_lora(stored, frames, tmp_path / "out")
    tokens = torch.randint(0, 64, (2, 9))
    with torch.no_grad():
        base, expected = model(tokens).logits, _merged(model, stored, frames)(tokens).logits
        peft_model = PeftModel.from_pretrained(model, str(out))
        actual = peft_model(tokens).logits
    assert (expected - base).abs().max() > 0.05
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    assert _adapted(peft_model) == shapes.keys()


def test_an_export_obeys_the_file_rules_of_vllm(tmp_path: Path) -> None:
    model = _llama()
    frames = basis({name: shape for name, shape in linear_shapes(model).items() if name != "lm_head"})
    out = export_lora(_stored(tmp_path, frames), frames, tmp_path / "out")
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["lora_alpha"] / config["r"] == 1.0 and config["r"] == 4
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert (config["peft_type"], config["bias"], config["task_type"]) == ("LORA", "none", "CAUSAL_LM")
    assert config["init_lora_weights"] is True and config["inference_mode"] is True
    assert config["modules_to_save"] is None and config["base_model_name_or_path"] == "tiny/model"
    assert not config["use_dora"] and not config["use_rslora"] and not config["rank_pattern"]
    assert config.keys() <= {field.name for field in dataclasses.fields(LoraConfig)}
    weights = load_file(out / "adapter_model.safetensors")
    pattern = re.compile(r"base_model\.model\.model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj\.lora_[AB]\.weight")
    assert all(pattern.fullmatch(name) for name in weights) and len(weights) == 2 * len(frames.B)
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    assert {path.name for path in out.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
        "manifest.json",
    }


def test_the_core_is_on_the_b_side(tmp_path: Path) -> None:
    frames = basis(SHAPES)
    stored = _stored(tmp_path, frames)
    weights = load_file(export_lora(stored, frames, tmp_path / "out") / "adapter_model.safetensors")
    for layer in SHAPES:
        exact = frames.B[layer].double() @ stored.layers[layer]["core"].double()
        assert torch.equal(weights[f"base_model.model.{layer}.lora_B.weight"], exact.float())
        assert torch.equal(weights[f"base_model.model.{layer}.lora_A.weight"], frames.A[layer])


def test_an_export_in_bf16_rounds_once(tmp_path: Path) -> None:
    frames = basis(SHAPES)
    stored = _stored(tmp_path, frames)
    out = export_lora(stored, frames, tmp_path / "out", dtype=torch.bfloat16)
    weights = load_file(out / "adapter_model.safetensors")
    layer = "model.layers.0.q_proj"
    exact = frames.B[layer].double() @ stored.layers[layer]["core"].double()
    assert torch.equal(weights[f"base_model.model.{layer}.lora_B.weight"], exact.bfloat16())
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


def test_a_classifier_travels_along(tmp_path: Path) -> None:
    model = _bert()
    shapes = {name: shape for name, shape in linear_shapes(model).items() if name.endswith((".query", ".value"))}
    frames = basis(shapes)
    head = {"head.classifier.weight": torch.randn(3, 32), "head.classifier.bias": torch.randn(3)}
    stored = _stored(tmp_path, frames, head)
    out = export_lora(stored, frames, tmp_path / "out")
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS" and config["modules_to_save"] == ["classifier"]
    assert config["target_modules"] == ["query", "value"]
    weights = load_file(out / "adapter_model.safetensors")
    assert {n for n in weights if "lora_" not in n} == {f"base_model.model.classifier.{p}" for p in ("weight", "bias")}
    tokens = torch.randint(0, 64, (2, 9))
    with torch.no_grad():
        expected = _merged(model, stored, frames)(tokens).logits
        peft_model = PeftModel.from_pretrained(model, str(out))
        actual = peft_model(tokens).logits
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    assert _adapted(peft_model) == shapes.keys()


def test_ambiguous_leaf_names_become_full_paths_and_peft_adapts_just_those(tmp_path: Path) -> None:
    model = _bert()
    layers = {name: s for name, s in linear_shapes(model).items() if name.endswith("attention.output.dense")}
    frames = basis(layers)
    head = {"head.classifier.weight": torch.zeros(3, 32), "head.classifier.bias": torch.zeros(3)}
    stored = _stored(tmp_path, frames, head)
    out = export_lora(stored, frames, tmp_path / "out", modules=linear_shapes(model))
    assert json.loads((out / "adapter_config.json").read_text())["target_modules"] == sorted(layers)
    assert _adapted(PeftModel.from_pretrained(model, str(out))) == layers.keys()


@pytest.mark.parametrize(
    ("layers", "modules", "expected"),
    [
        (["m.0.a.q", "m.1.a.q"], [], ["q"]),
        (["m.0.a.q", "m.1.a.q", "m.0.a.k"], [], None),  # k is missing in the second layer
        (["m.1.a.q", "m.2.a.q"], [], None),  # not from the first layer on
        (["m.0.a.dense", "m.0.b.dense"], [], None),  # one leaf in two places
        (["enc.0.q", "dec.0.q"], [], None),  # two stacks
        (["first"], [], None),  # outside any stack
        (["m.0.a.q"], ["m.0.a.q", "m.0.a.k"], ["q"]),
        (["m.0.a.q"], ["m.0.a.q", "m.1.a.q"], None),
        (["m.0.a.dense", "m.0.b.dense"], ["m.0.a.dense", "m.0.b.dense", "m.0.b"], ["dense"]),
        (["m.0.q"], ["m.0.q", "q"], None),  # PEFT also takes a module of just that name
        (["m.0.q"], ["m.0.q", "m.0.faq"], ["q"]),
    ],
)
def test_leaf_names_only_where_they_name_exactly_the_layers(
    layers: list[str], modules: list[str], expected: list[str] | None
) -> None:
    assert target_modules(layers, modules) == (expected or sorted(layers))


@given(st.data())
def test_target_modules_match_what_peft_would_adapt(data: st.DataObject) -> None:
    names = [f"m.{i}.{part}.{leaf}" for i in range(2) for part in "ab" for leaf in ("q", "k")]
    layers = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    targets = target_modules(layers, names)
    assert {n for n in names if any(n == t or n.endswith(f".{t}") for t in targets)} == set(layers)


def test_modules_to_save_name_the_whole_head() -> None:
    assert modules_to_save(["classifier.weight", "classifier.bias"]) == ["classifier"]
    assert modules_to_save(["classifier.dense.weight", "classifier.out_proj.bias"]) == ["classifier"]
    assert modules_to_save(["bert.pooler.dense.weight", "score.weight"]) == ["bert.pooler.dense", "score"]


def test_our_own_format_keeps_core_and_basis_apart(tmp_path: Path) -> None:
    frames = basis(SHAPES, dtype=torch.bfloat16)
    stored = _stored(tmp_path, frames, {"head.score.weight": torch.randn(2, 8)})
    out = export_core(stored, frames, tmp_path / "out")
    weights = load_file(out / "adapter_model.safetensors")
    for layer in SHAPES:
        assert torch.equal(weights.pop(f"base_model.model.{layer}.fedsb_core.weight"), stored.layers[layer]["core"])
        assert torch.equal(weights.pop(f"base_model.model.{layer}.fedsb_A"), frames.A[layer])
        assert torch.equal(weights.pop(f"base_model.model.{layer}.fedsb_B"), frames.B[layer])
    assert list(weights) == ["base_model.model.score.weight"]
    config = json.loads((out / "adapter_config.json").read_text())
    assert config == core_config(stored)
    assert (config["peft_type"], config["method"], config["r"]) == ("FEDSB", "lora-sb", 4)
    assert config["basis_fingerprint"] == frames.fingerprint and config["target_modules"] == ["q_proj"]


def test_the_manifest_holds_the_hash_of_every_other_file(tmp_path: Path) -> None:
    frames = basis(SHAPES)
    stored = _stored(tmp_path, frames)
    for export in (export_lora, export_core):
        out = export(stored, frames, tmp_path / export.__name__)
        manifest = json.loads((out / "manifest.json").read_text())
        files = manifest.pop("files")
        assert files == {p.name: sha256_of(p) for p in out.iterdir() if p.name != "manifest.json"} and len(files) == 3
        assert manifest == stored.manifest.model_dump(mode="json")


def test_the_card_says_what_it_is_and_how_to_load_it(tmp_path: Path) -> None:
    frames = basis(SHAPES)
    stored = _stored(tmp_path, frames)
    card = (export_lora(stored, frames, tmp_path / "out") / "README.md").read_text()
    for told in ("tiny/model", "lora-sb, rank 4", "| round | 5 |", frames.fingerprint, "PeftModel.from_pretrained"):
        assert told in card
    assert "--max-lora-rank 8 " in card  # vLLM knows no rank 4
    assert "vllm" not in (export_core(stored, frames, tmp_path / "core") / "README.md").read_text()


def test_another_basis_is_refused(tmp_path: Path) -> None:
    frames = basis(SHAPES)
    stored = _stored(tmp_path, frames)
    for export in (export_lora, export_core):
        with pytest.raises(BasisError, match="was trained on basis"):
            export(stored, basis(SHAPES, seed=1), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_cores_of_other_layers_than_the_basis_are_refused(tmp_path: Path) -> None:
    frames = basis(SHAPES)
    publish(tmp_path / "store", "a", state(0, ("model.layers.0.q_proj",)), frames.fingerprint)
    with pytest.raises(BasisError, match=r"a \(1 layers, rank 4\) lacks the layers or the rank of its basis \(2 layers"):
        export_lora(load(tmp_path / "store", "a"), frames, tmp_path / "out")


def test_an_older_export_is_replaced_and_nothing_else_is(tmp_path: Path) -> None:
    frames = basis(SHAPES)
    stored = _stored(tmp_path, frames)
    out = tmp_path / "out"
    out.mkdir()
    export_lora(stored, frames, out)  # an empty folder may be there
    export_core(stored, frames, out)
    assert _peft_type(out) == "FEDSB"
    (out / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"out: holds notes\.txt, which no export wrote"):
        export_lora(stored, frames, out)
    assert (out / "notes.txt").read_text() == "mine" and _peft_type(out) == "FEDSB"
    version = tmp_path / "store" / "hospital-a" / "v0001"
    with pytest.raises(StoreError, match="is not empty and no export"):
        export_lora(stored, frames, version)  # has a manifest.json, but of the store
    with pytest.raises(StoreError, match="is not empty and no export"):
        export_lora(stored, frames, tmp_path)
    assert load(tmp_path / "store", "hospital-a").manifest == stored.manifest


def _peft_type(out: Path) -> str:
    return str(json.loads((out / "adapter_config.json").read_text())["peft_type"])


def test_a_full_disk_leaves_the_older_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = basis(SHAPES)
    stored = _stored(tmp_path, frames)
    out = export_lora(stored, frames, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def _full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for call in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, _full)
            with pytest.raises(DiskError, match="free some space"):
                export_core(stored, frames, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert litter(tmp_path) == []
    assert PeftConfig.from_pretrained(str(out)).peft_type == "LORA"
