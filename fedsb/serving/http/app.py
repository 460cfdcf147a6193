"""The server: OpenAI's HTTP interface over the engine. `model` is a tenant's name.

Nothing of another tenant, no path of the server and no trace of an error leaves it: whose key may not ask a tenant hears what it
hears of one that does not exist, and an adapter that cannot be loaded is named without a reason, which the server's log has.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from jinja2 import TemplateError
from prometheus_client import generate_latest
from starlette.exceptions import HTTPException
from torch import Tensor

from fedsb.errors import FedsbError, RequestError, StoreError
from fedsb.serving.bank import BankFull
from fedsb.serving.engine import Engine, Sampling
from fedsb.serving.http.answers import EngineFailed, Piece, answered
from fedsb.serving.http.guard import Guard
from fedsb.serving.http.keys import Key
from fedsb.serving.http.schemas import AdapterAsked, Asked, ChatAsked, CompletionAsked
from fedsb.serving.http.service import BUSY_SECONDS, Refused, Service, error_body, unknown
from fedsb.serving.http.telling import Kind, Told
from fedsb.serving.soft_prompts import decoded

log = logging.getLogger(__name__)


def build(service: Service) -> FastAPI:
    """The ASGI application."""

    @asynccontextmanager
    async def alive(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.closing = True
        await asyncio.get_running_loop().run_in_executor(None, service.engine.close)

    app = FastAPI(title="FedSB", summary="Adapters of many tenants behind one model.", lifespan=alive, redoc_url=None)
    app.add_middleware(Guard, most=service.bounds.body, requests=service.figures.requests)

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> JSONResponse:
        headers = {} if error.wait is None else {"Retry-After": str(max(1, round(error.wait)))}
        if error.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(error_body(error.message, error.status, error.code), error.status, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:] if not isinstance(part, int)) or "the body"
        return JSONResponse(error_body(f"{where}: {first['msg']}", 400, "invalid_request", where), 400)

    @app.exception_handler(HTTPException)
    async def plain(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(
            error_body(str(error.detail), error.status_code, "not_found" if error.status_code == 404 else "http"),
            error.status_code,
        )

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> JSONResponse:
        log.error("%s failed", request.url.path, exc_info=error)
        return JSONResponse(error_body("the server failed; its log says why", 500, "internal"), 500)

    def key(request: Request) -> Key:
        return service.allowed(request)

    def paced(request: Request) -> Key:
        found = service.allowed(request)
        if wait := found.wait():
            raise Refused(
                429, f"this key may ask {found.entry.requests_per_minute} times a minute; wait", "rate_limit_exceeded", wait
            )
        return found

    def admin(request: Request) -> Key:
        found = service.allowed(request)
        if not service.keys.is_admin(found):
            raise Refused(403, "this takes the key of an administrator", "forbidden")
        return found

    @app.get("/health")
    def health() -> Response:
        return Response(status_code=200 if service.engine.alive else 503)

    @app.get("/ready")
    def ready() -> Response:
        return Response(status_code=200 if service.engine.alive and not service.closing else 503)

    @app.get("/metrics")
    def metrics() -> PlainTextResponse:
        return PlainTextResponse(generate_latest(service.figures.registry), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    def models(by: Annotated[Key, Depends(key)]) -> dict[str, Any]:
        return {"object": "list", "data": service.models(by)}

    @app.get("/v1/models/{model}")
    def model(model: str, by: Annotated[Key, Depends(key)]) -> dict[str, Any]:
        for found in service.models(by):
            if found["id"] == model:
                return found
        raise unknown(model)

    @app.post("/v1/load_lora_adapter")
    def load(asked: AdapterAsked, by: Annotated[Key, Depends(admin)]) -> PlainTextResponse:
        try:
            version = service.tenants.load(asked.lora_name)
        except BankFull:
            raise Refused(503, "all room for adapters is in use; try again later", "overloaded", BUSY_SECONDS) from None
        except StoreError:
            raise Refused(404, f"there is no adapter {asked.lora_name} in the server's stores", "model_not_found") from None
        except FedsbError as error:
            log.error("%s", error)
            raise Refused(
                400, f"the adapter {asked.lora_name} cannot be loaded; the server's log says why", "adapter_unusable"
            ) from None
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' added successfully: version {version}.")

    @app.post("/v1/unload_lora_adapter")
    def unload(asked: AdapterAsked, by: Annotated[Key, Depends(admin)]) -> PlainTextResponse:
        if not service.tenants.unload(asked.lora_name):
            raise Refused(404, f"there is no adapter {asked.lora_name} to unload", "model_not_found")
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' removed successfully.")

    @app.post("/v1/completions")
    async def completions(asked: CompletionAsked, request: Request, by: Annotated[Key, Depends(paced)]) -> Response:
        ids = asked.prompt if isinstance(asked.prompt, list) else service.tokenizer(asked.prompt)["input_ids"]
        known = len(service.tokenizer)
        if any(not 0 <= token < known for token in ids):
            raise Refused(400, f"prompt: holds a token that is none of the model's {known}", "invalid_request")
        return await _answer(service, by, asked, ids, asked.max_tokens, asked.logprobs, "text_completion", request)

    @app.post("/v1/chat/completions")
    async def chat(asked: ChatAsked, request: Request, by: Annotated[Key, Depends(paced)]) -> Response:
        ids = _rendered(service.tokenizer, asked)
        most = asked.max_completion_tokens or asked.max_tokens
        return await _answer(
            service, by, asked, ids, most, asked.top_logprobs if asked.logprobs else None, "chat.completion", request
        )

    return app


def _rendered(tokenizer: Any, asked: ChatAsked) -> list[int]:
    messages = [{"role": message.role, "content": message.text} for message in asked.messages]
    if not tokenizer.chat_template:
        raise Refused(400, "this model has no chat template; use /v1/completions", "invalid_request")
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise Refused(400, f"messages: the model's chat template refuses them ({error})", "invalid_request") from None
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _soft(asked: Asked, engine: Engine) -> Tensor | None:
    if asked.prompt_embeds is None:
        return None
    try:
        soft = decoded(asked.prompt_embeds, engine.width)
        engine.check_soft(soft)
        return soft
    except RequestError as error:
        raise Refused(400, str(error), "invalid_request") from None


async def _answer(
    service: Service,
    key: Key,
    asked: Asked,
    ids: Sequence[int],
    most: int | None,
    logprobs: int | None,
    kind: Kind,
    request: Request,
) -> Response:
    if not ids:
        raise Refused(400, "prompt: has no tokens; write something", "invalid_request")
    soft = _soft(asked, service.engine)
    length = len(ids) + (0 if soft is None else len(soft))
    room = service.engine.longest - length
    wanted = min(service.bounds.answer, max(room, 1)) if most is None else most
    if wanted > service.bounds.answer or wanted > room:
        raise Refused(
            400,
            f"{length} tokens of prompt and {wanted} of answer: an answer may have {service.bounds.answer} tokens, and both "
            f"together {service.engine.longest}",
            "context_length_exceeded",
        )
    sampling = Sampling(wanted, asked.temperature, asked.top_p, asked.seed, logprobs, service.ends)
    leases = await asyncio.get_running_loop().run_in_executor(None, service.leases, key, asked.model, asked.n)
    pieces = answered(service.engine, service.tenants, service.tokenizer, ids, sampling, leases, asked.stops, soft)
    watched = _watched(service, pieces, length)
    try:
        first = await anext(watched)  # so that what cannot be taken has a status of its own
    except RequestError as error:
        raise Refused(503, str(error), "overloaded", BUSY_SECONDS) from None
    except EngineFailed as error:
        log.error("an answer failed: %s", error)
        raise Refused(500, "the model failed; the server's log says why", "internal") from None
    told = Told(service, asked, kind, logprobs is not None, length)
    if asked.stream:
        return StreamingResponse(
            told.streamed(first, watched), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )
    return await told.whole(first, watched, request)


async def _watched(service: Service, pieces: AsyncIterator[Piece], prompt: int) -> AsyncIterator[Piece]:
    """The same pieces, counted and timed."""
    before, begun = time.perf_counter(), False
    async with aclosing(pieces) as source:  # type: ignore[type-var]
        async for piece in source:
            now = time.perf_counter()
            (service.figures.between if begun else service.figures.first).observe(now - before)
            if not begun:
                service.figures.tokens.labels("prompt").inc(prompt)
            before, begun = now, True
            service.figures.tokens.labels("answer").inc(len(piece.tokens))
            yield piece
