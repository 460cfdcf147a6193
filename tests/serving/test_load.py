"""Mixed traffic on a server in a process of its own, for some seconds, as it would come in half an hour: tenants that are asked,
loaded, unloaded and published anew, clients that hang up, read slowly or send nonsense. Nobody gets an error that is not his own,
and nothing piles up.

`FEDSB_LOAD_SECONDS=1800` makes it the long form, on SmolLM2-135M; from ten minutes on the time between tokens is held to its
target too, which takes a machine that has nothing else to do.
"""

import asyncio
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model

from fedsb.models import device_of, load_model, locate
from fedsb.sections import ModelSection
from fedsb.serving.load import Measured, drive
from tests.federation.tiny import save_model

SECONDS = float(os.environ.get("FEDSB_LOAD_SECONDS", "20"))
LONG = SECONDS >= 600
PROMPT = "red green blue"
TENANTS = ("client-0", "client-1", "client-2")


class Server:
    """`fedsb serve` over folders with a LoRA each."""

    def __init__(self, source: str, folder: Path) -> None:
        self.folder = folder
        command = [
            sys.executable,
            "-m",
            "fedsb.cli.main",
            "serve",
            str(folder),
            "--model",
            source,
            "--name",
            "base",
            "--port",
            "0",
        ]
        command += ["--threads", "1", "--capacity", "5", "--requests", "8", "--waiting", "64", "--cache-tokens", "2048"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert self.process.stdout is not None
        found = re.search(r"http://127\.0\.0\.1:\d+", line := self.process.stdout.readline())
        assert found, line
        self.url = found[0]

    def publish(self, name: str) -> None:
        """The tenant's folder anew, by a rename."""
        fresh = self.folder.parent / "fresh"
        shutil.copytree(self.folder / name, fresh, copy_function=shutil.copyfile)
        (self.folder / name).rename(self.folder.parent / "old")
        fresh.rename(self.folder / name)
        shutil.rmtree(self.folder.parent / "old")

    @property
    def memory(self) -> int:
        """Bytes that are the process's own."""
        return int(psutil.Process(self.process.pid).memory_full_info().uss)

    def gauge(self, name: str) -> int:
        found = re.search(rf"^fedsb_serve_{name} (\S+)$", httpx.get(f"{self.url}/metrics").text, re.M)
        assert found, name
        return int(float(found[1]))

    def close(self) -> None:
        self.process.terminate()
        self.process.communicate(timeout=30)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    source = "smollm2-135m-instruct" if LONG else save_model(tmp_path / "model")
    told = ModelSection.model_validate({"source": source, "dtype": "fp32"})
    for seed, name in enumerate(TENANTS):
        torch.manual_seed(seed)
        base = load_model(locate(source), told, None, device_of("cpu"))
        config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        get_peft_model(base, config).save_pretrained(tmp_path / "tenants" / name)  # type: ignore[arg-type]
    found = Server(source, tmp_path / "tenants")
    yield found
    found.close()


class Traffic:
    """What goes on beside those who only ask; each until its time is over."""

    def __init__(self, server: Server, until: float) -> None:
        self.server, self.until, self.draw = server, until, random.Random(0)
        self.url = f"{server.url}/v1/completions"
        self.memory: list[int] = []
        self.did: dict[str, int] = {}

    @property
    def goes_on(self) -> bool:
        return time.perf_counter() < self.until

    def count(self, what: str) -> None:
        self.did[what] = self.did.get(what, 0) + 1

    async def loads(self) -> None:
        """client-2 comes and goes, and is published anew."""
        async with httpx.AsyncClient(base_url=self.server.url, timeout=60) as client:
            while self.goes_on:
                for path in ("/v1/unload_lora_adapter", "/v1/load_lora_adapter"):
                    answer = await client.post(path, json={"lora_name": "client-2"})
                    assert answer.status_code == 200, answer.text
                    self.count(path)
                await asyncio.to_thread(self.server.publish, "client-2")
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
        host, port = self.server.url.removeprefix("http://").split(":")
        while self.goes_on:
            _, writer = await asyncio.open_connection(host, int(port))
            writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            await writer.drain()
            writer.close()
            async with httpx.AsyncClient(base_url=self.server.url, timeout=60) as client:
                assert (await client.post("/v1/completions", content=b"{")).status_code == 400
                assert (await client.post("/v1/completions", json={"model": "nobody", "prompt": "x"})).status_code == 404
            self.count("broken")
            await asyncio.sleep(0.02)

    async def looks(self) -> None:
        while self.goes_on:
            self.memory.append(self.server.memory)
            await asyncio.sleep(SECONDS / 40)


@pytest.mark.timeout(SECONDS + 300)
def test_mixed_traffic_leaves_nothing_behind(server: Server) -> None:
    traffic = Traffic(server, time.perf_counter() + SECONDS)

    async def all_of_it() -> Measured:
        asked: dict[str, Any] = {"clients": 6, "seconds": SECONDS, "prompt": PROMPT, "tokens": 12}
        others = (traffic.loads(), traffic.hangs_up(), traffic.reads_slowly(), traffic.is_broken(), traffic.looks())
        found, *_ = await asyncio.gather(drive(f"{server.url}/v1", ["base", "client-0", "client-1"], **asked), *others)
        return found

    found = asyncio.run(all_of_it())
    deadline = time.perf_counter() + 30
    while server.gauge("running") and time.perf_counter() < deadline:
        time.sleep(0.1)
    half = len(traffic.memory) // 2
    early, late = (statistics.median(part) for part in (traffic.memory[half // 2 : half], traffic.memory[-half // 2 :]))
    usual, slow = statistics.median(found.between), statistics.quantiles(found.between, n=100)[98]
    print(
        f"\n{found.requests} requests, {traffic.did}, memory {early / 2**20:.1f} to {late / 2**20:.1f} MiB, between tokens p50 "
        f"{1e3 * usual:.1f} ms, p99 {1e3 * slow:.1f} ms, {found.errors}"
    )
    assert server.gauge("running") == 0 and httpx.get(f"{server.url}/ready").status_code == 200
    assert found.errors == {} and found.requests > 20
    assert min(traffic.did.values()) > 0 and len(traffic.did) == 5, traffic.did
    assert late <= 1.03 * early
    assert server.gauge("slots_taken") == server.gauge("adapters_loaded") <= 3  # no version is left behind
    if LONG:
        assert slow <= 3 * usual
