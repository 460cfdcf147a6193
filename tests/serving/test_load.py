"""Mixed traffic for some seconds, as it would come in half an hour: tenants that are asked, loaded, unloaded and published anew,
clients that hang up, read slowly or send nonsense. Nobody gets an error that is not of his own making, and nothing piles up.

`FEDSB_LOAD_SECONDS=1800` makes it the long form.
"""

import asyncio
import os
import random
import shutil
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.harness import resident
from fedsb.serving.engine import Limits
from fedsb.serving.http.service import Bounds
from fedsb.serving.load import Measured, drive
from tests.serving.test_http import Running
from tests.serving.test_tenants import Shop, finished  # noqa: F401 - a fixture

SECONDS = float(os.environ.get("FEDSB_LOAD_SECONDS", "20"))
PROMPT = "red green blue"


@pytest.fixture
def running(finished: tuple[Path, str], tmp_path: Path) -> Iterator[Running]:  # noqa: F811
    shutil.copytree(finished[0], tmp_path / "run")
    found = Running(Shop(tmp_path / "run", finished[1], capacity=6), None, Limits(8, 32, 1024, 64), Bounds(answer=40))
    yield found
    found.close()


class Traffic:
    """What goes on beside those who only ask; each until its time is over."""

    def __init__(self, running: Running, until: float) -> None:
        self.running, self.until, self.draw = running, until, random.Random(0)
        self.url = f"{running.url}/v1/completions"
        self.memory: list[int] = []
        self.did: dict[str, int] = {}

    @property
    def goes_on(self) -> bool:
        return time.perf_counter() < self.until

    def count(self, what: str) -> None:
        self.did[what] = self.did.get(what, 0) + 1

    async def loads(self) -> None:
        """client-2 comes and goes, and is published anew."""
        async with httpx.AsyncClient(base_url=self.running.url, timeout=60) as client:
            while self.goes_on:
                for path in ("/v1/unload_lora_adapter", "/v1/load_lora_adapter"):
                    answer = await client.post(path, json={"lora_name": "client-2"})
                    assert answer.status_code == 200, answer.text
                    self.count(path)
                await asyncio.to_thread(self.running.shop.publish, "client-2", 1.0)
                await asyncio.sleep(0.05)

    async def hangs_up(self) -> None:
        while self.goes_on:
            body = {"model": "client-0", "prompt": PROMPT, "max_tokens": 40, "stream": True}
            async with httpx.AsyncClient(timeout=60) as client, client.stream("POST", self.url, json=body) as answer:
                async for _ in answer.aiter_lines():
                    if self.draw.random() < 0.3:
                        break
            self.count("hung up")

    async def reads_slowly(self) -> None:
        while self.goes_on:
            body = {"model": "client-1", "prompt": PROMPT, "max_tokens": 20, "stream": True}
            async with httpx.AsyncClient(timeout=60) as client, client.stream("POST", self.url, json=body) as answer:
                async for _ in answer.aiter_raw(16):
                    await asyncio.sleep(0.01)
            self.count("read slowly")

    async def is_broken(self) -> None:
        """Half a request, a request of nonsense, and one for a tenant that is not there."""
        host, port = self.running.url.removeprefix("http://").split(":")
        while self.goes_on:
            _, writer = await asyncio.open_connection(host, int(port))
            writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            await writer.drain()
            writer.close()
            async with httpx.AsyncClient(base_url=self.running.url, timeout=60) as client:
                assert (await client.post("/v1/completions", content=b"{")).status_code == 400
                assert (await client.post("/v1/completions", json={"model": "nobody", "prompt": "x"})).status_code == 404
            self.count("broken")
            await asyncio.sleep(0.02)

    async def looks(self) -> None:
        while self.goes_on:
            self.memory.append(resident())  # what glibc keeps for later is no leak
            await asyncio.sleep(SECONDS / 40)


@pytest.mark.timeout(SECONDS + 120)
def test_mixed_traffic_leaves_nothing_behind(running: Running) -> None:
    url, traffic = f"{running.url}/v1", Traffic(running, time.perf_counter() + SECONDS)

    async def all_of_it() -> Measured:
        asked: dict[str, Any] = {"clients": 6, "seconds": SECONDS, "prompt": PROMPT, "tokens": 12}
        others = (traffic.loads(), traffic.hangs_up(), traffic.reads_slowly(), traffic.is_broken(), traffic.looks())
        found, *_ = await asyncio.gather(drive(url, ["base", "client-0", "client-1"], **asked), *others)
        return found

    found = asyncio.run(all_of_it())
    assert running.quiet() and running.engine.alive
    assert found.errors == {} and found.requests > 20
    assert min(traffic.did.values()) > 0 and len(traffic.did) == 5, traffic.did
    half = len(traffic.memory) // 2
    early, late = (statistics.median(part) for part in (traffic.memory[half // 2 : half], traffic.memory[-half // 2 :]))
    assert late <= 1.03 * early, (early, late)
    bank = running.shop.bank
    assert all(len(group.free) + running.shop.tenants.loaded == 5 for group in bank.groups)  # every slot is free or held
    print(
        f"\n{found.requests} requests, {traffic.did}, memory {int(early) >> 20} to {int(late) >> 20} MiB, between tokens p50 "
        f"{1e3 * statistics.median(found.between):.0f} ms, p99 {1e3 * statistics.quantiles(found.between, n=100)[98]:.0f} ms"
    )
