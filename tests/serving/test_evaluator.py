from typing import Any

import pytest
import torch
from torch.nn import functional

from fedsb.data.batches import Encoded, encode
from fedsb.data.examples import Example
from fedsb.serving.evaluator import Score, answers, evaluate
from tests import reference
from tests.adapters.samples import bert, llama
from tests.data.test_batches import byte_tokenizer
from tests.training.samples import labelled

TOKENIZER = byte_tokenizer()
CPU = torch.device("cpu")
LONGEST = 12
LEARNT = [("one", "1"), ("two", "22"), ("three is", "3"), ("four", "4444"), ("five", "so 5")]
OTHERS = [("six", "6"), ("seven", "7777"), ("eight it is", "88"), ("nine", "9")]


def _examples(pairs: list[tuple[str, str]]) -> list[Example]:
    return [Example("t", prompt, completion, completion) for prompt, completion in pairs]


def _rows(examples: list[Example]) -> list[Encoded]:
    return encode(examples, TOKENIZER, 64, None, "causal")


def _generation(model: Any, ids: list[int]) -> list[int]:
    prompt = torch.tensor([ids])
    out = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=LONGEST,
        pad_token_id=TOKENIZER.pad_token_id,
        eos_token_id=TOKENIZER.eos_token_id,
    )
    found: list[int] = out[0, len(ids) :].tolist()
    return found


@pytest.fixture(scope="module")
def stages() -> list[Any]:
    """One model at several stages of learning LEARNT by heart: from knowing none to knowing all of them."""
    model = llama(vocab_size=260, initializer_range=0.02).train().requires_grad_(True)
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    rows, states = _rows(_examples(LEARNT)), []
    for step in range(46):
        if step % 5 == 0:
            states.append({name: t.clone() for name, t in model.state_dict().items()})
        optimiser.zero_grad()
        reference.batch_loss(model, rows).backward()
        optimiser.step()
    models = []
    for state in states:
        models.append(llama(vocab_size=260))
        models[-1].load_state_dict(state)
    return models


def _score(model: Any, examples: list[Example], batch_size: int, rows: list[Encoded] | None = None, **changes: Any) -> Score:
    settings = {"kind": "causal", "tokenizer": TOKENIZER, "device": CPU, "max_new_tokens": LONGEST} | changes
    rows = _rows(examples) if rows is None else rows
    return evaluate(model, examples, rows, batch_size=batch_size, **settings)


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_scores_are_those_of_greedy_decoding_one_example_at_a_time(stages: list[Any], batch_size: int) -> None:
    examples = _examples(LEARNT + OTHERS)
    rows, found = _rows(examples), []
    for model in stages:
        matches = reference.exact_matches(model, rows, TOKENIZER, LONGEST)
        score = _score(model, examples, batch_size)
        assert score.exact_match == sum(matches) / len(examples)
        with torch.no_grad():
            assert score.loss == pytest.approx(float(reference.batch_loss(model, rows)), rel=1e-4)
        assert score.n == len(examples)
        found.append(sum(matches))
    assert found[0] == 0
    assert found[-1] >= len(LEARNT)
    assert len(set(found)) >= 3  # and some in between


def test_an_exact_match_takes_every_token_and_the_end() -> None:
    """Against a model that says what it is told to: right, wrong at one place, too short, too long."""
    row = _rows(_examples([("ab", "cde")]))[0]
    right = row.completion
    assert right[-1] == TOKENIZER.eos_token_id
    for said, hit in [
        (right, True),
        ([right[0], right[1], 99, right[3]], False),
        ([99, *right[1:]], False),
        ([*right[:3], 99], False),
    ]:
        model = _Parrot(len(row.prompt), said)
        assert _score(model, _examples([("ab", "cde")]), 1).exact_match == hit, said


class _Parrot(torch.nn.Module):
    """Predicts fixed tokens after a prompt, whatever comes in; its logits are not those of a plain head."""

    def __init__(self, start: int, said: list[int]) -> None:
        super().__init__()
        self.start, self.said = start, said

    def get_output_embeddings(self) -> None:
        return None

    @property
    def config(self) -> Any:
        return llama().config

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        logits = torch.zeros(*input_ids.shape, 260)
        for place, token in enumerate(self.said):
            logits[:, self.start - 1 + place, token] = 5.0
        return type("Output", (), {"logits": logits})


REASONED = [Example("t", prompt, completion, completion.rpartition(" ")[2]) for prompt, completion in LEARNT + OTHERS]


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_an_answer_at_the_end_of_a_text_is_generated(stages: list[Any], batch_size: int) -> None:
    """Of REASONED only "so 5" is longer than its answer, 5; the others are scored token for token in the same batch."""
    hits = set()
    for model in stages:
        rows = _rows(REASONED)
        naive = reference.exact_matches(model, rows, TOKENIZER, LONGEST)
        for place, example in enumerate(REASONED):
            if example.answer != example.completion:
                text = TOKENIZER.decode(_generation(model, rows[place].prompt), skip_special_tokens=True)
                naive[place] = answers(text, example.answer)
                hits.add(naive[place])
        assert _score(model, REASONED, batch_size).exact_match == sum(naive) / len(REASONED)
    assert hits == {True, False}


def test_a_text_that_only_ends_like_the_completion_is_no_exact_match(stages: list[Any]) -> None:
    """The last stage says "so 5" to "five": right for the answer 5, wrong for the completion 5."""
    last = stages[-1]
    longer, whole = [Example("t", "five", "it is 5", "5")], [Example("t", "five", "5", "5")]
    assert _score(last, longer, 1).exact_match == 1
    for batch_size in (1, 2):
        assert _score(last, longer + whole, batch_size).exact_match == 0.5


def test_too_few_tokens_cut_an_answer_off(stages: list[Any]) -> None:
    longer = [Example("t", "five", "so 5", "5")]
    assert _score(stages[-1], longer, 1, max_new_tokens=3).exact_match == 0


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_a_classifier_is_scored_by_its_likeliest_label(batch_size: int) -> None:
    model, rows = bert(vocab_size=260), labelled(9)
    losses, hits = 0.0, 0
    with torch.no_grad():
        for row in rows:
            logits = model(input_ids=torch.tensor([row.prompt])).logits
            losses += float(functional.cross_entropy(logits, torch.tensor([row.label])))
            hits += int(logits.argmax()) == row.label
    assert 0 < hits < 9
    examples = [Example("t", "text", "", "", row.label) for row in rows]
    score = _score(model, examples, batch_size, rows, kind="classification")
    assert score == Score(pytest.approx(losses / 9, rel=1e-5), hits / 9, 9)


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("The answer is 18.", "18", True),
        ("#### 18", "18", True),
        ("18", "18", True),
        ("18 .\n", "18", True),
        ("It costs $18", "18", True),
        ("is 18\n", " 18 ", True),
        ("x=18", "18", True),
        ("(18", "18", True),
        ("118", "18", False),
        ("9.8", "8", False),
        ("-8", "8", False),
        ("it is −8", "8", False),
        ("it is -8", "-8", True),
        ("1,118", "118", False),
        ("3/8", "8", False),
        ("8.", "8.0", False),
        ("18 or 19", "18", False),
        ("18!", "18", False),
        ("", "18", False),
        ("The answer is True.", "true", True),
        ("the answer is (B", "b", True),
        ("untrue", "true", False),
        ("answer_b", "b", False),
        ("so a+b", "a+b", True),
        ("so aab", "a+b", False),
        ("18\nand more", "18", False),
    ],
)
def test_whether_a_text_ends_with_the_answer(text: str, answer: str, expected: bool) -> None:
    assert answers(text, answer) is expected
