from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.decoders import ByteLevel
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from fedsb.data.batches import Encoded, collate, collate_prompts, draw, encode, evaluation_order
from fedsb.data.examples import Example
from fedsb.errors import DataError, ModelError

TURN = "{{ '<s>' + message['role'] + ':' + message['content'] + '</s>' }}"
ASSISTANT = "{% if add_generation_prompt %}<s>assistant:{% endif %}"
FIRST_IS_SYSTEM = "messages and messages[0]['role'] == 'system'"
# as SmolLM2: a default system block, and no token before the first turn
DEFAULTED = (
    f"{{% if not ({FIRST_IS_SYSTEM}) %}}<s>system:be nice</s>{{% endif %}}"
    f"{{% for message in messages %}}{TURN}{{% endfor %}}{ASSISTANT}"
)
# as Llama 3: a token before everything, and a system block always
HEADED = (
    f"<b>{{% if {FIRST_IS_SYSTEM} %}}{{% set system = messages[0]['content'] %}}{{% set messages = messages[1:] %}}"
    "{% else %}{% set system = 'be nice' %}{% endif %}<s>system:today. {{ system }}</s>"
    f"{{% for message in messages %}}{TURN}{{% endfor %}}{ASSISTANT}"
)
PLAIN = f"{{% for message in messages %}}{TURN}{{% endfor %}}{ASSISTANT}"
REFUSING = f"{{% if {FIRST_IS_SYSTEM} %}}{{{{ raise_exception('no system role') }}}}{{% endif %}}{PLAIN}"
DROPPING = f"{{% for message in messages %}}{{% if message['role'] != 'system' %}}{TURN}{{% endif %}}{{% endfor %}}{ASSISTANT}"
# as Mistral: the system message goes into the user's
MERGING = (
    "{{ '<s>user:' + (messages[0]['content'] + ' ' if messages[0]['role'] == 'system' else '') }}"
    "{% if messages[-1]['role'] == 'user' %}{{ messages[-1]['content'] }}{% endif %}</s>" + ASSISTANT
)


