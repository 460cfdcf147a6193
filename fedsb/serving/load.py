"""Load on a server of OpenAI's interface: clients that ask again and again, each time another tenant, and how long it took."""

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import httpx

TIMEOUT = httpx.Timeout(120.0)


@dataclass
class Measured:
    """What clients saw.

    Attributes:
        first: seconds until the first piece of each answer.
        between: seconds from one piece to the next.
        tokens: of answers.
        errors: what was answered instead, and how often.
    """

    seconds: float = 0.0
    requests: int = 0
    tokens: int = 0
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    errors: dict[str, int] = field(default_factory=dict)


async def models_of(url: str, key: str | None = None) -> tuple[list[str], list[str]]:
    """Names that a key may ask: base models (at most one of ours) and tenants. Raises httpx.HTTPError."""
    async with _client(url, key) as client:
        answer = await client.get("/models")
        answer.raise_for_status()
        told = answer.json()["data"]
        return [each["id"] for each in told if not each.get("parent")], [each["id"] for each in told if each.get("parent")]


async def drive(
    url: str,
    models: Sequence[str],
    *,
    clients: int,
    seconds: float,
    prompt: str,
    tokens: int,
    key: str | None = None,
) -> Measured:
    """Ask for some seconds: `clients` at one time, each a model drawn at random, an answer of so many tokens at the most.

    url: ends with /v1. What has begun is waited for, and counted.
    """
    found, began = Measured(), time.perf_counter()

    async def one(number: int) -> None:
        drawn, again = random.Random(number), True
        async with _client(url, key) as client:
            while again:
                body = {"model": drawn.choice(models), "prompt": prompt, "max_tokens": tokens, "temperature": 0}
                await _ask(client, body, found)
                again = time.perf_counter() - began < seconds

    await asyncio.gather(*(one(number) for number in range(clients)))
    found.seconds = time.perf_counter() - began
    return found


async def _ask(client: httpx.AsyncClient, body: dict[str, object], found: Measured) -> None:
    before, begun = time.perf_counter(), False
    told = {**body, "stream": True, "stream_options": {"include_usage": True}}
    try:
        async with client.stream("POST", "/completions", json=told) as answer:
            if answer.status_code != 200:
                await answer.aread()
                found.errors[str(answer.status_code)] = found.errors.get(str(answer.status_code), 0) + 1
                await asyncio.sleep(float(answer.headers.get("retry-after", 0)))
                return
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                piece = json.loads(line.removeprefix("data: "))
                if "error" in piece:
                    found.errors["in an answer"] = found.errors.get("in an answer", 0) + 1
                    return
                if usage := piece.get("usage"):
                    found.tokens += usage["completion_tokens"]
                if piece.get("choices"):
                    now = time.perf_counter()
                    (found.between if begun else found.first).append(now - before)
                    before, begun = now, True
        found.requests += 1
    except httpx.HTTPError as error:
        name = type(error).__name__
        found.errors[name] = found.errors.get(name, 0) + 1


def _client(url: str, key: str | None) -> httpx.AsyncClient:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.AsyncClient(base_url=url, headers=headers, timeout=TIMEOUT)
