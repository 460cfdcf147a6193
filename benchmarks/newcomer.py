"""A client that comes after a run, with few examples: what is the best adapter for it?

    python -m benchmarks.newcomer --data ../shared/data --out /tmp/newcomer

By default MiniLM on Banking77 (LoRA-SB, rank 32), its rows dealt to 20 clients and some newcomers by Dirichlet(0.3), so that each
has some of the 77 intents. The clients federate and personalise as `configs/banking77.toml` says, but for fewer rounds
(`--rounds`). Each newcomer then has 8, 32 or 128 of its own examples, and is scored on its own test rows with

    global      the global core as it is
    scratch     a core (and head) trained from the base model
    core        a core trained on from the global one, as clients personalise
    fusion      a mixture of the global and the personal cores (`fedsb.training.fusion`)
    nola        NOLA trained from the base model
    lopa        LoPA trained from the base model (causal models only)

each for the same steps. With `--tasks boolq,openbookqa,arc_easy,arithmetic --model smollm2-135m-instruct --clients 8` the same on
a causal model, the rows of these tasks dealt by task; accuracy is then exact match. Figures `WAY_COUNT`: accuracy, the mean over
newcomers and seeds; `peer` is that of `global`. One JSON line a seed, newcomer, count and way in OUT/results.jsonl; what is there
is not run again.
"""

import argparse
import json
import shutil
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import figure, report, say
from clients import newcomer
from clients.session import Session, Site
from fedsb.cli.personalise import own_config
from fedsb.cli.simulate import simulated
from fedsb.config import RunConfig
from fedsb.data.partition import partition, partition_like
from fedsb.store import adapters, checkpoint
from fedsb.store.basis_files import load_basis

CLIENTS, ALPHA = 20, 0.3
COUNTS = (8, 32, 128)
WAYS = ("global", "scratch", "core", "fusion", "nola", "lopa")
TRAIN, TEST = 1000, 200  # rows of a task of a causal model
OTHERS = {"nola": {"method": "nola", "rank": 16}, "lopa": {"method": "lopa", "rank": 1}}  # ways without a basis


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with TASK/train.jsonl and test.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="folder for runs, rows and results; extended if it is there")
    parser.add_argument("--model", default="minilm-l6-v2")
    parser.add_argument("--tasks", default="banking77", help="banking77 (a classifier), or tasks of a causal model")
    parser.add_argument("--fraction", type=float, default=0.25, help="of the clients in a round")
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--newcomers", type=int, default=4)
    parser.add_argument("--counts", default=",".join(map(str, COUNTS)))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=30, help="of a newcomer")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of torch")
    options = parser.parse_args(arguments)
    results = options.out / "results.jsonl"
    counts, seeds = ([int(n) for n in text.split(",")] for text in (options.counts, options.seeds))
    for seed in seeds:
        missing = [cell for cell in cells(counts, options.newcomers, ways(options)) if (seed, *cell) not in finished(results)]
        if missing:
            for line in scored(options, seed, missing):
                with results.open("a") as file:
                    file.write(json.dumps(line) + "\n")
    found = finished(results)
    figures = {}
    for count in counts:
        means: dict[str, list[float]] = {way: [] for way in ways(options)}
        for (seed, _, each, way), accuracy in found.items():
            if seed in seeds and each == count and way in means:
                means[way].append(accuracy)
        plain = statistics.mean(means["global"])
        for way, values in means.items():
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            mean = statistics.mean(values)
            figures[f"{way}_{count}"] = figure(mean, "accuracy", ours=mean, peer=plain, sd=spread, n=len(values))
            say(f"{count:>4} examples, {way:<8} {mean:.3f} ± {spread:.3f}")
    report("newcomer", figures)


def ways(options: argparse.Namespace) -> list[str]:
    """Those that there are: LoPA's prompts go before what a causal model reads."""
    return [way for way in WAYS if way != "lopa" or options.tasks != "banking77"]


def cells(counts: Sequence[int], newcomers: int, which: Sequence[str]) -> Iterator[tuple[int, int, str]]:
    """Newcomer, count of its examples, way."""
    return ((number, count, way) for number in range(newcomers) for count in counts for way in which)


def finished(results: Path) -> dict[tuple[int, int, int, str], float]:
    """(seed, newcomer, count, way) → accuracy."""
    lines = map(json.loads, results.read_text().splitlines()) if results.exists() else ()
    return {(line["seed"], line["newcomer"], line["count"], line["way"]): line["accuracy"] for line in lines}


