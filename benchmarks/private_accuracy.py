"""What privacy costs in accuracy: LoRA-SB with three bases, FFA-LoRA and LoRA, each at its own best learning rate.

    python -m benchmarks.private_accuracy --data ../shared/data --out runs/private-accuracy

MiniLM (22 M parameters) on SST-2 and Banking77, dealt evenly to 3 or 20 clients, privacy by record: every record of every
client is promised (ε, 1/n) for the whole run, basis included, by the same accountant and with the same Poisson samples, clipping
and noise (`fedsb.training.private`) whatever the method. LoRA-SB runs as `fedsb simulate` runs it. The peers are PEFT's LoRA with
A and B averaged apart (FedIT), and the same with A frozen from a shared seed (FFA-LoRA, Sun et al., arXiv 2403.12313); both
start from the head that LoRA-SB starts from, and train it along.

Of a task's train file 320 rows are public (for the basis `public`) and 800 are for choosing learning rates; clients hold the
rest. `--tune` runs the learning rates of `RATES` on those 800, with a seed of its own; otherwise each method runs at its rate in
`BEST` and is scored on the test file. A result is one line of OUT/results.jsonl, written as soon as it is there; what is there
is not run again. Figures: mean accuracy over the seeds, with its standard deviation.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn

from benchmarks import grid
from benchmarks.harness import figure, report, say
from fedsb.adapters.attach import HEAD_SPREAD
from fedsb.adapters.state import Layout, parameters_of
from fedsb.aggregation.mean import Mean
from fedsb.basis.spectral import seeded
from fedsb.config import RunConfig
from fedsb.data.batches import encode
from fedsb.data.seeds import generator
from fedsb.data.sites import all_parts
from fedsb.data.tasks import labels_of
from fedsb.models import device_of, load_model, load_tokenizer, locate
from fedsb.privacy.mechanism import mechanism_of
from fedsb.privacy.noise import KeyStream
from fedsb.serving.evaluator import evaluate
from fedsb.training.loop import round_plan, train
from fedsb.training.private import train_private

TASKS = ("sst2", "banking77")
METHODS = ("sb-weights", "sb-public", "sb-sketch", "ffa-lora", "lora")
PUBLIC, HELD_OUT = 320, 800  # rows of a train file
TUNING_SEED = 100
RANK, PEER_RANK = 32, 8  # 36,864 or so numbers without the head, and 0.33 M (LoRA) or 0.18 M (FFA-LoRA)
SIZES = {3: {"batch": 64, "sketched": 256}, 20: {"batch": 16, "sketched": 64}}  # per client
RATES = {
    "sb-weights": (2e-3, 7e-3, 2e-2),
    "sb-public": (2e-3, 7e-3, 2e-2),
    "sb-sketch": (2e-3, 7e-3, 2e-2),
    "ffa-lora": (1e-3, 4e-3, 1.5e-2),
    "lora": (5e-4, 2e-3, 7e-3),
}
BEST: dict[tuple[str, str], float] = {}  # (task, method) → what `--tune` found with 3 clients and ε = 3


@dataclasses.dataclass(frozen=True)
class Cell:
    """One federation: what is run, with which promise. `epsilon` None: without privacy."""

    task: str
    clients: int
    epsilon: float | None
    method: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """What it is called among figures; the seeds are averaged over."""
        return f"{self.task}, {self.clients} clients, ε={self.epsilon or 'none'}, {self.method}, lr={self.rate:g}"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    options = parse(arguments)
    wanted = cells(options)
    for task in sorted({cell.task for cell in wanted}):
        split(options.data / task, options.out / "data" / task)
    results = options.out / "results.jsonl"
    for cell in wanted:
        config = config_of(cell, options)
        if key(cell, config) in grid.finished(results):
            continue
        started = time.monotonic()
        found = grid.run(config, personal=False) if cell.method.startswith("sb-") else peer(config, cell.method)
        seconds = round(time.monotonic() - started, 1)
        say(f"{cell.name}, seed {cell.seed}: {found['exact_match']:.4f}, loss {found['loss']:.4f}, {seconds:.0f} s")
        with results.open("a") as file:
            line = {"key": key(cell, config), **dataclasses.asdict(cell), "tuning": options.tune}
            file.write(json.dumps(line | {what: found[what] for what in ("exact_match", "loss")} | {"seconds": seconds}) + "\n")
    report("private_accuracy", figures([(cell, key(cell, config_of(cell, options))) for cell in wanted], grid.finished(results)))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with sst2/ and banking77/, each with train and test.jsonl"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for results and split data; extended if it is there")
    parser.add_argument("--model", default="minilm-l6-v2")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--clients", default="3,20")
    parser.add_argument("--epsilons", default="none,8,3,1")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="of a client in a round")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of torch")
    parser.add_argument("--tune", action="store_true", help="try learning rates on held-out rows of the train file")
    return parser.parse_args(arguments)


def cells(options: argparse.Namespace) -> list[Cell]:
    """All that is to be run, seed by seed, so that what is there early has every method."""
    epsilons = [None if text == "none" else float(text) for text in options.epsilons.split(",")]
    seeds = [TUNING_SEED] if options.tune else [int(seed) for seed in options.seeds.split(",")]
    return [
        Cell(task, int(clients), epsilon, method, rate, seed)
        for seed in seeds
        for task in options.tasks.split(",")
        for clients in options.clients.split(",")
        for epsilon in epsilons
        for method in options.methods.split(",")
        for rate in (RATES[method] if options.tune else (best(task, method),))
    ]


def best(task: str, method: str) -> float:
    """The learning rate of a method on a task."""
    if (task, method) not in BEST:
        raise SystemExit(f"no learning rate is known for {method} on {task}; run --tune and enter it in BEST")
    return BEST[task, method]


def split(source: Path, target: Path) -> None:
    """Deal the rows of a train file into target/{clients,public,tuning}/{train,test}.jsonl, once and for all seeds alike."""
    if (target / "tuning").exists():
        return
    try:
        rows, test = ((source / f"{name}.jsonl").read_text().splitlines(keepends=True) for name in ("train", "test"))
    except OSError as error:
        raise SystemExit(f"{source}: cannot be read ({error}); name the folder of the tasks with --data") from None
    order = generator(0, "private-accuracy", source.name).permutation(len(rows)).tolist()
    public, held, clients = order[:PUBLIC], order[PUBLIC : PUBLIC + HELD_OUT], order[PUBLIC + HELD_OUT :]
    parts = {"public": (public, test), "clients": (clients, test), "tuning": (clients, [rows[i] for i in held])}
    for name, (chosen, tested) in parts.items():
        (target / name).mkdir(parents=True)
        (target / name / "train.jsonl").write_text("".join(rows[i] for i in chosen))
        (target / name / "test.jsonl").write_text("".join(tested))


def config_of(cell: Cell, options: argparse.Namespace) -> RunConfig:
    """The run; peers read their settings from the same one."""
    folder = options.out / "data" / cell.task
    labels = sorted(
        {str(json.loads(line)["label"]) for line in (options.data / cell.task / "train.jsonl").read_text().splitlines()}
    )
    sizes = SIZES[cell.clients]
    own = "tuning" if options.tune else "clients"
    basis: dict[str, Any] = {"source": cell.method.removeprefix("sb-") if cell.method.startswith("sb-") else "random"}
    if cell.method == "sb-public":
        basis |= {"public": {"name": cell.task, "source": f"jsonl:{folder / 'public'}"}, "examples": PUBLIC}
    if cell.method == "sb-sketch":
        basis |= {"examples": sizes["sketched"]}
    privacy = {"unit": "record", "epsilon": cell.epsilon, "scores": "plain"} if cell.epsilon else {"unit": "none"}
    return RunConfig.model_validate(
        {
            "name": "private-accuracy",
            "seed": cell.seed,
            "model": {"source": options.model, "kind": "classification"},
            "data": {"tasks": [{"name": cell.task, "source": f"jsonl:{folder / own}"}], "labels": labels, "max_length": 64},
            "adapter": {"rank": RANK},
            "basis": basis,
            "train": {"steps": options.steps, "batch_size": sizes["batch"], "microbatch": 32, "learning_rate": cell.rate},
            "federation": {"clients": cell.clients, "rounds": options.rounds, "weighting": "uniform"},
            "personal": {"steps": 0},
            "evaluation": {"batch_size": 64},
            "privacy": privacy,
            "runtime": {"progress": "none", "threads": options.threads},
        }
    )


def key(cell: Cell, config: RunConfig) -> str:
    """What a finished cell is found again by."""
    return f"{cell.method}:{config.digest()}"


def peer(config: RunConfig, method: str) -> dict[str, float]:
    """The same federation with PEFT's LoRA: loss and accuracy on all test examples."""
    if config.runtime.threads:
        torch.set_num_threads(config.runtime.threads)
    source, device = locate(config.model.source), device_of(config.runtime.device)
    tokenizer, kind = load_tokenizer(source), config.model.kind
    model = lora(load_model(source, config.model, len(labels_of(config)), device), config, frozen_a=method == "ffa-lora")
    transformer, parameters = model.get_base_model(), trained(model)
    layout = Layout.of(parameters)
    rows, tests = (
        [encode(part, tokenizer, config.data.max_length, None, kind) for part in all_parts(config, what)]
        for what in ("train", "test")  # type: ignore[arg-type]
    )
    told: dict[str, Any] = {"kind": kind, "pad_id": tokenizer.pad_token_id}
    state = flat(layout, parameters)
    for server_round in range(1, config.federation.rounds + 1):
        plan, mean = round_plan(config, server_round), Mean(layout.size)
        for client, own in zip(config.client_names, rows, strict=True):
            put(layout, parameters, state)
            if config.privacy.unit == "none":
                train(transformer, parameters, own, plan, **told, seed=config.seed, client=client)
            else:
                train_private(transformer, parameters, own, plan, mechanism_of(config, len(own)), KeyStream(), **told)
            mean.add(flat(layout, parameters))
        state = mean.result()
    put(layout, parameters, state)
    examples = [example for part in all_parts(config, "test") for example in part]
    encoded = [row for part in tests for row in part]
    section = config.evaluation
    score = evaluate(
        transformer,
        examples,
        encoded,
        kind=kind,
        tokenizer=tokenizer,
        device=device,
        batch_size=section.batch_size,
        max_new_tokens=section.max_new_tokens,
    )
    return {"exact_match": score.exact_match, "loss": score.loss}


