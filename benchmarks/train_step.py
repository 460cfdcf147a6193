"""One training step of LoRA-SB against PEFT's LoRA on all seven linears of SmolLM2: seconds, and peak memory beyond the model.

    python -m benchmarks.train_step --batch 16 --tokens 128 --dtype auto

Ours runs as `fedsb` runs it: `fedsb.training.loop.train`, whose head computes its loss in chunks and which takes a batch
in microbatches of 8. The peer runs as its users run it: `get_peft_model(model, LoraConfig(...))`, transformers' own loss,
the whole batch at once, AdamW. Since most of a small model's peak is the logits, two more rows say what is due to what:
the peer with our loss, and both at equal microbatches. Time is taken in turns in one process, memory in a process each.
"""

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.harness import figure, memory_of_rows, peak_of_steps, report, time_of_rows
from fedsb.adapters.state import parameters_of
from fedsb.adapters.tuner import LoraSbConfig
from fedsb.data.batches import Batch, Encoded
from fedsb.models import device_of, load_model, load_tokenizer, locate
from fedsb.sections import ModelSection
from fedsb.training.loop import Plan, train
from fedsb.training.loss import causal_loss

ROWS = {  # name → (adapter, rank, loss, microbatch; 0 = the whole batch)
    "sb32": ("sb", 32, "ours", 8),
    "sb64": ("sb", 64, "ours", 8),
    "lora32": ("lora", 32, "transformers", 0),
    "lora32-our-loss": ("lora", 32, "ours", 0),
    "lora32-our-loop": ("lora", 32, "ours", 8),
    "sb32-whole": ("sb", 32, "ours", 0),
}


def stepper(row: str, options: argparse.Namespace) -> Callable[[], None]:
    """A function that takes one optimiser step of a row."""
    from peft import LoraConfig, get_peft_model

    adapter, rank, loss_kind, microbatch = ROWS[row]
    section = ModelSection.model_validate({"source": options.model, "dtype": options.dtype})
    source, device = locate(options.model), device_of("auto")
    torch.manual_seed(0)
    base: Any = load_model(source, section, None, device)
    vocabulary = base.config.vocab_size
    config = LoraSbConfig(r=rank, basis_dtype="bf16") if adapter == "sb" else LoraConfig(r=rank, target_modules="all-linear")
    model: Any = get_peft_model(base, config)
    rows = [Encoded([1], torch.randint(0, vocabulary, (options.tokens - 1,)).tolist()) for _ in range(options.batch)]
    microbatch = microbatch or options.batch
    if adapter == "sb":
        pad = load_tokenizer(source).pad_token_id
        plan = Plan(0, 1, 1, options.batch, microbatch, 1e-3, 1e-3, 0, False)
        parameters = parameters_of(model)
        transformer = model.get_base_model()
        return lambda: void(train(transformer, parameters, rows, plan, kind="causal", pad_id=pad, seed=0, client="c"))
    model.train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    ids = torch.tensor([[*row.prompt, *row.completion] for row in rows], device=device)
    labels = ids.clone()
    labels[:, 0] = -100

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        for part, target in zip(ids.split(microbatch), labels.split(microbatch), strict=True):
            mask = torch.ones_like(part)
            if loss_kind == "transformers":
                loss = model(input_ids=part, attention_mask=mask, labels=target).loss
            else:
                loss = causal_loss(model.get_base_model(), Batch(part, mask, target))
            (loss * (len(part) / len(ids))).backward()
        optimiser.step()

    return step


def void(_: object) -> None:
    """Drop a result."""


def main() -> None:
    """Measure every row and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--batch", type=int, default=16, help="sequences per step")
    parser.add_argument("--tokens", type=int, default=128, help="tokens per sequence")
    parser.add_argument("--dtype", default="auto", choices=["auto", "bf16", "fp32"], help="of the frozen model")
    parser.add_argument("--turns", type=int, default=7, help="timed steps of each row")
    parser.add_argument("--memory-of", choices=sorted(ROWS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print(json.dumps({"bytes": peak_of_steps(stepper(options.memory_of, options))}))
        return
    sizes = [f"--{name}={getattr(options, name)}" for name in ("model", "batch", "tokens", "dtype")]
    memory = memory_of_rows("benchmarks.train_step", ROWS, sizes)
    steps = {row: stepper(row, options) for row in ("sb32", "sb64", "lora32", "lora32-our-loss")}
    time = time_of_rows(steps, options.turns)

    def against(table: dict[str, float], ours: str, peer: str, unit: str) -> dict[str, Any]:
        return figure(table[ours] / table[peer], unit, table[ours], table[peer], ours_row=ours, peer_row=peer)

    report(
        "train_step",
        {
            "step_time": against(time, "sb32", "lora32", "s"),
            "step_time_paper": against(time, "sb64", "lora32", "s"),
            "step_time_our_loss": against(time, "sb32", "lora32-our-loss", "s"),
            "peak_memory": against(memory, "sb32", "lora32", "MB"),
            "peak_memory_paper": against(memory, "sb64", "lora32", "MB"),
            "peak_memory_our_loss": against(memory, "sb32-whole", "lora32-our-loss", "MB"),
            "peak_memory_our_loop": against(memory, "sb32", "lora32-our-loop", "MB"),
            "peak_memory_whole_batch": against(memory, "sb32-whole", "lora32", "MB"),
        },
    )


if __name__ == "__main__":
    main()
