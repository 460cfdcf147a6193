"""What each basis costs, and what the public estimate costs beside a training step.

    python -m benchmarks.basis
    python -m benchmarks.basis --model tiny

`random`, `weights`, `public`, `sign`: seconds to build the basis of every linear layer, and peak memory beyond the model, each
in its own process. `public` sketches the gradient of `basis.examples` examples, `sign` keeps its whole sum for the paper's
sign step.

`estimate_steps`: seconds of `public` over seconds of one training step (`--batch` sequences of `--tokens` tokens of which
`--labels` are labelled, in microbatches as is the default), in turns in one process; the estimate's examples are as long.
`estimate_memory`: peak memory of the two beyond the model, each in its own process. `estimate_steps_config` and
`estimate_memory_config` are the same with the examples and the batches of `--config`.

Beyond the model: the highest resident memory while it runs, less that of the loaded model after a small forward pass.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.harness import Peak, child, figure, in_turns, median, report, say, seconds
from fedsb.adapters.attach import attach
from fedsb.adapters.state import parameters_of
from fedsb.adapters.tuner import adapted_layers, set_basis
from fedsb.basis.frames import Basis
from fedsb.basis.spectral import random_basis
from fedsb.config import RunConfig
from fedsb.data.batches import Encoded, collate, encode
from fedsb.data.sites import all_parts
from fedsb.data.tasks import load_task
from fedsb.models import device_of, load_model, load_tokenizer, locate
from fedsb.sections import BasisSection, TrainSection
from fedsb.training import start
from fedsb.training.loop import round_plan, train

SOURCES = ("random", "weights", "public", "sign")
PAD = 0


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart.toml", help="model, sizes and examples are this run's")
    parser.add_argument("--model", default="", help="another model than the config's; `tiny`: a small random one")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16, help="sequences of a training step")
    parser.add_argument("--tokens", type=int, default=128, help="length of a sequence")
    parser.add_argument("--labels", type=int, default=16, help="labelled tokens at its end")
    parser.add_argument("--turns", type=int, default=3, help="turns in which estimate and training step alternate")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        bench = Bench(options)
        print(json.dumps(bench.times() if options.measure == "times" else bench.memory_of(options.measure)))
        return
    with tempfile.TemporaryDirectory() as folder:
        tiny = options.model == "tiny"
        chosen = {**vars(options), "model": _tiny(Path(folder)) if tiny else options.model}
        passed = [f"--{name}={value}" for name, value in chosen.items() if name != "measure"]
        report("basis", figures(passed, configured=not tiny))


def figures(arguments: list[str], *, configured: bool) -> dict[str, dict[str, Any]]:
    """Everything, each in a process of its own."""
    measure: Callable[[str], dict[str, Any]] = lambda what: child("benchmarks.basis", *arguments, "--measure", what)  # noqa: E731
    found: dict[str, dict[str, Any]] = {}
    memory = {}
    for source in SOURCES:
        result = measure(source)
        memory[source] = result["growth"]
        found[source] = figure(result["seconds"], "s", peak_bytes=result["growth"])
        say(f"{source:8s} {result['seconds']:7.2f} s, {result['growth'] / 1e6:7.1f} MB beyond the model")
    memory["step"] = measure("step")["growth"]
    if configured:
        memory |= {what: measure(what)["growth"] for what in ("public-config", "step-config")}
    times = measure("times")
    for suffix in ("", "-config") if configured else ("",):
        key, ours, peer = suffix.replace("-", "_"), f"public{suffix}", f"step{suffix}"
        size = {"tokens_per_step": times["tokens"][peer], "tokens_of_estimate": times["tokens"][ours]}
        found[f"estimate_steps{key}"] = figure(
            times["seconds"][ours] / times["seconds"][peer],
            "steps",
            ours=times["seconds"][ours],
            peer=times["seconds"][peer],
            **size,
        )
        found[f"estimate_memory{key}"] = figure(memory[ours] / memory[peer], "x", ours=memory[ours], peer=memory[peer])
        say(
            f"estimate{suffix}: {found[f'estimate_steps{key}']['value']} steps, "
            f"{found[f'estimate_memory{key}']['value']} x memory"
        )
    return found


class Bench:
    """A model in this process, and what is measured on it, by name."""

    def __init__(self, options: argparse.Namespace) -> None:
        settings = [f"adapter.rank={options.rank}", *([f"model.source={options.model}"] if options.model else [])]
        self.config = RunConfig.load(Path(options.config), settings)
        self.options = options
        self.device = device_of(self.config.runtime.device)
        self.source = locate(self.config.model.source)
        self.model = attach(load_model(self.source, self.config.model, None, self.device), self.config)
        self.transformer = self.model.get_base_model()
        self.layers = {name: layer.get_base_layer() for name, layer in adapted_layers(self.model).items()}
        ids = torch.zeros(1, 8, dtype=torch.int64, device=self.device)
        with torch.no_grad():
            self.transformer(input_ids=ids, use_cache=False)

    def memory_of(self, what: str) -> dict[str, float]:
        """Seconds of one run of `what`, and peak memory beyond the model."""
        run = self._run(what)
        with Peak() as peak:
            spent = seconds(run)
        if what in SOURCES:
            spent = median([spent, *(seconds(run) for _ in range(self.options.turns - 1))])
        return {"seconds": spent, "growth": peak.growth}

    def times(self) -> dict[str, Mapping[str, float]]:
        """Estimate and training step in turns; seconds and tokens by name."""
        names = ["public", "step"] if self._without_tokenizer() else ["public", "step", "public-config", "step-config"]
        runs = {name: partial(seconds, self._run(name)) for name in names}
        measured = in_turns(runs, self.options.turns)
        tokens = {name: sum(map(len, self._rows(name))) for name in names}
        for name in names:
            if name.startswith("step"):  # a client's whole set, of which a step draws a batch
                tokens[name] = tokens[name] * self._section(name).batch_size // len(self._rows(name))
        return {"seconds": {name: median(values) for name, values in measured.items()}, "tokens": tokens}

    def _run(self, what: str) -> Callable[[], object]:
        config = self.config
        if what in ("random", "weights"):
            chosen = config.model_copy(update={"basis": config.basis.model_copy(update={"source": what})})
            return lambda: start.build_basis(chosen, self.model, None, self.device)
        rows = self._rows(what)
        if what.startswith("step"):
            shapes = {name: (layer.out_features, layer.in_features) for name, layer in self.layers.items()}
            set_basis(self.model, random_basis(shapes, config.adapter.rank, config.seed))
            return partial(self._step, rows, self._section(what))
        return partial(self._estimate, rows, sign=what == "sign")

    def _estimate(self, rows: list[Encoded], *, sign: bool) -> Basis:
        """The estimate as a server makes it, on these rows."""
        size = start.MICROBATCH
        batches = (collate(rows[i : i + size], PAD, "causal").to(self.device) for i in range(0, len(rows), size))
        section = BasisSection(source="public", sign=sign, public=self.config.data.tasks[0])
        config = self.config.model_copy(update={"basis": section})
        with patch.object(start, "_public_batches", lambda *_: batches):
            return start.build_basis(config, self.model, None, self.device)

    def _step(self, rows: list[Encoded], section: TrainSection) -> float:
        plan = round_plan(self.config.model_copy(update={"train": section}), 1)
        parameters = parameters_of(self.model)
        return train(self.transformer, parameters, rows, plan, kind="causal", pad_id=PAD, seed=0, client="bench")

    def _section(self, what: str) -> TrainSection:
        """`[train]` for one step of a measurement: the config's, or the default one with `--batch`."""
        section = self.config.train if what.endswith("-config") else TrainSection(batch_size=self.options.batch)
        return section.model_copy(update={"steps": 1})

    def _rows(self, what: str) -> list[Encoded]:
        """The examples of a measurement: made up, or the config's own."""
        data, estimate = self.config.data, not what.startswith("step")
        count = self.config.basis.examples if estimate else self.options.batch
        if what.endswith("-config"):
            task = data.tasks[0]
            examples = load_task(task, "train", 1)[:count] if estimate else all_parts(self.config, "train")[0]
            tokenizer = load_tokenizer(self.source)
            return list(encode(examples, tokenizer, data.max_length, data.system_prompt, "causal"))
        generator = torch.Generator().manual_seed(count)
        vocabulary = self.transformer.config.vocab_size
        drawn = torch.randint(vocabulary, (count, self.options.tokens), generator=generator).tolist()
        return [Encoded(row[: -self.options.labels], row[-self.options.labels :]) for row in drawn]

    def _without_tokenizer(self) -> bool:
        return not (self.source.folder / "tokenizer.json").exists()


def _tiny(folder: Path) -> str:
    """A random Llama of two small layers, in a folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


if __name__ == "__main__":
    main()
