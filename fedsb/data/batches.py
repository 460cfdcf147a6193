"""From examples to tensors: tokens through the chat template, padding and masks, and who draws what at which step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from jinja2 import TemplateError
from torch import Tensor

from fedsb.data.examples import Example
from fedsb.data.seeds import generator
from fedsb.data.speech import Recording, decoder_prompt, longest
from fedsb.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Kind: TypeAlias = Literal["causal", "classification", "speech"]

IGNORED = -100  # a label that no loss counts
PROBE = "A system message that nobody would write."


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of one example. Classification: the whole text is `prompt`, `completion` is empty.

    instance: what an encoder makes of the prompt's text (h,), where a method asks one.
    recording: gives the features (mels, frames) of the speech whose transcript `completion` is.
    """

    prompt: list[int]
    completion: list[int]
    label: int | None = None
    instance: Tensor | None = field(default=None, compare=False)
    recording: Callable[[], Tensor] | None = None

    def __len__(self) -> int:
        """Tokens of prompt and completion together."""
        return len(self.prompt) + len(self.completion)


@dataclass(frozen=True, eq=False, slots=True)
class Batch:
    """B padded rows of T tokens.

    input_ids (B, T) int64; attention_mask (B, T) int64, 1 at tokens and 0 at padding; labels int64: (B, T), equal to
    input_ids at the completion and -100 elsewhere (causal, not shifted), or (B,) label ids (classification);
    instances (B, h), if the rows have such; features (B, mels, frames) fp32 of recordings, to which input_ids are the decoder's.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    instances: Tensor | None = None
    features: Tensor | None = None

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        instances, features = (None if t is None else t.to(device) for t in (self.instances, self.features))
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device), instances, features)


def encode(
    examples: Sequence[Example],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    system_prompt: str | None,
    kind: Kind,
    extractor: Any = None,
) -> list[Encoded]:
    """Tokenize examples to at most `max_length` tokens each.

    Causal: the prompt is rendered by the tokenizer's chat template up to where the assistant begins to speak (without a
    template: the prompt and a newline), the completion ends in the end-of-sequence token, and what is too long loses
    the beginning of its prompt, but not what every prompt opens with (beginning-of-sequence token, template), and at
    least one token of its own stays.
    Of `system_prompt`, None leaves the template's own default, a text goes in as system message, and "" means no system
    block, as far as the template can do without (see `_without_system`).
    Of a program (`Example.code`) the prompt is its beginning as it stands, whatever the template.
    Classification: the text with the tokenizer's special tokens, truncated as the tokenizer truncates.
    Speech: the transcript after the decoder's own beginning; `extractor` is the model's feature extractor, which gets to see a
    recording only when a batch is made of it.

    Raises DataError for an example of the other kind, a completion that does not fit, an empty text, a system prompt that the
    template cannot place, and a recording that cannot be read or is longer than the model hears; ModelError if the tokenizer has
    no end-of-sequence token.
    """
    for number, example in enumerate(examples):
        if (example.speech is not None) != (kind == "speech"):
            has = "no recording" if example.speech is None else "a recording"
            raise _wrong(example, number, f' has {has}, which does not go with model.kind = "{kind}"; change one of them')
        if (example.label is None) != (kind != "classification"):
            has = "no label" if example.label is None else "a label"
            raise _wrong(example, number, f' has {has}, which does not go with model.kind = "{kind}"; change one of them')
    if not examples:
        return []
    if kind == "classification":
        return _encode_texts(examples, tokenizer, max_length)
    if kind == "speech":
        return _encode_speech(examples, tokenizer, max_length, extractor)
    return _encode_completions(examples, tokenizer, max_length, system_prompt)


def collate(rows: Sequence[Encoded], pad_id: int, kind: Kind) -> Batch:
    """Stack rows, padded on the right to the longest: for training and for scoring under teacher forcing.

    No rows give a batch with B = 0, T = 1 (Poisson sampling draws such batches).
    """
    sequences = [[*row.prompt, *row.completion] for row in rows]
    width = _width(sequences)
    input_ids = _rectangle([ids + [pad_id] * (width - len(ids)) for ids in sequences], width)
    mask = _rectangle([[1] * len(ids) + [0] * (width - len(ids)) for ids in sequences], width)
    if kind == "classification":
        return Batch(input_ids, mask, torch.tensor([row.label for row in rows], dtype=torch.int64))
    labels = [[IGNORED] * len(row.prompt) + row.completion + [IGNORED] * (width - len(row)) for row in rows]
    return Batch(input_ids, mask, _rectangle(labels, width), _instances(rows), _features(rows))


def collate_prompts(rows: Sequence[Encoded], pad_id: int) -> Batch:
    """Stack the prompts alone, padded on the left: for generation. Labels are -100 everywhere, (B, T)."""
    width = _width([row.prompt for row in rows])
    input_ids = _rectangle([[pad_id] * (width - len(row.prompt)) + row.prompt for row in rows], width)
    mask = _rectangle([[0] * (width - len(row.prompt)) + [1] * len(row.prompt) for row in rows], width)
    return Batch(input_ids, mask, torch.full_like(input_ids, IGNORED), _instances(rows))


def with_instances(rows: Sequence[Encoded], instances: Sequence[Tensor | None]) -> list[Encoded]:
    """The same rows with other instances (h,), or with none."""
    return [replace(row, instance=instance) for row, instance in zip(rows, instances, strict=True)]


def draw(n: int, step: int, batch_size: int, seed: int, client: str) -> list[int]:
    """Which of its n examples `client` takes at step `step` (counted from 0 over all rounds): `batch_size` indices.

    The steps run through 0..n-1 in one random order after another, each drawn from (seed, client, epoch), so every
    epoch takes each example once; a batch may straddle epochs. There is no state: a resumed run draws the same.

    Raises DataError if n is 0.
    """
    if n == 0:
        raise DataError(f"client {client} has no examples to draw from; give it some or lower federation.clients")
    first, last = step * batch_size, (step + 1) * batch_size
    epochs = range(first // n, (last - 1) // n + 1)
    orders = [index for epoch in epochs for index in generator(seed, "draw", client, epoch).permutation(n).tolist()]
    return orders[first - epochs[0] * n : last - epochs[0] * n]


def evaluation_order(rows: Sequence[Encoded]) -> list[int]:
    """The indices of rows, longest first and otherwise in order: batches of neighbours have little padding."""
    return sorted(range(len(rows)), key=lambda i: -len(rows[i]))


def _wrong(example: Example, number: int, what: str) -> DataError:
    start = f"{' '.join(example.prompt.split())[:40]}…"
    return DataError(f'task {example.task}, example {number} ("{start}"){what}', quoted=start)


def _encode_texts(examples: Sequence[Example], tokenizer: "PreTrainedTokenizerBase", max_length: int) -> list[Encoded]:
    ids = tokenizer([e.prompt for e in examples], truncation=True, max_length=max_length)["input_ids"]
    for number, (example, tokens) in enumerate(zip(examples, ids, strict=True)):
        if not tokens:
            raise _wrong(example, number, " has no token that the tokenizer knows; drop it")
    return [Encoded(tokens, [], example.label) for example, tokens in zip(examples, ids, strict=True)]


def _encode_completions(
    examples: Sequence[Example], tokenizer: "PreTrainedTokenizerBase", max_length: int, system_prompt: str | None
) -> list[Encoded]:
    end = tokenizer.eos_token_id
    if end is None:
        raise ModelError("the tokenizer has no end-of-sequence token, so no answer could end; set its eos_token")
    prompts = _rendered_ids(examples, tokenizer, system_prompt)
    completions = tokenizer([e.completion for e in examples], add_special_tokens=False, verbose=False)["input_ids"]
    opening, opening_of_code = (_opening(tokenizer, system_prompt, raw=raw) for raw in (False, True))
    rows = []
    for number, (example, prompt, completion) in enumerate(zip(examples, prompts, completions, strict=True)):
        room, opens = max_length - len(completion) - 1, opening if example.code is None else opening_of_code
        if len(prompt) > room and room <= opens:
            raise _wrong(
                example,
                number,
                f": {len(completion) + 1} tokens of completion and {opens + 1} of prompt do not fit into {max_length}; "
                "raise data.max_length or drop it",
            )
        fitted = prompt if len(prompt) <= room else prompt[:opens] + prompt[opens - room :]
        rows.append(Encoded(fitted, [*completion, end]))
    return rows


def _encode_speech(
    examples: Sequence[Example], tokenizer: "PreTrainedTokenizerBase", max_length: int, extractor: Any
) -> list[Encoded]:
    transcripts = tokenizer([e.completion for e in examples], add_special_tokens=False, verbose=False)["input_ids"]
    rows: list[Encoded] = []
    for number, (example, transcript) in enumerate(zip(examples, transcripts, strict=True)):
        assert example.speech is not None
        prompt, completion = decoder_prompt(tokenizer, example.speech), [*transcript, tokenizer.eos_token_id]
        if len(prompt) + len(completion) > max_length:
            raise _wrong(
                example,
                number,
                f": {len(prompt) + len(completion)} tokens of transcript do not fit into {max_length}; "
                "raise data.max_length or drop it",
            )
        if (seconds := example.speech.seconds()) > longest(extractor):
            raise _wrong(
                example,
                number,
                f" lasts {seconds:.4g} s, and the model hears {longest(extractor):.4g} s; cut it in two",
            )
        if rows and len(prompt) != len(rows[0].prompt):
            raise _wrong(example, number, " has a language where others have none, or the other way round; name it for all")
        rows.append(Encoded(prompt, completion, recording=Recording(example.speech, extractor)))
    return rows


def _rendered_ids(
    examples: Sequence[Example], tokenizer: "PreTrainedTokenizerBase", system_prompt: str | None
) -> list[list[int]]:
    """The prompts' tokens, in order: through the template, but of programs as they stand."""
    found: dict[int, list[int]] = {}
    for raw in (False, True):
        chosen = [i for i, example in enumerate(examples) if (example.code is not None) == raw]
        ids = _prompt_ids([examples[i].prompt for i in chosen], tokenizer, system_prompt, raw=raw) if chosen else []
        found |= dict(zip(chosen, ids, strict=True))
    return [found[i] for i in range(len(examples))]


