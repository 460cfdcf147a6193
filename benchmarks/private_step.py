"""One DP-SGD step of LoRA-SB against a step without privacy, and against PEFT's LoRA with stock Opacus, on SmolLM2.

    python -m benchmarks.private_step

Logical batch of 32 sequences of 128 tokens, physical batches of 8 for all, so that no row is slow or large for that alone;
besides, ours with physical batches of 4 (`…_half`): what a batch takes is mostly activations, and ours hardly slows down.
Ours runs as `fedsb` runs it: `train_private` (Opacus' hooks on the cores, our clipping, noise from the key stream) and `train`.
The peer runs as Opacus' users run it: `get_peft_model(model, LoraConfig(r=32))`, GradSampleModule, DPOptimizer with signals to
skip between physical batches, transformers' own loss, noise from torch's generator. Time is taken in turns in one process, memory
in a process each.

`dp_overhead`: ours with privacy over ours without, in time. `time_against_lora`, `memory_against_lora`: ours over the peer, both
with privacy. `noise_share`: the key stream's part of our step.
"""

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from benchmarks.harness import figure, memory_of_rows, peak_of_steps, report, time_of_rows
from fedsb.adapters.state import parameters_of
from fedsb.adapters.tuner import LoraSbConfig
from fedsb.data.batches import Encoded
from fedsb.models import device_of, load_model, load_tokenizer, locate
from fedsb.privacy.mechanism import Mechanism
from fedsb.privacy.noise import KeyStream, add_noise
from fedsb.sections import ModelSection
from fedsb.training.loop import Plan, train
from fedsb.training.private import train_private

ROWS = ("sb-private", "sb-private-half", "sb", "lora-opacus")
NOISE, CLIP = 1.0, 1.0


def base_of(options: argparse.Namespace) -> Any:
    """The frozen model."""
    torch.manual_seed(0)
    section = ModelSection.model_validate({"source": options.model, "dtype": options.dtype})
    return load_model(locate(options.model), section, None, device_of("auto"))


def examples(base: Any, options: argparse.Namespace) -> list[Encoded]:
    """As many random sequences as a logical batch has."""
    ids = torch.randint(0, base.config.vocab_size, (options.batch, options.tokens - 1)).tolist()
    return [Encoded([1], row) for row in ids]


def ours(row: str, options: argparse.Namespace) -> Callable[[], None]:
    """A step of LoRA-SB, with privacy or without."""
    base = base_of(options)
    rows = examples(base, options)
    model: Any = get_peft_model(base, LoraSbConfig(r=options.rank, basis_dtype="bf16"))
    told: dict[str, Any] = {"kind": "causal", "pad_id": load_tokenizer(locate(options.model)).pad_token_id}
    microbatch = options.microbatch // 2 if row == "sb-private-half" else options.microbatch
    plan = Plan(0, 1, 1, options.batch, microbatch, 1e-3, 1e-3, 0, False)
    transformer, parameters = model.get_base_model(), parameters_of(model)
    if row == "sb":
        return lambda: (train(transformer, parameters, rows, plan, **told, seed=0, client="c"), None)[1]
    mechanism, stream = (
        Mechanism(NOISE, 1.0, CLIP),
        KeyStream(),
    )  # rate 1: everybody is drawn, so the batch is as large as the others'
    return lambda: train_private(transformer, parameters, rows, plan, mechanism, stream, **told)


def peer(options: argparse.Namespace) -> Callable[[], None]:
    """A step of PEFT's LoRA with stock Opacus."""
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    base = base_of(options)
    ids = torch.tensor([[*row.prompt, *row.completion] for row in examples(base, options)])
    model: Any = get_peft_model(base, LoraConfig(r=options.peer_rank, target_modules="all-linear")).train()
    wrapped = GradSampleModule(model)
    plain = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    optimiser = DPOptimizer(plain, noise_multiplier=NOISE, max_grad_norm=CLIP, expected_batch_size=options.batch)
    parts = ids.split(options.microbatch)

    def step() -> None:
        for number, part in enumerate(parts, 1):
            optimiser.signal_skip_step(do_skip=number < len(parts))
            labels = part.clone()
            labels[:, 0] = -100
            wrapped(input_ids=part, attention_mask=torch.ones_like(part), labels=labels).loss.backward()
            optimiser.step()
            optimiser.zero_grad()

    return step


def stepper(row: str, options: argparse.Namespace) -> Callable[[], None]:
    """A function that takes one optimiser step of a row."""
    return peer(options) if row == "lora-opacus" else ours(row, options)


def main() -> None:
    """Measure every row and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--rank", type=int, default=64, help="of LoRA-SB")
    parser.add_argument("--peer-rank", type=int, default=32, help="of LoRA")
    parser.add_argument("--batch", type=int, default=32, help="sequences per step")
    parser.add_argument("--microbatch", type=int, default=8, help="sequences per forward and backward pass")
    parser.add_argument("--tokens", type=int, default=128, help="tokens per sequence")
    parser.add_argument("--dtype", default="auto", choices=["auto", "bf16", "fp32"], help="of the frozen model")
    parser.add_argument("--turns", type=int, default=5, help="timed steps of each row")
    parser.add_argument("--memory-of", choices=ROWS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print(json.dumps({"bytes": peak_of_steps(stepper(options.memory_of, options))}))
        return
    sizes = [f"--{name.replace('_', '-')}={value}" for name, value in vars(options).items() if name not in ("turns", "memory_of")]
    memory = memory_of_rows("benchmarks.private_step", ROWS, sizes)
    steps = {row: stepper(row, options) for row in ROWS}
    adapted = get_peft_model(base_of(options), LoraSbConfig(r=options.rank, basis="later"))
    numbers = torch.zeros(sum(p.numel() for p in parameters_of(adapted).values()))
    stream = KeyStream()
    steps["noise"] = lambda: (add_noise(numbers, 1.0, stream), None)[1]
    time = time_of_rows(steps, options.turns)
    report(
        "private_step",
        {
            name + end: figure(values["sb-private" + row] / values[peer_row], unit, values["sb-private" + row], values[peer_row])
            for row, end in (("", ""), ("-half", "_half"))
            for name, unit, values, peer_row in (
                ("dp_overhead", "s", time, "sb"),
                ("time_against_lora", "s", time, "lora-opacus"),
                ("memory_against_lora", "MB", memory, "lora-opacus"),
            )
        }
        | {
            "noise_share": figure(time["noise"] / time["sb-private"], "share", time["noise"], time["sb-private"]),
        },
    )


if __name__ == "__main__":
    main()
