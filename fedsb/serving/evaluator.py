"""Scoring a model on one client's test set: loss and exact match.

Where the answer is the whole completion, exact match under greedy decoding needs no decoding: the model produces a text
token for token if and only if each of its tokens, the end of sequence included, is the most likely one after those
before it, and one forward pass tells that for all positions at once. Where the answer ends a longer text, it is generated.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fedsb.data.batches import Batch, Encoded, Kind, collate, collate_prompts, evaluation_order
from fedsb.data.examples import Example
from fedsb.training.loss import head_of, inputs_of, labelled_states, sequence_weights


@dataclass(frozen=True)
class Score:
    """Means over a client's n test examples: loss in nats, exact match in [0, 1] (accuracy, for classification)."""

    loss: float
    exact_match: float
    n: int


@torch.no_grad()
def evaluate(
    model: Any,
    examples: Sequence[Example],
    rows: Sequence[Encoded],
    *,
    kind: Kind,
    tokenizer: Any,
    device: torch.device,
    batch_size: int,
    max_new_tokens: int,
) -> Score:
    """Score `model` (a transformers model in evaluation mode, not the PEFT wrapper) on examples and their rows."""
    order = evaluation_order(rows)
    loss, hits = 0.0, 0
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = collate([rows[i] for i in chosen], tokenizer.pad_token_id, kind).to(device)
        losses, right = (_classified if kind == "classification" else _forced)(model, batch)
        longer = [place for place, i in enumerate(chosen) if examples[i].answer != examples[i].completion]
        if kind == "causal" and longer:
            texts = _generate(model, [rows[chosen[place]] for place in longer], tokenizer, device, max_new_tokens)
            for place, text in zip(longer, texts, strict=True):
                right[place] = answers(text, examples[chosen[place]].answer)
        loss += float(losses.sum())
        hits += int(right.sum())
    return Score(loss / len(rows), hits / len(rows), len(rows))


def answers(text: str, answer: str) -> bool:
    """Whether a generated text ends with the answer as a whole word or number; case, a full stop, a currency sign aside."""
    whole = r"(?<![\w.\-−])(?<!\d[,/:])"  # 8 does not end 118, 9.8, -8, 1,118, 3/8 or 7:8
    return re.search(rf"{whole}{re.escape(answer.strip())}[.\s]*$", text, flags=re.IGNORECASE) is not None


def _forced(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Per sequence: mean loss (B,) and whether greedy decoding would yield exactly its labels (B,)."""
    sequences = batch.labels.shape[0]
    states, labels, row = labelled_states(model, batch)
    weight = head_of(model)
    logits = (states if weight is None else states @ weight.T).float()
    scale = sequence_weights(row, sequences) * sequences
    losses = torch.zeros(sequences, device=row.device).index_add_(
        0, row, functional.cross_entropy(logits, labels, reduction="none") * scale
    )
    wrong = torch.zeros(sequences, device=row.device).index_add_(0, row, (logits.argmax(-1) != labels).float())
    return losses, wrong == 0


def _classified(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.float()
    return functional.cross_entropy(logits, batch.labels, reduction="none"), logits.argmax(-1) == batch.labels


def _generate(model: Any, rows: Sequence[Encoded], tokenizer: Any, device: torch.device, max_new_tokens: int) -> list[str]:
    """Greedy continuations, without the prompts."""
    batch = collate_prompts(rows, tokenizer.pad_token_id).to(device)
    inputs = inputs_of(model, batch)
    inputs.pop("position_ids", None)  # generate counts for itself
    tokens = model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    prompt = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0  # of embeddings nothing comes back
    texts: list[str] = tokenizer.batch_decode(tokens[:, prompt:], skip_special_tokens=True)
    return texts
