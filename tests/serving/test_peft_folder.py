"""Plain LoRA folders: what PEFT wrote is served as PEFT has it, and whatever else lies there is refused by a sentence."""

import json
import os
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save as to_safetensors
from torch import Tensor

from fedsb.errors import AdapterError, FedsbError, StoreError
from fedsb.serving.bank import Bank
from fedsb.serving.mixed import mix
from fedsb.serving.peft_folder import CONFIG_FILE, WEIGHTS_FILE, read_lora
from fedsb.serving.sources import Folders, source_of
from fedsb.serving.tenants import Tenants
from tests.adapters.samples import llama

TOKENS = torch.tensor([[5, 6, 7, 8]])
LAYER = "model.layers.0.self_attn.q_proj"
SIDES = {LAYER: (32, 32)}
GOOD: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}


def written(folder: Path, seed: int = 0, **told: Any) -> Any:
    """A random LoRA, as PEFT writes it; PEFT's model."""
    told = {"r": 3, "init_lora_weights": False, **told}
    config = LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], **told)
    torch.manual_seed(seed)
    model = get_peft_model(llama(), config)
    model.save_pretrained(folder)
    return model.eval()


def tensors(**changes: Tensor | None) -> dict[str, Tensor]:
    """What a good file holds; a change of None leaves a tensor out."""
    draw = torch.Generator().manual_seed(0)
    found: dict[str, Tensor | None] = {
        "A": torch.randn(2, 32, generator=draw),
        "B": torch.randn(32, 2, generator=draw),
        **changes,
    }
    return {f"base_model.model.{LAYER}.lora_{k}.weight": t for k, t in found.items() if t is not None}


def folder_of(folder: Path, config: Mapping[str, Any] | bytes = GOOD, weights: bytes | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_bytes(config if isinstance(config, bytes) else json.dumps(config).encode())
    (folder / WEIGHTS_FILE).write_bytes(to_safetensors(tensors()) if weights is None else weights)
    return folder


def served(root: Path, name: str) -> Tensor:
    """Logits of a model that serves a folder's adapter beside others."""
    bank = Bank(4)
    model = mix(llama(), bank)
    tenants = Tenants([source_of(root, "", bank.layers)], bank)
    places = [tenants.take(each).place for each in tenants.names()]
    with bank.using([*places, None]), torch.no_grad():
        found: Tensor = model(TOKENS.expand(len(places) + 1, -1)).logits
    return found[tenants.names().index(name)]


@pytest.mark.parametrize(
    "told",
    [
        {},
        {"use_rslora": True, "lora_alpha": 5},
        {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"down_proj": 7, LAYER: 3}},
        {"init_lora_weights": "gaussian", "lora_dropout": 0.1},
    ],
)
def test_it_is_served_as_peft_has_it(told: dict[str, Any], tmp_path: Path) -> None:
    written(tmp_path / "one", 1, **told)
    model = written(tmp_path / "two", 2, **told)
    if "init_lora_weights" in told:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        model.save_pretrained(tmp_path / "two")
    with torch.no_grad():
        wanted = PeftModel.from_pretrained(llama(), str(tmp_path / "two")).eval()(TOKENS).logits[0]
        plain = llama()(TOKENS).logits[0]
    assert (wanted - plain).abs().max() > 0.01
    torch.testing.assert_close(served(tmp_path, "two"), wanted, rtol=1e-4, atol=1e-4)


def test_a_folder_that_was_replaced_is_another_version(tmp_path: Path) -> None:
    written(tmp_path / "one", 1)
    bank = Bank(4)
    mix(llama(), bank)
    tenants = Tenants([source_of(tmp_path, "", bank.layers)], bank)
    first = tenants.take("one")
    written(tmp_path / "new", 2)
    os.utime(tmp_path / "new" / WEIGHTS_FILE, ns=(first.version + 10**9,) * 2)
    shutil.rmtree(tmp_path / "one")
    (tmp_path / "new").rename(tmp_path / "one")
    second = tenants.take("one")
    assert second.version > first.version and second.place != first.place and tenants.names() == ["one"]


def test_links_pipes_and_strange_names_are_not_there(tmp_path: Path) -> None:
    outside, root = folder_of(tmp_path / "outside"), tmp_path / "root"
    folder_of(root / "good")
    (root / "linked").symlink_to(outside)
    folder_of(root / "half")
    (root / "half" / WEIGHTS_FILE).unlink()
    (root / "half" / WEIGHTS_FILE).symlink_to(outside / WEIGHTS_FILE)
    folder_of(root / "pipe")
    (root / "pipe" / WEIGHTS_FILE).unlink()
    os.mkfifo(root / "pipe" / WEIGHTS_FILE)
    folder_of(root / "Upper")
    source = Folders(root, SIDES)
    assert source.names() == ["good"]
    for name in ("linked", "half", "pipe", "Upper", "../outside", "good/../good", "", ".", "nobody"):
        assert not source.has(name)
    with pytest.raises(StoreError, match="has no adapter nobody; name one of its folders"):
        source.version("nobody")
    with pytest.raises(StoreError, match="there is no such folder"):
        source_of(tmp_path / "nowhere", "", SIDES)


