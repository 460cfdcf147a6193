"""Scoring a model on one client's test set: loss and exact match.

Where the answer is the whole completion, exact match under greedy decoding needs no decoding: the model produces a text
token for token if and only if each of its tokens, the end of sequence included, is the most likely one after those
before it, and one forward pass tells that for all positions at once. Where the answer ends a longer text, it is generated. So is
a program, cut at its first stop, and right if it passes its tests in the sandbox; and a transcript, of which wrong words are
counted.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import StoppingCriteria, StoppingCriteriaList

from fedsb.data.batches import Batch, Encoded, Kind, collate, collate_prompts, evaluation_order
from fedsb.data.code import Code
from fedsb.data.examples import Example
from fedsb.serving.bank import Bank, Place
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


@dataclass(frozen=True)
class Trial:
    """Examples, their rows, and in a batch of several tenants where the adapter is that they score (None: the base model)."""

    examples: Sequence[Example]
    rows: Sequence[Encoded]
    place: Place | None = None


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
    """`evaluate_all` of one trial, of the model as it is."""
    told: dict[str, Any] = {"kind": kind, "tokenizer": tokenizer, "device": device}
    return evaluate_all(model, [Trial(examples, rows)], None, batch_size=batch_size, max_new_tokens=max_new_tokens, **told)[0]


@torch.no_grad()
def evaluate_all(
    model: Any,
    trials: Sequence[Trial],
    bank: Bank | None,
    *,
    kind: Kind,
    tokenizer: Any,
    device: torch.device,
    batch_size: int,
    max_new_tokens: int,
) -> list[Score]:
    """Score `model` (a transformers model in evaluation mode, not the PEFT wrapper) on each trial, all in the same batches.

    `bank`: of a model that uses one (`fedsb.serving.mixed.mix`); without it all trials are of the model as it is.

    Raises as `require`, before anything is generated.
    """
    examples = [example for trial in trials for example in trial.examples]
    rows = [row for trial in trials for row in trial.rows]
    of = [number for number, trial in enumerate(trials) for _ in trial.rows]
    require(examples)
    order = evaluation_order(rows)
    tallies = [_Tally() for _ in trials]

    def using(chosen: Sequence[int]) -> AbstractContextManager[None]:
        return bank.using([trials[of[i]].place for i in chosen]) if bank else nullcontext()

    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = collate([rows[i] for i in chosen], tokenizer.pad_token_id, kind).to(device)
        with using(chosen):
            losses, right = (_classified if kind == "classification" else _forced)(model, batch)
        longer = [i for i in chosen if examples[i].code or examples[i].answer != examples[i].completion]
        hits = dict(zip(chosen, right.tolist(), strict=True))
        if kind == "speech":
            assert batch.features is not None
            begun = torch.tensor([rows[i].prompt for i in chosen], device=device)
            with using(chosen):
                texts = transcribe(model, batch.features, begun, tokenizer, max_new_tokens)
            for i, text in zip(chosen, texts, strict=True):
                speech = examples[i].speech
                language = speech.language if speech else None
                wrong, words = word_errors(examples[i].completion, text, language)
                tallies[of[i]].count(language or "-", wrong, words)
                hits[i] = wrong == 0
        elif kind == "causal" and longer:
            asked = [examples[i] for i in longer]
            stops = _Stops([example.code for example in asked], tokenizer)
            with using(longer):
                texts = _generate(model, [rows[i] for i in longer], tokenizer, device, max_new_tokens, stops)
            hits |= dict(zip(longer, _right(texts, asked), strict=True))
        for i, loss in zip(chosen, losses.tolist(), strict=True):
            tally, code = tallies[of[i]], examples[i].code
            tally.loss += loss
            tally.hits += bool(hits[i])
            if code:
                tally.count(code.language, bool(hits[i]), 1)
    return [tally.score(len(trial.rows), spoken=kind == "speech") for tally, trial in zip(tallies, trials, strict=True)]


@dataclass
class _Tally:
    loss: float = 0.0
    hits: int = 0
    languages: dict[str, tuple[int, int]] = field(default_factory=dict)

    def count(self, language: str, some: int, of: int) -> None:
        before = self.languages.get(language, (0, 0))
        self.languages[language] = before[0] + some, before[1] + of

    def score(self, n: int, *, spoken: bool) -> Score:
        wrong, words = (sum(counts) for counts in zip(*self.languages.values(), strict=True)) if spoken else (0, 0)
        return Score(self.loss / n, self.hits / n, n, self.languages, wrong / max(words, 1) if spoken else None)


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
