"""The card of an exported adapter, `README.md`: what it is, what it was trained on, and how it is loaded."""

import json
from collections.abc import Mapping
from typing import Any

from fedsb.adapters.methods import METHODS
from fedsb.store.adapters import StoredAdapter

TUNERS = {  # importing one registers its peft_type
    "FEDSB": "fedsb.adapters.tuner",
    "FEDSB_NOLA": "fedsb.adapters.nola",
    "FEDSB_LOPA": "fedsb.adapters.lopa",
}
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # values of --max-lora-rank in vLLM 0.32


def card(stored: StoredAdapter, config: Mapping[str, Any], lost: float | None) -> str:
    """The card of an adapter with some `adapter_config.json`. `lost`: share of the update's norm that a truncation took."""
    manifest = stored.manifest
    trained = sum(tensor.numel() for tensor in stored.state.values())
    method = METHODS[manifest.method]
    basis = f"| basis fingerprint | `{manifest.basis_fingerprint}` |\n" if method.frames else ""
    cut = "" if lost is None else f"| truncated | to rank {config['r']}: {lost:.2%} of the update's norm is lost |\n"
    kind = {"LORA": "a LoRA", "HIRA": "a HiRA"}.get(config["peft_type"], "ours")
    whole = "" if config["r"] == manifest.rank else f", here as {kind} of rank {config['r']}"
    privacy = "none" if manifest.epsilon is None else f"ε = {manifest.epsilon:g} spent by this client"
    return f"""---
base_model: {json.dumps(manifest.base_model.name)}
library_name: peft
tags: [fedsb, {manifest.method}, {str(config["peft_type"]).lower()}]
---

# {manifest.client}, version {manifest.version}

| | |
|---|---|
| base model | `{manifest.base_model.name}` (SHA-256 `{manifest.base_model.sha256}`) |
| method | {manifest.method}, rank {manifest.rank}{whole} |
| adapted layers | {len(stored.layers)} |
| trained numbers | {trained:,} |
| task | {manifest.task} |
| round | {manifest.round} |
| differential privacy | {privacy} |
{basis}{cut}| published | {manifest.created} |

Trained with FedSB. {method.says} The server averaged what they sent in each of {manifest.round} rounds, and
this client went on from the last average on its own data. The files' SHA-256 are in `manifest.json`.

{_how_to_load(stored, config)}"""


def _how_to_load(stored: StoredAdapter, config: Mapping[str, Any]) -> str:
    kind = {"SEQ_CLS": "SequenceClassification", "CAUSAL_LM": "CausalLM", None: "SpeechSeq2Seq"}[config["task_type"]]
    own = f"import {TUNERS[config['peft_type']]}  # teaches PEFT this format\n" if config["peft_type"] in TUNERS else ""
    base = stored.manifest.base_model.name
    text = f"""## Loading it with PEFT

```python
{own}from peft import PeftModel
from transformers import AutoModelFor{kind}

base = AutoModelFor{kind}.from_pretrained({json.dumps(base)})
model = PeftModel.from_pretrained(base, "THIS_FOLDER")
```
"""
    limit = next((rank for rank in VLLM_RANKS if rank >= config["r"]), None)
    if config["peft_type"] != "LORA" or limit is None or config["task_type"] != "CAUSAL_LM":
        return text
    name = stored.manifest.client
    return f"""{text}
## Serving it with vLLM

```
vllm serve {base} --enable-lora --max-lora-rank {limit} --lora-modules {name}=THIS_FOLDER
```
"""
