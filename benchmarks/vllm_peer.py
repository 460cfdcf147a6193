"""Tokens per second of vLLM on CPU, each request with a LoRA of its own; run by `benchmarks.serving` with the Python of an
environment that has vLLM, which is none of ours.

    PYTHON benchmarks/vllm_peer.py FOLDER TENANTS PROMPT ANSWER TURNS THREADS

FOLDER has `model` and `lora-0`, `lora-1`, …. The last line is a JSON list, one number a turn.
"""

import json
import os
import sys
import time
from typing import Any


def main(folder: str, tenants: int, prompt: int, answer: int, turns: int, threads: int) -> None:
    """Measure and print."""
    os.environ |= {"OMP_NUM_THREADS": str(threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]
    from vllm.lora.request import LoRARequest  # type: ignore[import-not-found]

    model: Any = LLM(
        f"{folder}/model",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        enable_lora=True,
        max_loras=tenants,
        max_lora_rank=16,
        max_model_len=256,
        max_num_seqs=tenants,
        enforce_eager=True,
    )
    prompts = [{"prompt_token_ids": [7 + i % 50, 8, 9, 10, 11][:prompt]} for i in range(tenants)]
    loras = [LoRARequest(f"lora-{i}", i + 1, f"{folder}/lora-{i}") for i in range(tenants)]
    sampling = SamplingParams(temperature=0, max_tokens=answer, min_tokens=answer, ignore_eos=True, detokenize=False)
    rates = []
    for _ in range(turns + 1):
        started = time.perf_counter()
        found = model.generate(prompts, sampling, lora_request=loras, use_tqdm=False)
        seconds = time.perf_counter() - started
        rates.append(sum(len(each.outputs[0].token_ids) for each in found) / seconds)
    print(json.dumps(rates[1:]))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
