"""What privacy costs in accuracy: LoRA-SB with three bases, FFA-LoRA and LoRA, each at its own best learning rate.

    python -m benchmarks.private_accuracy --data ../shared/data --out runs/private-accuracy \\
        --results benchmarks/results/private-accuracy.jsonl          goes on from the runs that are kept

MiniLM (22 M parameters) on SST-2 and Banking77, dealt evenly to 3 or 20 clients, privacy by record: every record of every
client is promised (ε, 1/n) for the whole run, basis included, by the same accountant and with the same Poisson samples, clipping
and noise (`fedsb.training.private`) whatever the method; all run as `fedsb simulate` runs them. The peers are `lora`, PEFT's with
A and B averaged apart (FedIT), and `ffa-lora`, with A frozen. All start from the same head, and train it along; `head` trains
nothing else, and is what an adapter has to beat.

Of a task's train file 320 rows are public (for the basis `public`; the peers never see them) and 800 are for choosing learning
rates; clients hold the rest. `--tune` runs the learning rates of `RATES` on those 800, with a seed of its own; otherwise each
method runs at its rate in `BEST`, one for all ε and numbers of clients, and is scored on the test file. The head's rate
was set by looking at a head alone on fixed features; the ranks and the clip of the rest are not tuned. A result is one line
of RESULTS, written as soon as it is there; what is there is not run again. Figures: mean accuracy over the seeds, with its
standard deviation.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import grid
from benchmarks.harness import figure, report, say
from fedsb.config import RunConfig
from fedsb.data.seeds import generator
from fedsb.store.files import staged_folder

TASKS = ("sst2", "banking77")
METHODS = ("head", "sb-weights", "sb-public", "sb-sketch", "ffa-lora", "lora")
PUBLIC, HELD_OUT = 320, 800  # rows of a train file
TUNING_SEED = 100
RANK, PEER_RANK = 8, 4  # 2,368 numbers without the head, and 168,960 (LoRA) or 84,480 (FFA-LoRA)
HEAD_RATE = 8e-3
SIZES = {3: {"batch": 192, "sketched": 256}, 20: {"batch": 32, "sketched": 64}}  # per client
CLIP = 0.25  # a record's gradient at the start, of all but the head: 0.16 to 0.27, whatever the method
STILL = 1e-9  # a learning rate at which nothing but the head moves
RATES = {
    "head": (STILL,),
    "sb-weights": (1.25e-3, 5e-3),
    "sb-public": (1.25e-3, 5e-3),
    "sb-sketch": (1.25e-3, 5e-3),
    "ffa-lora": (2.5e-4, 1e-3),
    "lora": (1.25e-4, 5e-4),
}
BEST: dict[tuple[str, str], float] = {
    ("sst2", "sb-weights"): 0.005,
    ("sst2", "sb-public"): 0.005,
    ("sst2", "sb-sketch"): 0.00125,
    ("sst2", "ffa-lora"): 0.00025,
    ("sst2", "lora"): 0.0005,
    ("banking77", "sb-weights"): 1.25e-3,
    ("banking77", "sb-public"): 1.25e-3,
    ("banking77", "sb-sketch"): 5e-3,
    ("banking77", "ffa-lora"): 2.5e-4,
    ("banking77", "lora"): 5e-4,
}  # (task, method) → what `--tune` found with 3 clients and ε = 8; of banking77 with fp32 weights


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
    results = options.results or options.out / "results.jsonl"
    for cell in wanted:
        if key(cell, options) in grid.finished(results):
            continue
        config = config_of(cell, options, options.out / "data" / cell.task)
        started = time.monotonic()
        found = grid.run(config, personal=False)
        seconds = round(time.monotonic() - started, 1)
        say(f"{cell.name}, seed {cell.seed}: {found['exact_match']:.4f}, loss {found['loss']:.4f}, {seconds:.0f} s")
        with results.open("a") as file:
            line = {"key": key(cell, options), **dataclasses.asdict(cell), "tuning": options.tune}
            file.write(json.dumps(line | {what: found[what] for what in ("exact_match", "loss")} | {"seconds": seconds}) + "\n")
    report("private_accuracy", figures([(cell, key(cell, options)) for cell in wanted], grid.finished(results)))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with sst2/ and banking77/, each with train and test.jsonl"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for results and split data; extended if it is there")
    parser.add_argument("--results", type=Path, help="JSON lines, one a run; by default OUT/results.jsonl")
    parser.add_argument("--model", default="minilm-l6-v2")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--clients", default="3,20", help="3, 20 or both")
    parser.add_argument("--epsilons", default="none,8,3,1")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="of a client in a round")
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
    if len(RATES[method]) == 1:
        return RATES[method][0]
    if (task, method) not in BEST:
        raise SystemExit(f"no learning rate is known for {method} on {task}; run --tune and enter it in BEST")
    return BEST[task, method]


def split(source: Path, target: Path) -> None:
    """Deal the rows of a train file into target/{clients,public,tuning}/{train,test}.jsonl, once and for all seeds alike."""
    if target.exists():
        return
    try:
        rows, test = ((source / f"{name}.jsonl").read_text().splitlines(keepends=True) for name in ("train", "test"))
    except OSError as error:
        raise SystemExit(f"{source}: cannot be read ({error}); name the folder of the tasks with --data") from None
    order = generator(0, "private-accuracy", source.name).permutation(len(rows)).tolist()
    public, held, clients = order[:PUBLIC], order[PUBLIC : PUBLIC + HELD_OUT], order[PUBLIC + HELD_OUT :]
    parts = {"public": (public, test), "clients": (clients, test), "tuning": (clients, [rows[i] for i in held])}
    with staged_folder(target) as staged:
        for name, (chosen, tested) in parts.items():
            (staged / name).mkdir()
            (staged / name / "train.jsonl").write_text("".join(rows[i] for i in chosen))
            (staged / name / "test.jsonl").write_text("".join(tested))


def key(cell: Cell, options: argparse.Namespace) -> str:
    """What a finished run is found again by, wherever its data lie."""
    return config_of(cell, options, Path(cell.task)).digest()


def config_of(cell: Cell, options: argparse.Namespace, folder: Path) -> RunConfig:
    """The run; `folder`: of the task's rows, as `split` deals them."""
    labels = sorted(
        {str(json.loads(line)["label"]) for line in (options.data / cell.task / "train.jsonl").read_text().splitlines()}
    )
    sizes = SIZES[cell.clients]
    own = "tuning" if options.tune else "clients"
    ours = cell.method.startswith("sb-")
    peer = cell.method in ("ffa-lora", "lora")
    basis: dict[str, Any] = {"source": cell.method.removeprefix("sb-") if ours else "random"}
    if cell.method == "sb-public":
        basis |= {"public": {"name": cell.task, "source": f"jsonl:{folder / 'public'}"}, "examples": PUBLIC}
    if cell.method == "sb-sketch":
        basis |= {"examples": sizes["sketched"]}
    private = {"unit": "record", "epsilon": cell.epsilon, "clip_norm": CLIP, "scores": "plain"}
    return RunConfig.model_validate(
        {
            "name": "private-accuracy",
            "seed": cell.seed,
            "model": {"source": options.model, "kind": "classification", "dtype": "bf16"},
            "data": {"tasks": [{"name": cell.task, "source": f"jsonl:{folder / own}"}], "labels": labels, "max_length": 64},
            "adapter": {"method": cell.method, "rank": PEER_RANK} if peer else {"method": "lora-sb", "rank": RANK},
            "basis": basis,
            "train": {
                "steps": options.steps,
                "batch_size": sizes["batch"],
                "microbatch": 32,
                "learning_rate": cell.rate,
                "head_learning_rate": HEAD_RATE,
                "warmup_steps": 0,
            },
            "federation": {"clients": cell.clients, "rounds": options.rounds, "weighting": "uniform"},
            "personal": {"steps": 0},
            "evaluation": {"batch_size": 64},
            "privacy": private if cell.epsilon else {"unit": "none"},
            "runtime": {"progress": "none", "threads": options.threads},
        }
    )


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