def _changed(**changes: Any) -> dict[str, Any]:
    return {**GOOD, **changes}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (b"{", "is no JSON"),
        (b"[" * 100_000, "is no JSON"),
        (b"[]", "is no configuration of a LoRA"),
        (_changed(peft_type="IA3"), "is no configuration of a LoRA"),
        (_changed(use_dora=True), "uses use_dora, which no batch"),
        (_changed(modules_to_save=["lm_head"]), "uses modules_to_save"),
        (_changed(layer_replication=[[0, 1]]), "uses layer_replication"),
        (_changed(bias="all"), "changes the base model's biases or weights"),
        (_changed(init_lora_weights="pissa"), "changes the base model's biases or weights"),
        (_changed(init_lora_weights=["pissa"]), "changes the base model's biases or weights"),
        (_changed(r=3), "is of rank 2, and its configuration says another"),
        (_changed(r=0), "r is no number above 0"),
        (_changed(r="2"), "r is no number above 0"),
        (_changed(lora_alpha=float("nan")), "lora_alpha is no number above 0"),
        (_changed(lora_alpha=None), "lora_alpha is no number above 0"),
        (_changed(alpha_pattern=[1]), "alpha_pattern is no table"),
        (_changed(alpha_pattern={"(a+)+$": 1}), "has a pattern"),
        (_changed(alpha_pattern={"q_proj": "x"}), "q_proj is no number above 0"),
        (b" " * (1 << 20) + b"{}", "has more than 1048576 bytes"),
    ],
)
def test_configurations_that_are_none(config: dict[str, Any] | bytes, said: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=said):
        read_lora(folder_of(tmp_path / "x", config), SIDES)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (tensors(B=None), "has no B; export it again"),
        (tensors(A=torch.zeros(2, 31)), r"has A \(2, 31\) and B \(32, 2\), and this model takes \(r, 32\) and \(32, r\)"),
        (tensors(A=torch.zeros(2)), r"has A \(2,\)"),
        (tensors(A=torch.zeros(0, 32), B=torch.zeros(32, 0)), r"has A \(0, 32\)"),
        (tensors(A=torch.full((2, 32), torch.nan)), "holds NaN or infinity"),
        (tensors(A=torch.zeros(2, 32, dtype=torch.int8)), "is int8; write it as fp32 or bf16"),
        ({"base_model.model.other.lora_A.weight": torch.zeros(2, 32)}, "has a layer 'other' that this model does not have"),
        ({"core": torch.zeros(2, 2)}, "has a tensor 'core', which is no lora_A or lora_B"),
        ({}, "holds no tensors"),
    ],
)
def test_weights_that_are_none(weights: dict[str, Tensor], said: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=said):
        read_lora(folder_of(tmp_path / "x", GOOD, to_safetensors(weights)), SIDES)


def test_a_file_that_is_far_too_large_is_not_read_whole(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "x")
    with (folder / WEIGHTS_FILE).open("r+b") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(AdapterError, match="and is no adapter of this model"):
        read_lora(folder, SIDES)


FILE = to_safetensors(tensors())
HEADER = int.from_bytes(FILE[:8], "little")


def _header(change: Mapping[str, Any]) -> bytes:
    told = json.loads(FILE[8 : 8 + HEADER])
    name = next(iter(told))
    text = json.dumps({**told, name: {**told[name], **change}}).encode()
    return len(text).to_bytes(8, "little") + text + FILE[8 + HEADER :]


BROKEN = st.one_of(
    st.integers(0, len(FILE) - 1).map(lambda n: FILE[:n]),  # truncated
    st.binary(max_size=64).map(lambda tail: FILE + b"\0" + tail),
    st.binary(max_size=200),
    st.integers(0, 2**64 - 1).filter(lambda n: n != HEADER).map(lambda n: n.to_bytes(8, "little") + FILE[8:]),  # huge header
    st.tuples(st.integers(8, 7 + HEADER), st.integers(1, 255)).map(  # a flipped byte of the header
        lambda at: FILE[: at[0]] + bytes([FILE[at[0]] ^ at[1]]) + FILE[at[0] + 1 :]
    ),
    st.sampled_from(["F64", "I64", "BOOL", "U8", "F8_E4M3", "BF16", "F16", "../F32", ""]).map(lambda d: _header({"dtype": d})),
    st.lists(st.integers(-1, 2**63), max_size=4).map(lambda shape: _header({"shape": shape})),
    st.lists(st.integers(0, 2**63), min_size=2, max_size=2).map(lambda at: _header({"data_offsets": at})),
    st.text(max_size=30).map(lambda name: to_safetensors({**tensors(), f"../{name}": torch.zeros(1)})),
    st.sampled_from([torch.nan, torch.inf, -torch.inf]).map(lambda v: to_safetensors(tensors(B=torch.full((32, 2), v)))),
    st.integers(0, 4).map(lambda protocol: pickle.dumps({"A": [1.0]}, protocol=protocol)),
)


@settings(max_examples=10_000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(BROKEN)
def test_ten_thousand_files_that_are_no_adapters_are_refused(tmp_path: Path, data: bytes) -> None:
    """Each by one of our errors, of one sentence; a header that was changed and means the same is none of them."""
    folder = folder_of(tmp_path / "x", GOOD, data)
    try:
        found = read_lora(folder, SIDES)
    except FedsbError as error:
        said = str(error)
        assert said
        assert "\n" not in said.strip()
        return
    assert found.keys() == SIDES.keys() and all(t.isfinite().all() for parts in found.values() for t in parts.values())
    assert data[:8] == FILE[:8] and len(data) == len(FILE)
