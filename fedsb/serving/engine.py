"""Continuous batching of requests, each with its own tenant's adapter: in every step all that are running get their next token.

The only module that reaches into transformers' continuous batching, which is private and changes: it replaces three functions of
a batch processor (`Engine._hook`), and `tests/serving/test_engine.py` fails when they are not what they were. Blocks of the cache
are shared by nobody: transformers knows a block by its tokens alone, and would give one tenant what another's adapter made of it.
"""

import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from transformers import ContinuousBatchingConfig, GenerationConfig

from fedsb.errors import RequestError
from fedsb.serving.attention import BY_SEQUENCE, Plan
from fedsb.serving.bank import Bank, Place
from fedsb.serving.prepacked import PrepackedLinear, can_prepack
from fedsb.serving.soft_prompts import SoftEmbedding

PAGE = 16  # tokens of a block of the cache
MAGNITUDE = 1000  # of a soft prompt's numbers, against the largest of the model's embeddings
LEAST = 1e-30  # what fp32 can still tell from 0; smaller temperatures and shares mean the same
Reason: TypeAlias = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class Limits:
    """What the engine holds at one time; its memory follows from these, and not from what the machine has.

    Attributes:
        requests: in one step at the most; others wait.
        step_tokens: of one step; a longer prompt takes several.
        cache_tokens: of all requests that run, prompts and answers; rounded down to whole blocks of 16.
        waiting: requests that may wait.
    """

    requests: int = 64
    step_tokens: int = 512
    cache_tokens: int = 16384
    waiting: int = 256


