"""From a request's tokens to its text: several answers at a time, stop texts, and what is told of each step."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from tokenizers.decoders import DecodeStream
from torch import Tensor

from fedsb.serving.engine import Chosen, Engine, Output, Sampling
from fedsb.serving.tenants import Lease, Tenants


class EngineFailed(Exception):
    """The engine could not finish an answer."""


@dataclass(frozen=True)
class Piece:
    """Some more of one answer.

    Attributes:
        index: which answer, from 0.
        text: what is added to it.
        tokens: from which that was made (an ending one left out); a text that is held back comes later than its tokens.
        reason: why it is over, if it is.
    """

    index: int
    text: str
    tokens: tuple[Chosen, ...]
    reason: Literal["stop", "length"] | None = None


class Stopper:
    """Cuts a growing text before the first stop, and holds back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops, self._held = stops, ""

    def add(self, text: str) -> tuple[str, bool]:
        """(what can be told, whether a stop was found)."""
        self._held += text
        found = [at for stop in self.stops if (at := self._held.find(stop)) >= 0]
        if found:
            return self._held[: min(found)], True
        keep = max((n for stop in self.stops for n in range(1, len(stop)) if self._held.endswith(stop[:n])), default=0)
        told, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return told, False

    def rest(self) -> str:
        """What was held back, at the end."""
        return self._held


async def answered(
    engine: Engine,
    tenants: Tenants,
    tokenizer: Any,
    prompt: Sequence[int],
    sampling: Sampling,
    leases: Sequence[Lease | None],
    stops: Sequence[str],
    soft: Tensor | None = None,
) -> AsyncIterator[Piece]:
    """Pieces of as many answers as there are leases, as they come; with a seed, the i-th answer is drawn with seed + i.

    Each lease is given back once the engine is done with its answer, also if nobody listens any more.

    Raises RequestError if the engine cannot take it, and EngineFailed.
    """
    loop, queue = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Output]]()
    names: list[str] = []
    streams = [(DecodeStream(skip_special_tokens=True), Stopper(stops)) for _ in leases]
    begun = 0

    def deliverer(index: int, lease: Lease | None) -> Any:
        def deliver(output: Output) -> None:  # in the engine's thread
            if output.reason and lease:
                tenants.give_back(lease)
            with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody listens
                loop.call_soon_threadsafe(queue.put_nowait, (index, output))

        return deliver

    try:
        for index, lease in enumerate(leases):
            seeded = sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + index)
            place = lease.place if lease else None
            names.append(engine.submit(prompt, seeded, place, deliverer(index, lease), soft))
            begun += 1
        over: set[int] = set()
        while len(over) < len(leases):
            index, output = await queue.get()
            if index in over:
                continue
            piece = _piece(index, output, sampling, *streams[index], tokenizer)
            if piece.reason:
                over.add(index)
                engine.cancel(names[index])  # nothing, unless a stop text ended it
            if piece.text or piece.tokens or piece.reason:
                yield piece
    finally:
        for name in names:
            engine.cancel(name)
        for lease in leases[begun:]:
            if lease:
                tenants.give_back(lease)


def _piece(index: int, output: Output, sampling: Sampling, stream: Any, stopper: Stopper, tokenizer: Any) -> Piece:
    if output.reason in ("error", "cancelled"):
        raise EngineFailed(output.error or "the request was cancelled")
    tokens = output.tokens
    if output.reason == "stop" and tokens and tokens[-1].token in sampling.ends:
        tokens = tokens[:-1]
    new = "".join(stream.step(tokenizer.backend_tokenizer, each.token) or "" for each in tokens)
    text, stopped = stopper.add(new)
    if stopped:
        return Piece(index, text, tokens, "stop")
    if output.reason is None:
        return Piece(index, text, tokens)
    return Piece(index, text + stopper.rest(), tokens, "stop" if output.reason == "stop" else "length")