def _opening(tokenizer: "PreTrainedTokenizerBase", system_prompt: str | None, *, raw: bool) -> int:
    """How many tokens every prompt begins with: those on which two prompts that have nothing in common agree."""
    one, other = _prompt_ids(["1", "a"], tokenizer, system_prompt, raw=raw)
    return next((i for i, (x, y) in enumerate(zip(one, other, strict=False)) if x != y), 0)


def _prompt_ids(
    prompts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", system_prompt: str | None, *, raw: bool = False
) -> list[list[int]]:
    if tokenizer.chat_template and not raw:
        rendered = [_rendered(prompt, tokenizer, system_prompt) for prompt in prompts]
        ids: list[list[int]] = tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"]
        return ids
    if system_prompt and not raw:
        raise DataError("the model has no chat template, so it takes no system message; leave data.system_prompt out")
    ids = tokenizer([prompt if raw else f"{prompt}\n" for prompt in prompts], verbose=False)["input_ids"]
    return [tokens[:-1] if tokens[-1:] == [tokenizer.eos_token_id] else tokens for tokens in ids]


def _rendered(prompt: str, tokenizer: "PreTrainedTokenizerBase", system_prompt: str | None) -> str:
    if system_prompt == "":
        return _without_system(prompt, tokenizer)
    try:
        text = _template(tokenizer, system_prompt, prompt)
    except TemplateError as error:
        raise DataError(f"the model's chat template refuses the messages ({error}); leave data.system_prompt out") from error
    if system_prompt and system_prompt.strip() not in text:
        raise DataError("the model's chat template drops the system message; leave data.system_prompt out")
    return text


