"""The formulas of docs/scaling.md against what is measured on models that fit, and against the shapes of those that do not."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import scaling
from benchmarks.scaling import MODELS, Decoder
from fedsb.adapters.attach import attach, layout_of
from fedsb.adapters.fedex_lora import residual
from fedsb.adapters.state import parameters_of
from fedsb.adapters.tuner import LoraSbConfig
from fedsb.data.batches import Batch, Encoded
from fedsb.models import locate, outline_model
from fedsb.sections import ModelSection
from fedsb.store.basis_files import first_basis
from fedsb.training.loop import Plan, train
from fedsb.training.loss import CHUNK_NUMBERS, causal_loss
from tests.federation.tiny import config_of, events, federate, save_model, save_task, table

ROOT = Path(__file__).parents[2]
TINY = Decoder("tiny", 2, 64, 128, 64, 32, 4, 100, True)
VARIED = [
    TINY,
    Decoder("deep", 5, 64, 128, 64, 32, 4, 100, True),
    Decoder("wide", 3, 128, 128, 64, 32, 4, 100, True),
    Decoder("fat", 3, 64, 320, 64, 32, 4, 100, True),
    Decoder("all keys", 3, 64, 128, 64, 64, 4, 100, True),
    Decoder("many heads", 3, 64, 128, 128, 32, 8, 300, False),
]
LARGE = MODELS[2]
NUMBERS = 32 * 7 * 128**2  # of its cores at rank 128
MIDDLE = Decoder("middle", 8, 256, 768, 256, 128, 4, 2000, True)


def _model(of: Decoder, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    size = of.queries // of.heads
    config = LlamaConfig(
        num_hidden_layers=of.layers,
        hidden_size=of.hidden,
        intermediate_size=of.intermediate,
        num_attention_heads=of.heads,
        num_key_value_heads=of.keys // size,
        head_dim=size,
        vocab_size=of.vocabulary,
        tie_word_embeddings=of.tied,
    )
    with torch.device(device):
        return LlamaForCausalLM(config).to(dtype)


def _adapted(of: Decoder, rank: int, dtype: torch.dtype = torch.float32) -> Any:
    return get_peft_model(_model(of, dtype), LoraSbConfig(r=rank, basis_dtype="bf16" if dtype == torch.bfloat16 else "fp32"))


@pytest.mark.parametrize("of", MODELS, ids=lambda each: each.name)
def test_the_sizes_are_those_of_the_real_shapes(of: Decoder) -> None:
    """Of SmolLM2 by its own file; of the others on the meta device, which holds no weights."""
    source = locate("smollm2-135m-instruct")

    def outline() -> Any:
        small = of.name.startswith("SmolLM2")
        return outline_model(source, ModelSection.model_validate({}), None) if small else _model(of, torch.bfloat16, "meta")

    assert sum(p.numel() for p in outline().parameters()) == of.parameters
    for method, formula in (("lora-sb", scaling.core_numbers), ("lora", scaling.lora_numbers)):
        config = config_of(table("none", "jsonl:none", adapter={"method": method, "rank": 64}))
        assert layout_of(attach(outline().requires_grad_(False), config)).size == formula(of, 64)


def test_what_is_sent_and_stored_is_what_the_formula_says(tmp_path: Path) -> None:
    of = Decoder("saved", 2, 32, 48, 32, 16, 4, 18, False)
    task, rank = save_task(tmp_path / "words"), 8
    config = config_of(table(save_model(tmp_path / "model"), task, adapter={"rank": rank}, federation={"wire_dtype": "bf16"}))
    summary = federate(config, tmp_path / "run")
    replies = len(events(tmp_path / "run", "reply"))
    a_reply = sum(entry["up"] for entry in summary["history"]) / replies
    assert summary["trainable_parameters"] == scaling.core_numbers(of, rank)
    assert 0 < a_reply - 2 * scaling.core_numbers(of, rank) < 1500, "besides the numbers a message has names and figures"
    basis = first_basis(tmp_path / "run")
    assert basis is not None and basis.nbytes == 2 * scaling.lora_numbers(of, rank)


def test_the_residual_of_fedex_has_the_rank_that_is_counted() -> None:
    clients = [{"A": torch.randn(4, out_in[1]), "B": torch.randn(out_in[0], 4)} for out_in in [TINY.linears[0]] * 5]
    mean = {name: torch.stack([parts[name] for parts in clients]).mean(0) for name in ("A", "B")}
    u, v = residual(clients, [0.2] * 5, mean, 1.0)
    out, into = TINY.linears[0]
    assert u.numel() + v.numel() == 4 * 4 * (out + into)
    assert scaling.fedex_numbers(TINY, 4, 5) == 4 * scaling.lora_numbers(TINY, 4)


@pytest.mark.parametrize("of", VARIED, ids=lambda each: each.name)
@pytest.mark.parametrize("rank", [4, 16])
def test_the_operations_of_a_step_are_those_that_torch_counts(of: Decoder, rank: int) -> None:
    model, ids = _adapted(of, rank), torch.randint(0, of.vocabulary, (4, 32))
    with FlopCounterMode(display=False) as counter:
        causal_loss(model.get_base_model(), Batch(ids, torch.ones_like(ids), ids)).backward()
    head = 4 * of.vocabulary * of.hidden  # a sequence has one label less than tokens
    assert counter.get_total_flops() == ids.numel() * scaling.step_flops(of, rank) - len(ids) * head


@pytest.mark.parametrize("of", VARIED, ids=lambda each: each.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_activations_are_those_that_autograd_keeps(of: Decoder, dtype: torch.dtype) -> None:
    model, ids = _adapted(of, 8, dtype), torch.randint(0, of.vocabulary, (4, 32))
    own = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    alive = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        causal_loss(model.get_base_model().train(), Batch(ids, torch.ones_like(ids), ids)).backward()
    width = dtype.itemsize
    assert sum(kept.values()) / ids.numel() == pytest.approx(scaling.activation_bytes(of, 8, width), rel=0.03)


MEAN = """
import json, torch
from benchmarks.harness import Peak
from fedsb.aggregation.mean import Mean
from tests.benchmarks.test_scaling import NUMBERS
Mean(8).add(torch.ones(8))  # what torch takes at its first sum is not the mean's
with Peak() as peak:
    mean, sent = Mean(NUMBERS), torch.ones(NUMBERS)
    for _ in range(3):
        reply = torch.ones(NUMBERS)
        mean.add(reply, 2.0)
    result = mean.result(sent)
