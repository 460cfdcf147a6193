"""Scoring a model on one client's test set: loss and exact match.

Where the answer is the whole completion, exact match under greedy decoding needs no decoding: the model produces a text
token for token if and only if each of its tokens, the end of sequence included, is the most likely one after those
before it, and one forward pass tells that for all positions at once. Where the answer ends a longer text, it is generated. So is
a program, cut at its first stop, and right if it passes its tests in the sandbox; and a transcript, of which wrong words are
counted.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import StoppingCriteria, StoppingCriteriaList

from fedsb.data.batches import Batch, Encoded, Kind, collate, collate_prompts, evaluation_order
from fedsb.data.code import Code
from fedsb.data.examples import Example
from fedsb.serving.languages import require_languages, verdicts
from fedsb.serving.transcripts import transcribe, word_errors
from fedsb.training.loss import head_of, inputs_of, labelled_states, sequence_weights


@dataclass(frozen=True)
class Score:
    """Means over a client's n test examples: loss in nats, exact match in [0, 1] (accuracy, for classification; pass@1 of one
    greedy answer, for programs; transcripts without a wrong word), wer: wrong words over all words of recordings."""

    loss: float
    exact_match: float
    n: int
    languages: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # programs passed, or wrong words; and of how many
    wer: float | None = None

    def told(self, task: str) -> dict[str, Any]:
        """For tables and JSON; languages only where there are programs or recordings, wer only of these."""
        found = {"loss": self.loss, "exact_match": self.exact_match, "n": self.n, "task": task}
        found |= {} if self.wer is None else {"wer": self.wer}
        return found | ({"languages": {name: list(counts) for name, counts in self.languages.items()}} if self.languages else {})


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
    """Score `model` (a transformers model in evaluation mode, not the PEFT wrapper) on examples and their rows.

    Raises as `require`, before anything is generated.
    """
    require(examples)
    order = evaluation_order(rows)
    loss, hits, languages = 0.0, 0, dict[str, tuple[int, int]]()
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        of, some = [examples[i] for i in chosen], [rows[i] for i in chosen]
        batch = collate(some, tokenizer.pad_token_id, kind).to(device)
        losses, right = (_classified if kind == "classification" else _forced)(model, batch)
        longer = [place for place, example in enumerate(of) if example.code or example.answer != example.completion]
        if kind == "speech":
            assert batch.features is not None
            begun = torch.tensor([row.prompt for row in some], device=device)
            texts = transcribe(model, batch.features, begun, tokenizer, max_new_tokens)
            for place, (text, example) in enumerate(zip(texts, of, strict=True)):
                language = example.speech.language if example.speech else None
                wrong, words = word_errors(example.completion, text, language)
                _count(languages, language or "-", wrong, words)
                right[place] = wrong == 0
        elif kind == "causal" and longer:
            asked = [of[place] for place in longer]
            stops = _Stops([example.code for example in asked], tokenizer)
            texts = _generate(model, [some[place] for place in longer], tokenizer, device, max_new_tokens, stops)
            for place, hit in zip(longer, _right(texts, asked), strict=True):
                right[place] = hit
        for example, hit in zip(of, right.tolist(), strict=True):
            if example.code:
                _count(languages, example.code.language, bool(hit), 1)
        loss += float(losses.sum())
        hits += int(right.sum())
    wrong, words = (sum(counts) for counts in zip(*languages.values(), strict=True)) if kind == "speech" else (0, 0)
    return Score(loss / len(rows), hits / len(rows), len(rows), languages, wrong / max(words, 1) if kind == "speech" else None)


@torch.no_grad()
def loss_on(model: Any, rows: Sequence[Encoded], kind: Kind, pad_id: int, device: torch.device, batch_size: int) -> float:
    """Mean loss alone, nats, as in `evaluate`."""
    order, total = evaluation_order(rows), 0.0
    for start in range(0, len(order), batch_size):
        batch = collate([rows[i] for i in order[start : start + batch_size]], pad_id, kind).to(device)
        total += float((_classified if kind == "classification" else _forced)(model, batch)[0].sum())
    return total / len(rows)


def require(examples: Sequence[Example]) -> None:
    """Raise SandboxError if there are programs that cannot be run here, DataError if there are recordings without what it takes
    to count wrong words."""
    if programs := [(example.code, example.prompt) for example in examples if example.code]:
        require_languages(programs)
    if any(example.speech for example in examples):
        word_errors("", "", None)


def _count(languages: dict[str, tuple[int, int]], language: str, some: int, of: int) -> None:
    before = languages.get(language, (0, 0))
    languages[language] = before[0] + some, before[1] + of


def _right(texts: Sequence[str], examples: Sequence[Example]) -> list[bool]:
    """Which generated texts are right: they end with the answer, or pass their tests."""
    both = list(zip(texts, examples, strict=True))
    programs = [(example.code, example.prompt + example.code.cut(text)) for text, example in both if example.code]
    passed = iter(verdicts(programs))
    return [next(passed).passed if example.code else answers(text, example.answer) for text, example in both]


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


class _Stops(StoppingCriteria):
    """Ends each row of a batch at the first stop of its own program, looking at what was generated and not at the prompt."""

    def __init__(self, codes: Sequence[Code | None], tokenizer: Any) -> None:
        self.codes, self.tokenizer, self.prompt = codes, tokenizer, 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """input_ids (B, T) so far → (B,) whether a row is finished."""
        texts = self.tokenizer.batch_decode(input_ids[:, self.prompt :], skip_special_tokens=True)
        done = [code is not None and code.cut(text) != text for code, text in zip(self.codes, texts, strict=True)]
        return torch.tensor(done, device=input_ids.device)


def _generate(
    model: Any, rows: Sequence[Encoded], tokenizer: Any, device: torch.device, max_new_tokens: int, stops: _Stops
) -> list[str]:
    """Greedy continuations, without the prompts; a program's ends with its first stop."""
    batch = collate_prompts(rows, tokenizer.pad_token_id).to(device)
    inputs = inputs_of(model, batch)
    inputs.pop("position_ids", None)  # generate counts for itself
    stops.prompt = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0  # of embeddings nothing comes back
    tokens = model.generate(
        **inputs,
        stopping_criteria=StoppingCriteriaList([stops]),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    texts: list[str] = tokenizer.batch_decode(tokens[:, stops.prompt :], skip_special_tokens=True)
    return texts