def _without_system(prompt: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    """Render one user message with no system block.

    Left without a system message, a template may put in its own (SmolLM2, Qwen2.5). So render a system message alone
    and the same one before the user's, and cut the first from the second; a beginning-of-sequence token cut along is
    put back. A template that has no separate block (it refuses system messages, drops them or merges them into the
    user's) has none to cut, and is rendered with the user's message only.
    """
    alone = _template(tokenizer, None, prompt)
    try:
        block = _template(tokenizer, PROBE, None)
        both = _template(tokenizer, PROBE, prompt)
    except TemplateError:
        return alone
    if PROBE not in block or not both.startswith(block):
        return alone
    rest = both.removeprefix(block)
    begin = str(tokenizer.bos_token or "")
    return begin + rest if alone.startswith(begin) and not rest.startswith(begin) else rest


def _template(tokenizer: "PreTrainedTokenizerBase", system: str | None, user: str | None) -> str:
    given = [("system", system), ("user", user)]
    messages = [{"role": role, "content": content} for role, content in given if content is not None]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=user is not None))


def _instances(rows: Sequence[Encoded]) -> Tensor | None:
    found = [row.instance for row in rows if row.instance is not None]
    return torch.stack(found) if found else None


def _features(rows: Sequence[Encoded]) -> Tensor | None:
    found = [row.recording() for row in rows if row.recording is not None]
    return torch.stack(found) if found else None


def _width(sequences: Sequence[Sequence[int]]) -> int:
    return max((len(ids) for ids in sequences), default=1)


def _rectangle(rows: list[list[int]], width: int) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), width)
