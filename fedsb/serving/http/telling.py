"""A response in OpenAI's words, whole or as server-sent events."""

import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Literal

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from fedsb.serving.engine import Chosen
from fedsb.serving.http.answers import EngineFailed, Piece
from fedsb.serving.http.schemas import Asked
from fedsb.serving.http.service import Refused, Service, error_body

log = logging.getLogger(__name__)
Kind = Literal["text_completion", "chat.completion"]


class Told:
    """One response in OpenAI's words."""

    def __init__(self, service: Service, asked: Asked, kind: Kind, logprobs: bool, prompt: int) -> None:
        self.service, self.asked, self.kind, self.logprobs, self.prompt = service, asked, kind, logprobs, prompt
        self.name = f"{'chatcmpl' if kind == 'chat.completion' else 'cmpl'}-{uuid.uuid4().hex}"
        self.tokens = 0

    async def whole(self, first: Piece, rest: AsyncIterator[Piece], request: Request) -> Response:
        """All at once. A client that has gone stops it."""
        pieces: list[list[Piece]] = [[] for _ in range(self.asked.n)]
        async with aclosing(rest) as source:  # type: ignore[type-var]
            pieces[first.index].append(first)
            try:
                async for piece in source:
                    pieces[piece.index].append(piece)
                    if await request.is_disconnected():
                        return Response(status_code=499)
            except EngineFailed as error:
                log.error("an answer failed: %s", error)
                raise Refused(500, "the model failed; the server's log says why", "internal") from None
        choices = []
        for index, parts in enumerate(pieces):
            text, chosen = "".join(part.text for part in parts), [each for part in parts for each in part.tokens]
            self.tokens += len(chosen)
            content = {"text": text} if self.kind == "text_completion" else {"message": {"role": "assistant", "content": text}}
            choices.append({"index": index, **content, "logprobs": self._logs(chosen), "finish_reason": parts[-1].reason})
        return JSONResponse({**self._head(self.kind), "choices": choices, "usage": self._usage()})

    async def streamed(self, first: Piece, rest: AsyncIterator[Piece]) -> AsyncIterator[bytes]:
        """Server-sent events, ended by [DONE]."""
        kind = "chat.completion.chunk" if self.kind == "chat.completion" else self.kind
        async with aclosing(rest) as source:  # type: ignore[type-var]
            begun: set[int] = set()
            try:
                yield self._event(kind, first, begun)
                async for piece in source:
                    yield self._event(kind, piece, begun)
            except EngineFailed as error:
                log.error("an answer failed: %s", error)
                yield _sse(error_body("the model failed; the server's log says why", 500, "internal"))
                return
        if self.asked.stream_options and self.asked.stream_options.include_usage:
            yield _sse({**self._head(kind), "choices": [], "usage": self._usage()})
        yield b"data: [DONE]\n\n"

    def _event(self, kind: str, piece: Piece, begun: set[int]) -> bytes:
        self.tokens += len(piece.tokens)
        delta: dict[str, Any] = {"content": piece.text}
        if piece.index not in begun:
            delta = {"role": "assistant", **delta}
        begun.add(piece.index)
        content = {"text": piece.text} if self.kind == "text_completion" else {"delta": delta}
        choice = {"index": piece.index, **content, "logprobs": self._logs(piece.tokens), "finish_reason": piece.reason}
        return _sse({**self._head(kind), "choices": [choice]})

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.name, "object": kind, "created": int(time.time()), "model": self.asked.model}

    def _usage(self) -> dict[str, int]:
        return {"prompt_tokens": self.prompt, "completion_tokens": self.tokens, "total_tokens": self.prompt + self.tokens}

    def _logs(self, chosen: Sequence[Chosen]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        decode = self.service.tokenizer.decode
        if self.kind == "text_completion":
            return {
                "tokens": [decode([each.token]) for each in chosen],
                "token_logprobs": [each.logprob for each in chosen],
                "top_logprobs": [{decode([token]): value for token, value in each.likely} for each in chosen],
                "text_offset": [],
            }

        def entry(token: int, value: float | None) -> dict[str, Any]:
            text = decode([token])
            return {"token": text, "logprob": value, "bytes": list(text.encode())}

        content = [
            entry(each.token, each.logprob) | {"top_logprobs": [entry(*likely) for likely in each.likely]} for each in chosen
        ]
        return {"content": content}


def _sse(content: Mapping[str, Any]) -> bytes:
    return f"data: {json.dumps(content)}\n\n".encode()