print(json.dumps(peak.growth))
"""
STEP = """
import json, torch
from benchmarks.harness import peak_of_steps
from tests.benchmarks.test_scaling import MIDDLE, stepper
print(json.dumps(peak_of_steps(stepper(MIDDLE, 16, 8, 128))))
"""


def stepper(of: Decoder, rank: int, batch: int, tokens: int) -> Any:
    """A function that takes one step of `batch` × `tokens`."""
    torch.set_num_threads(1)
    model = _adapted(of, rank)
    rows = [Encoded([1], torch.randint(0, of.vocabulary, (tokens - 1,)).tolist()) for _ in range(batch)]
    plan = Plan(0, 1, 1, batch, batch, 1e-3, 1e-3, 0, False)
    parameters, transformer = parameters_of(model), model.get_base_model()
    return lambda: train(transformer, parameters, rows, plan, kind="causal", pad_id=0, seed=0, client="c")


def _measured(program: str) -> int:
    """What a program prints last, in a process with glibc's threshold fixed, as docs/scaling.md says: without it, holes between
    what is kept are counted too."""
    limits = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "PYTHONPATH": str(ROOT)}
    environment = {**os.environ, **limits}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    return int(json.loads(done.stdout.splitlines()[-1]))


def test_the_peak_memory_of_a_step_is_the_sum() -> None:
    said = scaling.client_bytes(MIDDLE, 16, 4, 8 * 128)
    beyond = sum(size for what, size in said.items() if what not in ("weights", "basis"))
    assert _measured(STEP) == pytest.approx(beyond, rel=0.2)


def test_the_peak_memory_of_the_mean_is_the_sum() -> None:
    assert scaling.core_numbers(LARGE, 128) == NUMBERS
    assert _measured(MEAN) == pytest.approx(scaling.server_bytes(LARGE, 128), rel=0.1)


def test_time_goes_with_the_operations() -> None:
    larger = Decoder("larger", 8, 512, 1536, 512, 256, 8, 2000, True)
    steps = {of: stepper(of, 16, 4, 128) for of in (MIDDLE, larger)}
    seconds: dict[Decoder, list[float]] = {of: [] for of in steps}
    for _ in range(5):
        for of, step in steps.items():
            began = time.perf_counter()
            step()
            seconds[of].append(time.perf_counter() - began)
    ratio = min(seconds[larger]) / min(seconds[MIDDLE])  # whatever else a machine does only adds
    said = [scaling.step_flops(of, 16) + scaling.attention_flops(of, 128) for of in (larger, MIDDLE)]
    assert 0.5 < ratio / (said[0] / said[1]) < 1.5


def test_the_page_has_these_tables() -> None:
    assert scaling.CHUNK == CHUNK_NUMBERS
    page = (ROOT / "docs/scaling.md").read_text()
    for part in scaling.tables().split("\n\n"):
        assert part in page, "python -m benchmarks.scaling prints them"