@dataclass(frozen=True)
class Sampling:
    """How a request is answered.

    Attributes:
        max_tokens: of the answer.
        temperature: 0 takes the most likely token.
        top_p: the least number of most likely tokens that have this probability together are drawn from.
        seed: what is drawn follows from it; None: from chance.
        logprobs: alternatives whose log probabilities are told for each token, besides that of the token itself; None: neither.
        ends: tokens that end an answer.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    logprobs: int | None = None
    ends: tuple[int, ...] = ()


@dataclass(frozen=True)
class Chosen:
    """A token with its log probability (nats) before temperature, and the most likely ones with theirs, if that was asked."""

    token: int
    logprob: float | None = None
    likely: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Output:
    """What came of a request in a step: new tokens (an ending one included), and why it is over, if it is."""

    tokens: tuple[Chosen, ...]
    reason: Reason | None = None
    error: str | None = None


@dataclass
class _Request:
    name: str
    sampling: Sampling
    place: Place | None
    deliver: Callable[[Output], None]
    generator: torch.Generator
    soft: Tensor | None = None
    told: int = 0
    chosen: list[Chosen] = field(default_factory=list)


class Engine:
    """Answers requests in a thread of its own, until it is closed.

    Args:
        model: a causal transformers model that `fedsb.serving.mixed.mix` has let use `bank`; the engine's alone.
    """

    def __init__(self, model: Any, bank: Bank, limits: Limits | None = None) -> None:
        self.model, self.bank, self.limits = model, bank, limits or Limits()
        self._requests: dict[str, _Request] = {}
        self._lock, self._numbers = threading.Lock(), itertools.count()
        self._step: list[_Request] = []  # who gets a token in this step, in order
        self._manager = model.init_continuous_batching(
            GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=1),
            ContinuousBatchingConfig(
                page_size=PAGE,
                num_blocks=self.limits.cache_tokens // PAGE,
                max_batch_tokens=self.limits.step_tokens,
                max_requests_per_batch=min(self.limits.requests, self.limits.step_tokens),
                allow_block_sharing=False,
                use_async_batching=False,
                use_cuda_graph=False,
                auto_switch_to_flash=False,
                max_queue_size=0,
            ),
        )
        self._manager.output_router = _Router(self)
        processor = self._manager._create_batch_processor()
        self._table: Tensor = model.get_input_embeddings().weight.detach()
        self._largest = MAGNITUDE * max(abs(float(end)) for end in torch.aminmax(self._table))
        self._embedding = SoftEmbedding(model.get_input_embeddings())
        model.set_input_embeddings(self._embedding)
        self._head = model.get_output_embeddings()
        if isinstance(self._head, nn.Linear) and can_prepack(self._head):
            model.set_output_embeddings(PrepackedLinear(self._head))
        self._own_attention = self._set_attention(processor)
        self._manager.batch_processor = self._hook(processor)
        self._manager.start()

    @property
    def alive(self) -> bool:
        """Whether it answers; after an error of the model it does not."""
        return bool(self._manager.is_running())

    @property
    def running(self) -> int:
        """Requests that are not over."""
        return len(self._requests)

    @property
    def longest(self) -> int:
        """Tokens that a request may have, prompt and answer."""
        room = self.limits.cache_tokens // PAGE * PAGE
        return min(room, getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or room)

    @property
    def width(self) -> int:
        """Numbers of a token's embedding; of some models another than the hidden size."""
        return int(self._table.shape[1])

    def submit(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        place: Place | None,
        deliver: Callable[[Output], None],
        soft: Tensor | None = None,
    ) -> str:
        """Begin to answer; returns the request's name, for `cancel`.

        soft: (m, width), embeddings that go before those of the prompt; each is a token of it.

        `place` must stay loaded until the last output, which has a reason. `deliver` is called from the engine's thread with each
        output; it must be quick and must not raise.

        Raises RequestError if the request cannot be taken: empty, too long, too many wait, or the engine has ended; or `soft` has
        another width or no numbers that an embedding could be.
        """
        if soft is not None:
            self.check_soft(soft)
        if not prompt:
            raise RequestError("the prompt has no tokens; write something")
        ids = [0] * (0 if soft is None else len(soft)) + list(prompt)
        if sampling.max_tokens < 1 or len(ids) + sampling.max_tokens > self.longest:
            raise RequestError(
                f"{len(ids)} tokens of prompt and {sampling.max_tokens} of answer do not fit into {self.longest}; ask for less"
            )
        generator = torch.Generator(self.model.device)
        if sampling.seed is None:
            generator.seed()
        else:
            generator.manual_seed(sampling.seed)
        with self._lock:
            if not self.alive:
                raise RequestError("the engine has ended; start the server again")
            if len(self._requests) >= self.limits.requests + self.limits.waiting:
                raise RequestError(f"{len(self._requests)} requests are at work or waiting already; try again later")
            name = f"request-{next(self._numbers)}"
            self._requests[name] = _Request(name, sampling, place, deliver, generator, soft)
        self._manager.add_request(
            ids, name, max_new_tokens=sampling.max_tokens, streaming=True, eos_token_id=list(sampling.ends) or -1
        )
        if not self.alive:  # it has ended since, and nobody would tell
            self._over(name, Output((), "error", "the engine has ended"))
        return name

    def check_soft(self, soft: Tensor) -> None:
        """Raise RequestError for embeddings (m, width) that are none of this model's width or size."""
        if soft.ndim != 2 or soft.shape[1] != self.width:
            raise RequestError(f"prompt_embeds: is {tuple(soft.shape)}, and this model takes (tokens, {self.width})")
        if not bool((soft.abs() <= self._largest).all()):  # NaN too; what overflows in the model would reach others' numbers
            raise RequestError(
                f"prompt_embeds: has numbers beyond {self._largest:.3g}, {MAGNITUDE} times the largest of the model's "
                "embeddings; send embeddings"
            )

    def cancel(self, name: str) -> None:
        """Stop answering, if it is not over; the last output then has the reason "cancelled"."""
        if name in self._requests:
            self._manager.cancel_request(name)

    def close(self) -> None:
        """End the thread; whoever still waits gets an error."""
        if self._manager.is_running():
            self._manager.stop(block=True, hard_stop=True)
        self._manager.destroy()
        self.model.set_input_embeddings(self._embedding.base)
        self.model.set_output_embeddings(self._head)
        if self._own_attention:
            self.model.set_attn_implementation("sdpa")
        self.bank.batch, self.bank.packed = [], False

    def _set_attention(self, processor: Any) -> bool:
        """Have each sequence look at its own keys alone, where SDPA multiplies all with all: on a CPU, without windows."""
        full = set(processor.cache.cache_allocators) == {"full_attention"}
        if self.model.device.type != "cpu" or self.model.config._attn_implementation != "sdpa" or not full:
            return False
        self.model.set_attn_implementation(BY_SEQUENCE)
        return True

    def _hook(self, processor: Any) -> Any:
        """Let a batch processor tell us of each step, ask us for its tokens, and say who was cancelled."""
        inputs, runner, scheduler = processor.inputs_and_outputs, processor.model_runner, processor.scheduler
        prepare, clear = inputs.prepare_batch_tensors, scheduler.clear_cancelled_requests

        def prepared(requests_in_batch: list[Any], *args: Any, **kwargs: Any) -> None:
            of = [self._requests[each.state.request_id] for each in requests_in_batch]
            queries = [each.query_length for each in requests_in_batch]
            self.bank.pack([each.place for each in of], queries)
            before = [each.state.position_offset for each in requests_in_batch]
            self._embedding.rows = _soft_rows([each.soft for each in of], before, queries)
            if self._own_attention:
                processor.cache.plan = Plan.of(queries, [a + b for a, b in zip(before, queries, strict=True)])
            self._step = [each for each, told in zip(of, requests_in_batch, strict=True) if told.has_new_token]
            prepare(requests_in_batch, *args, **kwargs)

        def cleared() -> list[Any]:
            gone: list[Any] = clear()
            for state in gone:
                self._over(state.request_id, Output((), "cancelled"))
            return gone

        inputs.prepare_batch_tensors, runner._sample, scheduler.clear_cancelled_requests = prepared, self._sample, cleared
        return processor

    def _sample(self, scores: Tensor, output_ids: Tensor) -> None:
        """scores (1, n, V) fp32 → the first of output_ids (1, ·): a token for each request of the step."""
        rows = scores[0, : len(self._step)]
        most, tokens = rows.max(-1)  # the largest is NaN or infinite where anything that matters is
        for i, (request, well) in enumerate(zip(self._step, most.isfinite().tolist(), strict=True)):
            if not well:  # of this request alone where `_set_attention` could be; elsewhere SDPA multiplies all with all, and
                # 0 · NaN is NaN for those beside it too, whose requests end with the same sentence
                self._manager.cancel_request(request.name)
                self._over(request.name, Output((), "error", "the model's numbers overflow with this adapter"))
            elif request.sampling.temperature > 0:
                tokens[i] = _drawn(rows[i], request.sampling, request.generator)
        output_ids[0, : len(tokens)] = tokens
        for row, token, request in zip(rows, tokens.tolist(), self._step, strict=True):
            request.chosen.append(_chosen(row, token, request.sampling.logprobs))

    def _on_output(self, output: Any) -> None:
        """From transformers: all tokens of a request so far."""
        request = self._requests.get(output.request_id)
        if request is None:
            return
        new = tuple(request.chosen[request.told : len(output.generated_tokens)])
        request.told = len(output.generated_tokens)
        if output.error is not None:
            self._over(output.request_id, Output(new, "error", output.error))
        elif not output.is_finished():
            request.deliver(Output(new))
        else:
            ended = bool(output.generated_tokens) and output.generated_tokens[-1] in request.sampling.ends
            self._over(output.request_id, Output(new, "stop" if ended else "length"))

    def _over(self, name: str, output: Output) -> None:
        with self._lock:
            request = self._requests.pop(name, None)
        if request is not None:
            request.deliver(output)