def scored(options: argparse.Namespace, seed: int, missing: Sequence[tuple[int, int, str]]) -> Iterator[dict[str, Any]]:
    """Deal, federate, and score every cell that is missing."""
    data = options.out / f"data-{seed}"
    labels = dealt(options, seed, data, sorted({count for _, count, _ in missing}))
    told = config_of(options, seed, data, labels)
    run = options.out / f"run-{seed}"
    if not (run / "summary.json").exists():
        simulated(told, run, resume=(run / "config.toml").exists())
    last = checkpoint.latest(run, told.digest())
    assert last is not None
    config = own_config(told, "new", str(data / "{client}"))
    sb = Session(config)
    sb.use(load_basis(run, last.basis_fingerprint))
    store = run / "adapters"
    pool = {newcomer.SHARED: last.state} | {name: adapters.load(store, name).state for name in adapters.clients(store)}
    others = {
        way: Session(config.model_copy(update={"adapter": config.adapter.model_copy(update=OTHERS[way])}))
        for way in OTHERS
        if any(each == way for _, _, each in missing)
    }
    for number, count, way in missing:
        site = Site(f"new-{number}-{count}", 0, run / "sites")
        if way == "global":
            score = sb.score(site, sb.layout.flatten(last.state))
        elif way in others:
            score = others[way].score(site, newcomer.personalised(others[way], site, {}, "scratch", options.steps)[0])
        else:
            score = sb.score(site, newcomer.personalised(sb, site, pool, way, options.steps)[0])
        say(f"seed {seed}, newcomer {number}, {count} examples, {way}: {score.exact_match:.3f} of {score.n}")
        yield {"seed": seed, "newcomer": number, "count": count, "way": way, "accuracy": score.exact_match, "loss": score.loss}


def config_of(options: argparse.Namespace, seed: int, data: Path, labels: Sequence[str]) -> RunConfig:
    """The federation, whose clients hold their rows themselves."""
    names = [f"site-{number:02d}" for number in range(options.clients)]
    return RunConfig.model_validate(
        {
            "name": "newcomer",
            "seed": seed,
            "model": {"source": options.model, "kind": "classification" if labels else "causal", "dtype": "bf16"},
            "data": {
                "partition": "own",
                "tasks": [{"name": "banking77" if labels else "mixed", "source": f"jsonl:{data / '{client}'}"}],
                **({"labels": list(labels), "max_length": 64} if labels else {"max_length": 192, "system_prompt": ""}),
            },
            "adapter": {"rank": 32},
            "train": {"steps": 10, "batch_size": 16 if labels else 8, "microbatch": 8, "head_learning_rate": 1e-2},
            "federation": {"clients": len(names), "names": names, "rounds": options.rounds, "fraction": options.fraction},
            "personal": {"steps": 10},
            "runtime": {"progress": "none", "threads": options.threads},
        }
    )


def dealt(options: argparse.Namespace, seed: int, data: Path, counts: Sequence[int]) -> list[str]:
    """Write the rows of every client and newcomer, train and test; all labels, sorted (none of a causal model).

    A newcomer has the first rows of those that it was dealt, in an order that depends on nothing, and fewer where it has fewer.
    """
    sides: dict[str, list[str]] = {"train": [], "test": []}
    labelled: dict[str, list[str]] = {"train": [], "test": []}
    classes = options.tasks == "banking77"
    for task in options.tasks.split(","):
        for name, most in (("train", TRAIN), ("test", TEST)):
            rows = (options.data / task / f"{name}.jsonl").read_text().splitlines(keepends=True)
            taken = rows if classes else rows[:most]
            sides[name] += taken
            labelled[name] += [str(json.loads(row)["label"]) if classes else task for row in taken]
    labels = sorted(set(labelled["train"]))
    groups = {name: [labels.index(label) for label in found] for name, found in labelled.items()}
    everybody = options.clients + options.newcomers
    train = partition("dirichlet", groups["train"], everybody, ALPHA, seed)
    test = partition_like(train, groups["train"], groups["test"], seed)
    shutil.rmtree(data, ignore_errors=True)
    for client, (rows, scored_rows) in enumerate(zip(train, test, strict=True)):
        number = client - options.clients
        shuffled = sorted(rows, key=lambda i: (i * 7919) % 10007)
        folders = {f"site-{client:02d}": rows} if number < 0 else {f"new-{number}-{count}": shuffled[:count] for count in counts}
        for folder, chosen in folders.items():
            (data / folder).mkdir(parents=True)
            (data / folder / "train.jsonl").write_text("".join(sides["train"][i] for i in chosen))
            (data / folder / "test.jsonl").write_text("".join(sides["test"][i] for i in scored_rows))
    return labels if classes else []


if __name__ == "__main__":
    main()