def lora(base: Any, config: RunConfig, *, frozen_a: bool) -> Any:
    """PEFT's LoRA on all linear layers, with α = r, A from the seed, and the head that LoRA-SB of that seed starts from."""
    model: Any = get_peft_model(
        base, LoraConfig(r=PEER_RANK, lora_alpha=PEER_RANK, target_modules="all-linear", task_type=TaskType.SEQ_CLS)
    )
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            drawn = torch.rand(parameter.shape, generator=seeded(config.seed, name)) * 2 - 1
            parameter.data = drawn / parameter.shape[1] ** 0.5  # kaiming_uniform with a = √5, which LoRA and PEFT take
            parameter.requires_grad_(not frozen_a)
    for name, parameter in parameters_of(model).items():
        fresh = torch.randn(parameter.shape, generator=seeded(config.seed, name)) * HEAD_SPREAD
        parameter.data = fresh if parameter.ndim > 1 else torch.zeros_like(fresh)
    return model.eval()


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name → trained parameter: factors, then the head."""
    factors = {name: p for name, p in model.named_parameters() if p.requires_grad and ".lora_" in name}
    return factors | parameters_of(model)


def flat(layout: Layout, parameters: Mapping[str, nn.Parameter]) -> torch.Tensor:
    """A copy of the trained numbers (size,)."""
    return layout.flatten({name: p.detach().float() for name, p in parameters.items()}).clone()


def put(layout: Layout, parameters: Mapping[str, nn.Parameter], vector: torch.Tensor) -> None:
    """Numbers back in place."""
    with torch.no_grad():
        for name, value in layout.unflatten(vector).items():
            parameters[name].copy_(value)


def figures(wanted: Sequence[tuple[Cell, str]], results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Mean and standard deviation over the seeds, by name."""
    found: dict[str, list[float]] = {}
    for cell, wanted_key in wanted:
        found.setdefault(cell.name, []).append(results[wanted_key]["exact_match"])
    return {
        name: figure(
            statistics.mean(exact), "accuracy", deviation=statistics.stdev(exact) if len(exact) > 1 else None, seeds=exact
        )
        for name, exact in found.items()
    }


if __name__ == "__main__":
    main()