def byte_tokenizer(template: str | None = None, ends: str = "", eos: str | None = "</s>") -> PreTrainedTokenizerFast:
    """One token per byte, and four special tokens; `ends` closes texts as T5's tokenizer does."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = ByteLevel()
    core.add_special_tokens(["<p>", "<b>", "<s>", "</s>"])
    special = [(token, core.token_to_id(token)) for token in ("<b>", "</s>")]
    core.post_processor = processors.TemplateProcessing(single=f"<b> $A {ends}".strip(), special_tokens=special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<p>", bos_token="<b>", eos_token=eos)
    tokenizer.chat_template = template
    return tokenizer


def prompt_of(template: str | None, system_prompt: str | None, text: str = "hi") -> str:
    tokenizer = byte_tokenizer(template)
    (row,) = encode([Example("t", text, "yes", "yes")], tokenizer, 500, system_prompt, "causal")
    assert tokenizer.decode(row.completion) == "yes</s>"
    return str(tokenizer.decode(row.prompt))


@pytest.mark.parametrize(
    ("template", "system_prompt", "expected"),
    [
        (DEFAULTED, None, "<s>system:be nice</s><s>user:hi</s><s>assistant:"),
        (DEFAULTED, "", "<s>user:hi</s><s>assistant:"),
        (DEFAULTED, "be brief", "<s>system:be brief</s><s>user:hi</s><s>assistant:"),
        (HEADED, None, "<b><s>system:today. be nice</s><s>user:hi</s><s>assistant:"),
        (HEADED, "", "<b><s>user:hi</s><s>assistant:"),
        (PLAIN, "", "<s>user:hi</s><s>assistant:"),
        (REFUSING, None, "<s>user:hi</s><s>assistant:"),
        (REFUSING, "", "<s>user:hi</s><s>assistant:"),
        (DROPPING, "", "<s>user:hi</s><s>assistant:"),
        (f"<b>preamble {DROPPING}", "", "<b>preamble <s>user:hi</s><s>assistant:"),
        (MERGING, "", "<s>user:hi</s><s>assistant:"),
        (MERGING, "be brief", "<s>user:be brief hi</s><s>assistant:"),
        (None, None, "<b>hi\n"),
        (None, "", "<b>hi\n"),
    ],
)
def test_prompt_is_rendered_with_the_system_block_asked_for(
    template: str | None, system_prompt: str | None, expected: str
) -> None:
    assert prompt_of(template, system_prompt) == expected


@pytest.mark.parametrize(
    ("template", "complaint"),
    [(REFUSING, "no system role"), (DROPPING, "drops the system message"), (None, "has no chat template")],
)
def test_system_prompt_that_the_template_cannot_place(template: str | None, complaint: str) -> None:
    with pytest.raises(DataError, match=rf"{complaint}.*leave data\.system_prompt out"):
        prompt_of(template, "be brief")


def test_end_of_sequence_stands_only_after_the_completion() -> None:
    tokenizer = byte_tokenizer(ends="</s>")
    (row,) = encode([Example("t", "hi", "yes", "yes")], tokenizer, 50, None, "causal")
    assert tokenizer.decode([*row.prompt, *row.completion]) == "<b>hi\nyes</s>"


def test_long_prompt_loses_its_beginning_and_the_completion_nothing() -> None:
    tokenizer = byte_tokenizer()
    long, exact = encode([Example("t", "0123456789", "yes", ""), Example("t", "0123", "", "")], tokenizer, 7, None, "causal")
    assert (tokenizer.decode(long.prompt), tokenizer.decode(long.completion)) == ("<b>9\n", "yes</s>")
    assert (tokenizer.decode(exact.prompt), tokenizer.decode(exact.completion)) == ("<b>0123\n", "</s>")
    assert (len(long), len(exact)) == (7, 7)


def test_long_prompt_keeps_what_the_template_opens_with() -> None:
    tokenizer = byte_tokenizer(HEADED)
    example = Example("t", "0123456789", "yes", "")
    (whole,) = encode([example], tokenizer, 90, "be nice", "causal")
    (cut,) = encode([example], tokenizer, len(whole) - 4, "be nice", "causal")
    assert tokenizer.decode(cut.prompt) == tokenizer.decode(whole.prompt).replace("0123456789", "456789")


def test_completion_that_does_not_fit_is_named() -> None:
    examples = [Example("t", "hi", "yes", "yes"), Example("sums", "what\nis it", "yes it is", "")]
    with pytest.raises(
        DataError,
        match=r'task sums, example 1 \("what is it…"\): 10 tokens of completion and 2 of prompt .* raise data\.max_length',
    ) as caught:
        encode(examples, byte_tokenizer(), 11, None, "causal")
    assert caught.value.outside.startswith('task sums, example 1 ("…"): 10 tokens')  # without what a site's data says
    assert len(encode(examples, byte_tokenizer(), 12, None, "causal")[1].prompt) == 2


def test_tokenizer_that_cannot_end_an_answer() -> None:
    with pytest.raises(ModelError, match="end-of-sequence"):
        encode([Example("t", "a", "b", "b")], byte_tokenizer(eos=None), 50, None, "causal")


def test_classification_keeps_special_tokens_when_truncated() -> None:
    tokenizer = byte_tokenizer(ends="</s>")
    rows = encode([Example("t", "abcdef", "", "", 1), Example("t", "x", "", "", 0)], tokenizer, 5, None, "classification")
    assert [tokenizer.decode(row.prompt) for row in rows] == ["<b>abc</s>", "<b>x</s>"]
    assert [row.label for row in rows] == [1, 0]
    assert not rows[0].completion


def test_example_of_the_other_kind_and_no_examples() -> None:
    with pytest.raises(DataError, match=r'has no label, .* model\.kind = "classification"'):
        encode([Example("t", "a", "b", "b")], byte_tokenizer(), 50, None, "classification")
    with pytest.raises(DataError, match=r'has a label, .* model\.kind = "causal"'):
        encode([Example("t", "a", "", "", 0)], byte_tokenizer(), 50, None, "causal")
    assert encode([], byte_tokenizer(), 50, None, "causal") == []


ROWS = [Encoded([1, 2], [3, 4, 5]), Encoded([6], [7])]


def test_collate_pads_right_and_scores_completions_only() -> None:
    batch = collate(ROWS, 9, "causal")
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5], [6, 7, 9, 9, 9]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert batch.labels.tolist() == [[-100, -100, 3, 4, 5], [-100, 7, -100, -100, -100]]


def test_collate_scores_an_end_that_is_also_the_padding() -> None:
    assert collate([Encoded([1], [9]), ROWS[0]], 9, "causal").labels[0].tolist() == [-100, 9, -100, -100, -100]


def test_collate_classification_has_one_label_a_row() -> None:
    batch = collate([Encoded([1, 2], [], 4), Encoded([3], [], 0)], 9, "classification")
    assert batch.input_ids.tolist() == [[1, 2], [3, 9]]
    assert batch.labels.tolist() == [4, 0]


def test_collate_prompts_pads_left() -> None:
    batch = collate_prompts(ROWS, 9)
    assert batch.input_ids.tolist() == [[1, 2], [9, 6]]
    assert batch.attention_mask.tolist() == [[1, 1], [0, 1]]
    assert (batch.labels == -100).all()


def test_batches_without_rows_keep_their_dimensions_and_types() -> None:
    causal, classes, prompts = collate([], 0, "causal"), collate([], 0, "classification"), collate_prompts([], 0)
    assert causal.input_ids.shape == causal.labels.shape == prompts.input_ids.shape == (0, 1)
    assert classes.labels.shape == (0,)
    assert {t.dtype for b in (causal, classes, prompts) for t in (b.input_ids, b.attention_mask, b.labels)} == {torch.int64}


def test_to_moves_every_tensor() -> None:
    moved = collate(ROWS, 9, "causal").to("meta")
    assert {moved.input_ids.device.type, moved.attention_mask.device.type, moved.labels.device.type} == {"meta"}


@settings(deadline=None, max_examples=60, database=None)
@given(st.integers(1, 30), st.integers(1, 40), st.integers(0, 2**40), st.integers(1, 4))
def test_each_epoch_takes_each_example_once(n: int, batch_size: int, seed: int, epochs: int) -> None:
    steps = -(-n * epochs // batch_size)
    batches = [draw(n, step, batch_size, seed, "a") for step in range(steps)]
    taken = [index for batch in batches for index in batch]
    assert {len(batch) for batch in batches} == {batch_size}
    for epoch in range(epochs):
        assert sorted(taken[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_draw_depends_on_step_seed_client_and_epoch_only() -> None:
    first = draw(50, 0, 50, 0, "a")
    assert first == draw(50, 0, 50, 0, "a")
    others = [draw(50, 1, 50, 0, "a"), draw(50, 0, 50, 1, "a"), draw(50, 0, 50, 0, "b"), list(range(50))]
    assert all(first != other for other in others)
    assert draw(50, 0, 10, 0, "a") + draw(50, 1, 10, 0, "a") == first[:20]


def test_far_step_is_drawn_without_the_steps_before() -> None:
    assert Counter(draw(4, 10**12, 8, 0, "a")) == dict.fromkeys(range(4), 2)


def test_draw_from_nothing() -> None:
    with pytest.raises(DataError, match="client a has no examples"):
        draw(0, 0, 4, 0, "a")


def test_evaluation_order_is_a_permutation_longest_first_and_stable() -> None:
    rows = [Encoded([1] * k, [2] * m) for k, m in [(1, 1), (3, 3), (2, 0), (1, 5), (4, 4)]]
    assert evaluation_order(rows) == [4, 1, 3, 0, 2]
