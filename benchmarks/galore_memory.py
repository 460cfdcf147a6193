"""Full fine-tuning of SmolLM2 by GaLore against AdamW: memory of optimiser and gradients, loss, time.

    python -m benchmarks.galore_memory

Both train all weights (fp32; products in bf16, `--dtype`) on the same batches of a reasoning-gym task. GaLore projects the
matrices of all blocks at `--rank`, per layer; embedding and norms have AdamW, as in the paper.

`memory`: the most bytes of gradients and optimiser states that live at one time, ours by AdamW's (target 0.5), counted after
every gradient of a step's backward pass. `peak`: peak of a process beyond the model in three steps; that has activations too.
`loss`: mean loss of the last 20 of `--steps` steps, ours by AdamW's (target 1.02). `time`: seconds of a step.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import child, figure, in_turns, median, peak_of_steps, report, say, seconds
from fedsb.data.batches import Batch, collate, encode
from fedsb.data.gym import gym_examples
from fedsb.models import device_of, load_model, load_tokenizer, locate
from fedsb.sections import ModelSection, TaskSection
from fedsb.training.galore import GaLoreAdamW
from fedsb.training.loss import causal_loss

LAST = 20
ROWS = ("galore", "adamw")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--task", default="syllogism", help="a reasoning-gym data set")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--gap", type=int, default=50, help="steps for which a projection stays")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--rate", type=float, default=1e-4, help="AdamW's learning rate")
    parser.add_argument("--galore-rate", type=float, default=2e-4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="bf16", help="of products")
    parser.add_argument("--memory-of", choices=ROWS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.memory_of:
        print(json.dumps({"bytes": peak_of_steps(Run(options.memory_of, options).step)}))
        return
    found: dict[str, dict[str, float]] = {}
    told = [f"--{name.replace('_', '-')}={value}" for name, value in vars(options).items() if name != "memory_of"]
    for row in ROWS:
        run = Run(row, options)
        losses = [run.step() for _ in range(options.steps)]
        peak = child("benchmarks.galore_memory", *told, f"--memory-of={row}")["bytes"]
        last = losses[-LAST:]
        found[row] = {"memory": float(run.most), "loss": sum(last) / len(last), "peak": float(peak)}
        what = f"{run.most / 1e6:8.0f} MB of gradients and states, {peak / 1e6:8.0f} MB in all"
        say(f"{row:<8} {what}, loss {found[row]['loss']:.4f}")
    runs = {row: Run(row, options) for row in ROWS}
    times = in_turns({row: _timed(run) for row, run in runs.items()}, options.turns)
    ours, peer = (found[row] for row in ROWS)
    names = {"memory": "ratio", "peak": "ratio", "loss": "ratio"}
    figures = {name: figure(ours[name] / peer[name], unit, ours=ours[name], peer=peer[name]) for name, unit in names.items()}
    one, other = (median(times[row]) for row in ROWS)
    report("galore_memory", figures | {"time": figure(one / other, "ratio", ours=one, peer=other)})


class Run:
    """A model, its optimiser and its batches.

    Attributes:
        most: the most bytes of gradients and states that lived at one time, so far.
    """

    def __init__(self, row: str, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        source = locate(options.model)
        section = ModelSection.model_validate({"source": options.model, "dtype": "fp32"})
        self.model: Any = load_model(source, section, None, device_of("auto"))
        self.model.requires_grad_(True)
        self.batches = batches(options, load_tokenizer(source))
        self.products = torch.bfloat16 if options.dtype == "bf16" else torch.float32
        self.most = 0
        matrices = [m.weight for name, m in self.model.named_modules() if isinstance(m, nn.Linear) and ".layers." in name]
        chosen = {id(p) for p in matrices}
        others = [p for p in self.model.parameters() if id(p) not in chosen]
        self.parameters = [*matrices, *others]
        if row == "galore":
            groups = [{"params": matrices, "rank": options.rank}, {"params": others, "lr": options.rate}]
            settings = {"gap": options.gap, "scale": options.scale, "per_layer": True}
            self.optimiser: Any = GaLoreAdamW(groups, lr=options.galore_rate, **settings)
        else:
            self.optimiser = torch.optim.AdamW(self.parameters, lr=options.rate, weight_decay=0.0)
        for p in self.parameters:  # after the optimiser's own hooks
            p.register_post_accumulate_grad_hook(self._count)

    def _count(self, p: nn.Parameter) -> None:
        states = (t for state in self.optimiser.state.values() for t in state.values() if isinstance(t, Tensor))
        gathered = getattr(self.optimiser, "_gathered", {}).values()
        gradients = (q.grad for q in self.parameters if q.grad is not None)
        live = sum(t.numel() * t.element_size() for kind in (states, gathered, gradients) for t in kind)
        self.most = max(self.most, live + (p.numel() * 4 if p.grad is None else 0))  # the one that was just dropped

    def step(self) -> float:
        """One step; its loss."""
        self.optimiser.zero_grad()
        with torch.autocast("cpu", self.products, enabled=self.products != torch.float32):
            loss = causal_loss(self.model, next(self.batches))
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimiser.step()
        return float(loss.detach())


def batches(options: argparse.Namespace, tokenizer: Any) -> Iterator[Batch]:
    """The same for both, again and again."""
    task = TaskSection.model_validate({"name": "task", "source": f"gym:{options.task}", "train": 800, "test": 8})
    rows = encode(gym_examples(task, "train", 0), tokenizer, 128, "", "causal")
    draw = torch.Generator().manual_seed(0)
    while True:
        for chosen in torch.randperm(len(rows), generator=draw).split(options.batch):
            yield collate([rows[i] for i in chosen.tolist()], tokenizer.pad_token_id, "causal")


def _timed(run: Run) -> Callable[[], float]:
    return lambda: seconds(run.step)


if __name__ == "__main__":
    main()