class _Router:
    """Takes the place of transformers' OutputRouter: everything goes to the engine, at once."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def deliver(self, output: Any) -> None:
        self._engine._on_output(output)

    def deliver_batch(self, outputs: Sequence[Any]) -> None:
        for output in outputs:
            self.deliver(output)

    def fail_and_deliver(self, state: Any, error: Exception) -> None:
        self._engine._over(state.request_id, Output((), "error", str(error)))


def _soft_rows(softs: Sequence[Tensor | None], before: Sequence[int], queries: Sequence[int]) -> list[tuple[int, Tensor]]:
    """Which rows of a step are of soft prompts, of sequences with so many tokens before and so many in this step."""
    starts = itertools.accumulate(queries, initial=0)
    found = []
    for start, soft, past, new in zip(starts, softs, before, queries, strict=False):
        if soft is not None and past < len(soft):
            found.append((start, soft[past : past + new]))
    return found


def _drawn(scores: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """A token from scores (V,), as temperature and top_p say."""
    probabilities = torch.softmax((scores - scores.max()) / max(sampling.temperature, LEAST), -1)
    if sampling.top_p < 1:
        sorted_, order = probabilities.sort(descending=True)
        beyond = sorted_.cumsum(-1) - sorted_ >= max(sampling.top_p, LEAST)  # the first of those that reach it stays
        probabilities = torch.zeros_like(probabilities).scatter(0, order, sorted_.masked_fill(beyond, 0.0))
    return torch.multinomial(probabilities, 1, generator=generator)[0]


def _chosen(scores: Tensor, token: int, alternatives: int | None) -> Chosen:
    if alternatives is None:
        return Chosen(token)
    logs = scores.log_softmax(-1)
    values, indices = logs.topk(min(alternatives, len(logs)))
    return Chosen(token, float(logs[token]), tuple(zip(indices.tolist(), values.tolist(), strict=True)))
