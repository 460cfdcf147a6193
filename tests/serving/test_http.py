"""The server as its clients see it: the official client against a real server on the loopback, keys, limits, and secrets."""

import asyncio
import hashlib
import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from fedsb.errors import ConfigError
from fedsb.models import load_tokenizer
from fedsb.serving.engine import Engine, Limits
from fedsb.serving.http.answers import Stopper
from fedsb.serving.http.app import build
from fedsb.serving.http.keys import Keys
from fedsb.serving.http.service import Bounds, Service
from fedsb.store import adapters
from tests.federation.tiny import config_of, federate, save_model, save_task, table
from tests.serving.test_tenants import Shop

WORDS = "red green blue"
SECRETS = {"alpha": "key-of-alpha", "both": "key-of-both", "boss": "key-of-boss", "slow": "key-of-slow"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of three clients that have learnt something, and its base model."""
    folder = tmp_path_factory.mktemp("http")
    source, task = save_model(folder / "model"), save_task(folder / "task")
    train = {"steps": 20, "learning_rate": 0.05}
    federate(config_of(table(source, task, train=train, personal={"steps": 10, "learning_rate": 0.05})), folder / "run")
    return folder / "run", source


def entry(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "sha256": hashlib.sha256(SECRETS[name].encode()).hexdigest(), **more}


def key_file(folder: Path) -> Path:
    """Keys of one tenant, of two and the base model, of an administrator, and of one that may ask twice a minute."""
    told = [
        entry("alpha", tenants=["client-0"], base=False),
        entry("both", tenants=["client-0", "client-1"]),
        entry("boss", admin=True),
        entry("slow", tenants=["*"], requests_per_minute=2),
    ]
    lines = []
    for each in told:
        lines.append("[[key]]")
        lines += [f"{name} = {json.dumps(value)}" for name, value in each.items()]
    (folder / "keys.toml").write_text("\n".join(lines))
    return folder / "keys.toml"


class Running:
    """A server in a thread."""

    def __init__(self, shop: Shop, keys: Keys | None = None, limits: Limits | None = None, bounds: Bounds | None = None) -> None:
        self.shop, self._clients = shop, list[openai.OpenAI]()
        self.engine = Engine(shop.model, shop.bank, limits or Limits(8, 32, 1024, 32))
        self.service = Service("base", load_tokenizer(shop.source), self.engine, shop.tenants, keys, bounds or Bounds(answer=40))
        self.server = uvicorn.Server(uvicorn.Config(build(self.service), port=0, log_level="error", ws="none"))
        self._thread = threading.Thread(target=self.server.run)
        self._thread.start()
        deadline = time.monotonic() + 30
        while not self.server.started:
            assert time.monotonic() < deadline and self._thread.is_alive()
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"

    def client(self, key: str = "none") -> openai.OpenAI:
        self._clients.append(openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=30))
        return self._clients[-1]

    def post(self, path: str, body: Any, key: str = "none") -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, headers={"Authorization": f"Bearer {key}"}, timeout=30)

    def quiet(self) -> bool:
        """Whether the engine comes to rest soon, and no lease is left."""
        deadline = time.monotonic() + 20
        while self.engine.running and time.monotonic() < deadline:
            time.sleep(0.01)
        return not self.engine.running and not any(held.users for held in self.shop.tenants._held.values())

    def close(self) -> None:
        for client in self._clients:
            client.close()
        self.server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()


@pytest.fixture
def shop(finished: tuple[Path, str], tmp_path: Path) -> Shop:
    shutil.copytree(finished[0], tmp_path / "run")
    return Shop(tmp_path / "run", finished[1])


@pytest.fixture
def running(shop: Shop) -> Iterator[Running]:
    found = Running(shop)
    yield found
    found.close()


@pytest.fixture
def locked(shop: Shop, tmp_path: Path) -> Iterator[Running]:
    found = Running(shop, Keys(key_file(tmp_path)))
    yield found
    found.close()


def text(client: openai.OpenAI, model: str, **more: Any) -> str:
    told: dict[str, Any] = {"temperature": 0, "max_tokens": 6, **more}
    return str(client.completions.create(model=model, prompt=WORDS, **told).choices[0].text)


def test_tenants_are_models_and_answer_apart(running: Running) -> None:
    client = running.client()
    models = client.models.list().data
    assert [model.id for model in models] == ["base", "client-0", "client-1", "client-2"]
    assert models[0].parent is None and models[1].parent == models[1].root == "base"  # type: ignore[attr-defined]
    assert client.models.retrieve("client-1").id == "client-1"
    told = {name: text(client, name) for name in ("base", "client-0", "client-1", "client-2")}
    assert len(set(told.values())) >= 3
    assert told["client-0"] == text(client, "base:client-0")
    answers: dict[str, str] = {}
    threads = [
        threading.Thread(target=lambda name=name, i=i: answers.__setitem__(f"{name} {i}", text(running.client(), name)))
        for name in told
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers == {f"{name} {i}": told[name] for name in told for i in range(4)}
    assert running.quiet()


def test_chat_and_completions_whole_and_streamed_are_the_same(running: Running) -> None:
    client = running.client()
    messages: Any = [{"role": "user", "content": WORDS}]
    whole = client.chat.completions.create(model="client-0", messages=messages, temperature=0, max_tokens=8)
    assert whole.choices[0].message.content and whole.usage and whole.usage.completion_tokens <= 8
    pieces = list(
        client.chat.completions.create(
            model="client-0", messages=messages, temperature=0, max_tokens=8, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces[:-1]) == whole.choices[0].message.content
    assert (
        pieces[0].choices[0].delta.role == "assistant" and pieces[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    )
    assert pieces[-1].usage == whole.usage and not pieces[-1].choices
    parts = list(client.completions.create(model="client-0", prompt=WORDS, temperature=0, max_tokens=6, stream=True))
    assert "".join(part.choices[0].text for part in parts) == text(client, "client-0")
    raw = httpx.post(
        f"{running.url}/v1/completions", json={"model": "base", "prompt": WORDS, "stream": True, "max_tokens": 2}, timeout=30
    ).text
    assert raw.endswith("data: [DONE]\n\n") and all(line.startswith("data: ") for line in raw.split("\n\n") if line)


def test_several_answers_seeds_and_log_probabilities(running: Running) -> None:
    client = running.client()
    told: dict[str, Any] = {"model": "client-1", "prompt": WORDS, "max_tokens": 6, "temperature": 2.0, "seed": 5}
    first, again = (client.completions.create(n=3, **told) for _ in range(2))
    assert [choice.text for choice in first.choices] == [choice.text for choice in again.choices]
    assert len({choice.text for choice in first.choices}) > 1 and [choice.index for choice in first.choices] == [0, 1, 2]
    logs = client.completions.create(model="base", prompt=WORDS, max_tokens=3, temperature=0, logprobs=2).choices[0].logprobs
    assert logs and logs.token_logprobs and logs.top_logprobs and len(logs.token_logprobs) == 3
    assert logs.token_logprobs[0] == pytest.approx(max(logs.top_logprobs[0].values()))
    messages: Any = [{"role": "user", "content": WORDS}]
    chat = client.chat.completions.create(
        model="base", messages=messages, max_tokens=2, temperature=0, logprobs=True, top_logprobs=2
    )
    content = chat.choices[0].logprobs and chat.choices[0].logprobs.content
    assert content and len(content) == 2 and len(content[0].top_logprobs) == 2
    assert client.completions.create(model="base", prompt=WORDS, max_tokens=1).choices[0].logprobs is None


def test_a_stop_text_ends_an_answer_before_it(running: Running) -> None:
    client = running.client()
    whole = text(client, "base", max_tokens=12)
    words = whole.split()
    stop = words[3]
    cut = client.completions.create(model="base", prompt=WORDS, temperature=0, max_tokens=12, stop=["nowhere", stop])
    assert cut.choices[0].finish_reason == "stop" and cut.choices[0].text == whole[: whole.index(stop)]
    stream = client.completions.create(model="base", prompt=WORDS, temperature=0, max_tokens=12, stop=stop, stream=True)
    assert "".join(part.choices[0].text for part in stream) == cut.choices[0].text
    assert running.quiet()


@pytest.mark.parametrize("cuts", [1, 2, 3, 100])
def test_what_may_begin_a_stop_is_held_back(cuts: int) -> None:
    whole, stops = "one two\n#three \n\n##four", ["\n##", "five"]
    stopper, told, found = Stopper(stops), "", False
    for start in range(0, len(whole), cuts):
        more, found = stopper.add(whole[start : start + cuts])
        told += more
        assert "\n##" not in told and not told.endswith("\n#")
        if found:
            break
    assert found and told == "one two\n#three \n"
    assert Stopper(["abc"]).add("xab") == ("x", False)
    half = Stopper(["abc"])
    half.add("xab")
    assert half.rest() == "ab"


def test_a_new_version_is_served_without_a_restart(running: Running) -> None:
    client = running.client()
    before = text(client, "client-0")
    running.shop.publish("client-0", 0.0)
    assert text(client, "client-0") == text(client, "base") != before


def test_keys_open_what_is_theirs(locked: Running) -> None:
    ids = {name: [model.id for model in locked.client(SECRETS[name]).models.list().data] for name in SECRETS}
    assert ids == {"alpha": ["client-0"], "both": ["base", "client-0", "client-1"], "boss": [], "slow": [
        "base", "client-0", "client-1", "client-2"]}  # fmt: skip
    assert text(locked.client(SECRETS["alpha"]), "client-0")
    for key, model in (("alpha", "client-1"), ("alpha", "base"), ("both", "client-2"), ("boss", "client-0"), ("both", "nobody")):
        with pytest.raises(openai.NotFoundError) as raised:
            text(locked.client(SECRETS[key]), model)
        assert raised.value.body == {  # the same for what is not there and what is not one's own
            "message": f"the model '{model}' does not exist",
            "type": "invalid_request_error",
            "param": None,
            "code": "model_not_found",
        }
    for key in ("wrong", "x" * 5000):
        found = locked.post("/v1/completions", {"model": "client-0", "prompt": "red"}, key)
        assert found.status_code == 401 and found.headers["www-authenticate"] == "Bearer"
    assert httpx.get(f"{locked.url}/v1/models").status_code == 401


def test_only_an_administrator_loads_and_unloads(locked: Running) -> None:
    told = {"lora_name": "client-0"}
    assert locked.post("/v1/unload_lora_adapter", told, SECRETS["both"]).status_code == 403
    assert locked.post("/v1/unload_lora_adapter", told, SECRETS["boss"]).status_code == 200
    with pytest.raises(openai.NotFoundError):
        text(locked.client(SECRETS["both"]), "client-0")
    assert locked.post("/v1/unload_lora_adapter", told, SECRETS["boss"]).status_code == 404
    assert locked.post("/v1/load_lora_adapter", told, SECRETS["boss"]).status_code == 200
    assert text(locked.client(SECRETS["both"]), "client-0")
    for name in ("nobody", "../run", "/etc/passwd"):
        assert locked.post("/v1/load_lora_adapter", {"lora_name": name}, SECRETS["boss"]).status_code == 404
    path = {"lora_name": "client-0", "lora_path": "/etc"}
    assert locked.post("/v1/load_lora_adapter", path, SECRETS["boss"]).status_code == 400


def test_a_key_may_ask_so_often_and_not_more(locked: Running) -> None:
    client = locked.client(SECRETS["slow"])
    assert text(client, "client-0") and text(client, "client-1")
    with pytest.raises(openai.RateLimitError) as raised:
        text(client, "client-0")
    assert 1 <= int(raised.value.response.headers["retry-after"]) <= 60


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"prompt": "red"}, 400, "model: Field required"),
        ({"model": "base"}, 400, "prompt: Field required"),
        ({"model": "base", "prompt": ""}, 400, "prompt: has no tokens; write something"),
        ({"model": "base", "prompt": "red", "temperature": -1}, 400, "temperature: "),
        ({"model": "base", "prompt": "red", "best_of": 3}, 400, "best_of: Extra inputs are not permitted"),
        ({"model": "base", "prompt": "red", "n": 1000}, 400, "n: "),
        ({"model": "base", "prompt": [99999]}, 400, "prompt: holds a token that is none of the model's"),
        (
            {"model": "base", "prompt": "red " * 100},
            400,
            "tokens of prompt and 1 of answer: an answer may have 40 tokens, and both",
        ),
        ({"model": "base", "prompt": "red", "max_tokens": 41}, 400, "an answer may have 40 tokens"),
        ({"model": "nobody", "prompt": "red"}, 404, "the model 'nobody' does not exist"),
        ({"model": "../run", "prompt": "red"}, 404, "does not exist"),
        ({"model": "base", "prompt": "red " * 300_000}, 413, "the body is longer than 1048576 bytes; ask for less"),
    ],
)
def test_what_cannot_be_asked_is_answered_by_a_sentence(running: Running, body: Any, status: int, said: str) -> None:
    found = running.post("/v1/completions", body)
    assert found.status_code == status and said in found.json()["error"]["message"]
    assert str(running.shop.run) not in found.text and "Traceback" not in found.text
    assert running.quiet() and text(running.client(), "base")


def test_bodies_that_are_no_json_and_paths_that_are_none(running: Running) -> None:
    for content in (b"", b"{", b"\xff\xfe", b"[]", b'{"model": "base", "prompt": "\\ud800"}'):
        found = httpx.post(f"{running.url}/v1/completions", content=content, headers={"content-type": "application/json"})
        assert found.status_code == 400 and found.json()["error"]["message"], content
    found = httpx.get(f"{running.url}/v1/nothing")
    assert found.status_code == 404 and found.json()["error"]["code"] == "not_found"
    assert httpx.get(f"{running.url}/v1/completions").status_code == 405


def test_an_adapter_that_is_torn_harms_nobody_and_tells_nothing(running: Running) -> None:
    core = running.shop.run / "adapters" / "client-1" / "v0001" / adapters.CORE_FILE
    core.write_bytes(b"torn")
    with pytest.raises(openai.InternalServerError) as raised:
        text(running.client(), "client-1")
    assert raised.value.status_code == 503 and "log" in str(raised.value) and str(running.shop.run) not in str(raised.value)
    assert text(running.client(), "client-0")


def test_whoever_hangs_up_frees_what_he_used(running: Running) -> None:
    async def hang_up() -> None:
        body = {"model": "client-0", "prompt": WORDS, "max_tokens": 40, "stream": True}
        url = f"{running.url}/v1/completions"
        async with httpx.AsyncClient() as client, client.stream("POST", url, json=body) as response:
            async for _ in response.aiter_bytes():
                break

    for _ in range(5):
        asyncio.run(hang_up())
    assert running.quiet()
    assert text(running.client(), "client-0")


def test_where_all_are_busy_one_is_told_when_to_come_back(shop: Shop) -> None:
    running = Running(shop, limits=Limits(1, 16, 1024, 1))
    try:
        found: list[httpx.Response] = []
        body = {"model": "client-0", "prompt": WORDS, "max_tokens": 40, "temperature": 0}
        threads = [threading.Thread(target=lambda: found.append(running.post("/v1/completions", body))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        states = [each.status_code for each in found]
        assert set(states) <= {200, 503} and 200 in states
        assert all(each.headers["retry-after"] == "1" for each in found if each.status_code == 503)
        assert running.quiet()
    finally:
        running.close()


def test_health_readiness_and_figures(running: Running) -> None:
    client = running.client()
    text(client, "client-0")
    with pytest.raises(openai.NotFoundError):
        text(client, "nobody")
    assert httpx.get(f"{running.url}/health").status_code == httpx.get(f"{running.url}/ready").status_code == 200
    told = httpx.get(f"{running.url}/metrics").text
    assert 'fedsb_serve_requests_total{path="/v1/completions",status="200"} 1.0' in told
    assert 'fedsb_serve_requests_total{path="/v1/completions",status="404"} 1.0' in told
    assert 'fedsb_serve_tokens_total{kind="answer"} 6.0' in told and "fedsb_serve_adapters_loaded 1.0" in told
    assert "client-0" not in told and "nobody" not in told
    running.engine.close()
    assert httpx.get(f"{running.url}/health").status_code == httpx.get(f"{running.url}/ready").status_code == 503


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "has no keys; make one with"),
        ("[[key]]\nname = 'x'", "key.0.sha256 is missing; set it"),
        ("[[key]]\nname = 'x'\nsha256 = 'abc'", "key.0.sha256 = 'abc' will not do: string should match pattern"),
        ("[[key]]\nname = 'x'\nsha256 = '{0}'\nmore = 1".replace("{0}", "a" * 64), "key.0.more is not a setting"),
        (f"[[key]]\nname = 'x'\nsha256 = '{'a' * 64}'\n" * 2, "has a key twice"),
        ("[[key", "is not valid TOML"),
    ],
)
def test_key_files_that_are_wrong(content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "keys.toml").write_text(content)
    with pytest.raises(ConfigError, match=said):
        Keys(tmp_path / "keys.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        Keys(tmp_path / "missing.toml")
