"""`fedsb serve` as a command: it says where it listens, answers, ends when told, and refuses what cannot be."""

import asyncio
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from prometheus_client import Counter

from fedsb.cli.serve_screen import ServeScreen, Work
from fedsb.serving import load
from tests.cli.front_door import complaint
from tests.federation.tiny import config_of, federate, save_model, save_task, table

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve")
    source, task = save_model(folder / "model"), save_task(folder / "task")
    federate(config_of(table(source, task, federation={"clients": 2, "rounds": 1})), folder / "run")
    return folder / "run"


@pytest.mark.parametrize(("sign", "options"), [(signal.SIGTERM, ()), (signal.SIGINT, ("--json",))])
def test_it_serves_until_it_is_told_to_end(run: Path, sign: signal.Signals, options: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "fedsb.cli.main", "serve", str(run), "--port", "0", "--threads", "1", "--name", "tiny"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell runs the suite in the background
    try:
        process = subprocess.Popen(
            [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if options:
            assert json.loads(line) == {"event": "loading", "what": str(run.parent / "model")}
            url = (ready := json.loads(process.stdout.readline())).pop("url")
            assert ready == {"event": "serving", "model": "tiny", "tenants": 2}
        else:
            found = re.fullmatch(r"serving tiny and 2 tenants on (http://127\.0\.0\.1:\d+/v1)\n", line)
            assert found, line
            url = found[1]
        names = [model["id"] for model in httpx.get(f"{url}/models").json()["data"]]
        assert names == ["tiny", "client-0", "client-1"]
        body = {"model": "client-1", "prompt": "red green", "max_tokens": 3, "temperature": 0}
        assert httpx.post(f"{url}/completions", json=body, timeout=60).json()["usage"]["completion_tokens"] == 3
        process.send_signal(sign)
        left = process.wait(30)
        assert process.stderr is not None
        if sign == signal.SIGTERM:
            assert left in (0, -signal.SIGTERM)
        else:
            said = process.stderr.read().splitlines()[-1]
            assert (left, said) == (130, "fedsb: stopped; requests at work have been answered; the same command serves again")
    finally:
        process.kill()
        process.communicate()


def test_it_says_what_it_has_to_do_on_a_terminal_and_to_programs(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    requests, tokens = Counter("requests", "", ["path"], registry=None), Counter("tokens", "", ["kind"], registry=None)
    engine, tenants = SimpleNamespace(running=3), SimpleNamespace(loaded=7)
    service: Any = SimpleNamespace(figures=SimpleNamespace(requests=requests, tokens=tokens), engine=engine, tenants=tenants)
    clock = itertools.count(100, 10)
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    program = ServeScreen(json_=True, quiet=False)
    requests.labels("/a").inc(20)
    requests.labels("/b").inc(5)
    tokens.labels("answer").inc(300)
    tokens.labels("prompt").inc(999)
    program.look(service)
    work = {"requests": 2.5, "tokens": 30.0, "running": 3, "adapters": 7}
    assert json.loads(capsys.readouterr().out) == {"event": "work", **work}
    assert Work(**work).line == "3 requests at work or waiting, 2.5 answered and 30 tokens a second, 7 adapters in memory"
    engine.running = 0
    program.look(service)
    ServeScreen(json_=False, quiet=True).look(service)
    assert capsys.readouterr() == ("", "")


def test_what_cannot_be_served(run: Path, tmp_path: Path, capsys: Capture) -> None:
    assert "there is no such folder; name the folder of a run" in complaint(capsys, "serve", str(tmp_path / "nothing"))
    assert "give --keys, or listen on 127.0.0.1" in complaint(capsys, "serve", str(run), "--host", "0.0.0.0")
    assert "--dtype fp8: is none of auto, fp32, bf16" in complaint(capsys, "serve", str(run), "--dtype", "fp8")
    assert "--quantise int3: is none of int8, int4, nf4; choose one" in complaint(capsys, "serve", str(run), "--quantise", "int3")
    assert "int4 multiplies in bf16 alone" in complaint(capsys, "serve", str(run), "--dtype", "fp32", "--quantise", "int4")
    assert "cannot be read" in complaint(capsys, "serve", str(run), "--keys", str(tmp_path / "keys.toml"))
    assert "does not say what model its adapters are for; give --model" in complaint(capsys, "serve", str(tmp_path))


def test_bench_loads_it_and_tells_how_fast_it_was(run: Path, capsys: Capture) -> None:
    from fedsb.cli.main import app, register

    register("bench")
    with pytest.raises(SystemExit) as ended:
        app(["bench", "serve", str(run), "--clients", "1,3", "--seconds", "1", "--tokens", "4", "--threads", "1", "--json"])
    assert not ended.value.code
    told = json.loads(capsys.readouterr().out)
    assert told["models"] == 2 and [row["clients"] for row in told["rows"]] == [1, 3]
    for row in told["rows"]:
        assert (
            row["errors"] == {} and row["requests"] > 0 and 0 < row["tokens_per_second"] <= 4 * row["requests_per_second"] + 1e-6
        )
        assert 0 < row["first_p50"] <= row["first_p99"] and 0 < row["between_p50"] <= row["between_p99"]


def test_an_error_in_the_middle_of_an_answer_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = 'data: {"choices": [{"text": "red"}]}\n\ndata: {"error": {"message": "the model failed"}}\n\n'
    transport = httpx.MockTransport(lambda _: httpx.Response(200, text=lines))
    monkeypatch.setattr(load, "_client", lambda url, key: httpx.AsyncClient(base_url=url, transport=transport))
    found = asyncio.run(load.drive("http://x/v1", ["one"], clients=2, seconds=0, prompt="x", tokens=1))
    assert found.errors == {"in an answer": 2} and found.requests == 0


def test_what_cannot_be_loaded(run: Path, tmp_path: Path, capsys: Capture) -> None:
    assert "there is no such folder" in complaint(capsys, "bench", "serve", str(tmp_path / "nothing"))
    assert "does not answer as a server of models" in complaint(capsys, "bench", "serve", "http://127.0.0.1:9/v1")
    assert "--clients x: are no numbers; write some as 1,8,32" in complaint(capsys, "bench", "serve", str(run), "--clients", "x")
    assert "from 1 to 1024 can ask at one time" in complaint(capsys, "bench", "serve", str(run), "--clients", "0")
