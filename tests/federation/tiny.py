"""A federation that takes a second: a random two-layer Llama (or BERT), a word tokenizer, and tasks of a dozen words."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, RecordDict
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from clients.app import app as client_app
from fedsb.abilities import FUSING, PROMPTING
from fedsb.config import RunConfig
from fedsb.store.files import read_events, read_json
from fedsb.store.tensors import load_tensors
from server.app import app as server_app
from server.local_grid import LocalGrid, node_configs

WORDS = ["red", "green", "blue", "cat", "dog", "bird", "one", "two", "three", "up", "down", "left", "right"]
TEMPLATE = "{% for m in messages %}<user> {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
State = dict[str, torch.Tensor]


def save_model(folder: Path, kind: str = "causal", width: int = 32) -> str:
    """A tiny random model with its tokenizer, saved in a folder; returns the folder as text. Ranks go up to half its width."""
    torch.manual_seed(0)
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", "<user>", "<assistant>", *WORDS])}
    sizes: dict[str, Any] = {
        "vocab_size": len(vocabulary),
        "hidden_size": width,
        "intermediate_size": 3 * width // 2,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    }
    model: Any
    if kind == "causal":
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, initializer_range=0.2))
    else:
        model = BertModel(BertConfig(**sizes, initializer_range=0.2))
    model.save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", chat_template=TEMPLATE
    ).save_pretrained(folder)
    return str(folder)


def save_task(folder: Path, kind: str = "causal", train: int = 21, test: int = 9) -> str:
    """A task that says three words backwards, or names the first of three words; returns its source."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count, shift in (("train", train, 0), ("test", test, 5)):
        rows = []
        for i in range(count):
            words = [WORDS[(i * k + shift) % len(WORDS)] for k in (1, 3, 7)]
            if kind == "causal":
                rows.append({"prompt": " ".join(words), "completion": " ".join(reversed(words))})
            else:
                rows.append({"text": " ".join(words), "label": ("low", "middle", "high")[i % 3]})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"jsonl:{folder}"


def table(source: str, task: str, /, **sections: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as a table: three clients of unequal size, three rounds of two steps; `sections` override."""
    content: dict[str, Any] = {
        "name": "tiny",
        "seed": 3,
        "model": {"source": source, "dtype": "fp32"},
        "data": {"partition": "size", "alpha": 1.0, "tasks": [{"name": "words", "source": task}]},
        "adapter": {"rank": 4},
        "train": {"steps": 2, "batch_size": 4, "microbatch": 2},
        "federation": {"clients": 3, "rounds": 3},
        "personal": {"steps": 2},
        "runtime": {"progress": "none", "threads": 1},
    }
    for name, values in sections.items():
        content[name] = {**content.get(name, {}), **values}
    return content


def classification(source: str, task: str, /, **sections: Mapping[str, Any]) -> dict[str, Any]:
    """The same for a classifier whose head is trained along."""
    return table(source, task, **{"model": {"kind": "classification"}, **sections})


def config_of(content: Mapping[str, Any]) -> RunConfig:
    """A table as a checked configuration, with a pool of adapters for methods that mix one, and an encoder for LoPA."""
    adapter = content.get("adapter", {})
    if adapter.get("method") in PROMPTING and content["model"].get("kind", "causal") == "causal":
        prompt = {"encoder": encoder_of(content["model"]["source"]), "tokens": 2, "hidden": 4}
        content = {**content, "adapter": {**prompt, **adapter}}
    if adapter.get("method") in FUSING:
        kind = content["model"].get("kind", "causal")
        pool = {"basis": {"source": "pool", "pool": str(pool_of(content["model"]["source"], kind))} | content.get("basis", {})}
        content = {**content, "adapter": {"heads": 2} | adapter, **pool}
    return RunConfig.from_json(json.dumps(content))


def encoder_of(source: str) -> str:
    """A tiny sentence encoder beside a model's folder."""
    folder = Path(f"{source}-encoder")
    return str(folder) if folder.exists() else save_model(folder, "classification", 16)


def pool_of(source: str, kind: str) -> Path:
    """Two plain LoRAs of rank 4 for a model, beside its folder."""
    folder = Path(f"{source}-pool")
    for number in range(0 if folder.exists() else 2):
        of, task = (AutoModelForCausalLM, "CAUSAL_LM") if kind == "causal" else (AutoModelForSequenceClassification, "SEQ_CLS")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(number)
            lora = LoraConfig(r=4, lora_alpha=4, target_modules="all-linear", task_type=task)
            model = get_peft_model(of.from_pretrained(source), lora)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_" in name:
                        parameter.copy_(0.2 * torch.randn_like(parameter))
        model.save_pretrained(folder / f"member-{number}")
    return folder


def local_grid(config: RunConfig, folder: Path) -> LocalGrid:
    """The grid that `fedsb simulate` makes."""
    return LocalGrid(client_app, node_configs(config.client_names, str(folder / "sites")))


def federate(config: RunConfig, folder: Path, *, resume: bool = False, grid: Any = None, home: Path | str = "") -> dict[str, Any]:
    """A whole run with the real apps, as `fedsb simulate` does it; returns summary.json."""
    values = {"config": config.to_json(), "out": str(folder), "resume": resume, "home": str(home)}
    context = Context(run_id=0, node_id=0, node_config={}, state=RecordDict(), run_config=values)
    server_app(grid or local_grid(config, folder), context)
    return read_json(folder / "summary.json")


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Events of one kind, oldest first."""
    return [event for event in read_events(folder / "events.jsonl") if event["event"] == kind]


def final_state(folder: Path) -> State:
    """The state of the newest checkpoint."""
    last = sorted((folder / "checkpoints").glob("round-*"))[-1]
    return load_tensors(last / "state.safetensors")[0]


def personal_states(folder: Path) -> dict[str, State]:
    """Client → the state it published last."""
    files = {path.parent.parent.name: path for path in sorted((folder / "adapters").glob("*/v*/core.safetensors"))}
    return {name: load_tensors(path)[0] for name, path in files.items()}


def equal(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def lasting(summary: Mapping[str, Any], without: str = "seconds") -> dict[str, Any]:
    """A summary without its times, memory and machine, and without one thing more."""
    kept = {key: value for key, value in summary.items() if key not in ("seconds", "peak_memory", "machine", without)}
    kept["history"] = [{k: v for k, v in entry.items() if k != "seconds"} for entry in summary["history"]]
    return kept


def assert_same_result(a: Path, b: Path) -> None:
    """Two run folders hold the same state and the same personal adapters, bit for bit."""
    assert equal(final_state(a), final_state(b))
    mine, other = personal_states(a), personal_states(b)
    assert mine.keys() == other.keys() and mine
    assert all(equal(mine[name], other[name]) for name in mine)


def assert_same_run(a: Path, b: Path, *, same_bytes: bool = True) -> None:
    """The same result, and the same scores, losses, aggregation errors and bytes."""
    assert_same_result(a, b)
    one, other = (lasting(read_json(run / "summary.json"), "seconds" if same_bytes else "bytes") for run in (a, b))
    assert one == other
