"""The resident trainer, a process behind its socket: the answers of this process, one job at a time, back after a crash."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from prometheus_client import CollectorRegistry, generate_latest
from starlette.applications import Starlette

from clients import answers, app, relay
from clients.ask import SOCKET, UnixConnection, ask
from clients.relay import TrainerRelay
from clients.session import open_session
from clients.worker import trainer_app
from fedsb.errors import PolicyError, TrainerError
from server.local_grid import node_configs
from strategies.envelope import to_bytes
from strategies.records import ARRAYS, PREPARE, TRAIN, Identity, Order, order_message, pack_state, shared_versions, unpack_state
from tests.federation.tiny import config_of, save_model, save_task, table

ROOT = Path(__file__).parents[2]
START = Callable[..., subprocess.Popen[bytes]]
PLACE = ("--name", "client-1", "--index", "1", "--sites", "3")
SECONDS = 120.0  # longest wait for an answer
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("site")
    return config_of(table(save_model(folder / "model"), save_task(folder / "words"))).to_json()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "trainer.sock"


@pytest.fixture
def start(path: Path, tmp_path: Path) -> Iterator[START]:
    running: list[subprocess.Popen[bytes]] = []

    def begin(*who: str) -> subprocess.Popen[bytes]:
        options = ["--socket", str(path), "--home", str(tmp_path / "home"), *(who or PLACE)]
        with (tmp_path / "log").open("ab") as log:
            command = [sys.executable, "-m", "fedsb.cli.main", "trainer", *options]
            running.append(subprocess.Popen(command, cwd=ROOT, stderr=log))
        return running[-1]

    yield begin
    for process in running:
        process.kill()
        process.wait()


def question(run: str, kind: str, basis: str, size: int = 0) -> Message:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 0, 0, 1
    state = pack_state(torch.zeros(size), "fp32") if size else None
    message = order_message(3, kind, Order(run, 1 if size else 0, basis), state)
    message.metadata.__dict__["_message_id"] = "1"
    return message


def slow_run(run: str) -> str:
    """The same with training of several seconds."""
    long = json.loads(run)
    long["train"]["steps"] = 400
    return json.dumps(long)


def prepared(path: Path, run: str) -> tuple[str, int]:
    """Fingerprint of the basis, and size of a state."""
    reply = ask(path, PREPARE, question(run, PREPARE, "?").content, SECONDS)
    return str(reply["identity"]["basis"]), open_session(run).layout.size


def test_it_answers_as_this_process_would(start: START, path: Path, run: str, tmp_path: Path) -> None:
    start()
    basis, size = prepared(path, run)
    message = question(run, TRAIN, basis, size)
    there = ask(path, TRAIN, message.content, SECONDS)
    node = node_configs(["client-0", "client-1", "client-2"], str(tmp_path / "here"))[1]
    answers.answer(PREPARE, question(run, PREPARE, basis).content, node)
    here = answers.answer(TRAIN, message.content, node)
    assert torch.equal(unpack_state(there[ARRAYS]), unpack_state(here[ARRAYS]))
    assert unpack_state(there[ARRAYS]).any()
    assert there["metrics"]["loss"] == here["metrics"]["loss"]
    assert dict(there["identity"]) == dict(here["identity"])


def test_the_flower_app_passes_questions_on(start: START, path: Path, run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the site is who its trainer says, whatever the message's context claims."""
    start()
    monkeypatch.setenv(SOCKET, str(path))
    monkeypatch.setattr(answers, "answer", lambda *_: pytest.fail("answered in this process"))
    claims = {"name": "somebody-else", "partition-id": 0, "num-partitions": 3}
    context = Context(run_id=0, node_id=3, node_config=claims, state=RecordDict(), run_config={})
    reply = app.app(question(run, PREPARE, "?"), context)
    assert Identity.of(reply).client == "client-1"


def test_the_flower_app_imports_no_torch() -> None:
    script = "import sys, clients.app; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def ask_slowly(path: Path, run: str, basis: str, size: int) -> tuple[threading.Thread, list[RecordDict]]:
    """Ask for training of several seconds, in a thread; it is at work when this returns, and its answer will be in the list."""
    slow, found = slow_run(run), list[RecordDict]()
    ask(path, PREPARE, question(slow, PREPARE, basis).content, SECONDS)
    asking = threading.Thread(target=lambda: found.append(ask(path, TRAIN, question(slow, TRAIN, basis, size).content, SECONDS)))
    asking.start()
    while not _health(path)["jobs"]:
        time.sleep(0.01)
    return asking, found


def test_killed_in_a_job_it_is_asked_again_when_it_is_back(start: START, path: Path, run: str) -> None:
    process = start()
    basis, size = prepared(path, run)
    asking, found = ask_slowly(path, run, basis, size)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    start()
    asking.join(timeout=60)
    assert found and unpack_state(found[0][ARRAYS]).any()


def test_a_trainer_is_not_waited_for_without_end(start: START, path: Path, run: str) -> None:
    """And a question that nobody waits for any more is dropped, so that a slow site does not fall ever further behind."""
    start()
    basis, size = prepared(path, run)
    asking, found = ask_slowly(path, run, basis, size)
    for _ in range(2):
        with pytest.raises(TrainerError, match=r"trainer.sock did not answer train in 0.2 s; see its log"):
            ask(path, TRAIN, question(run, TRAIN, basis, size).content, 0.2)
    assert not found
    asking.join(timeout=60)
    assert found
    while _health(path)["jobs"]:
        time.sleep(0.01)
    told = _told(TrainerRelay(path, print))
    assert (told[_jobs(TRAIN, "answered")], told[_jobs(TRAIN, "dropped")]) == (1, 2)
    assert told["fedsb_trainer_jobs_waiting"] == 0


def test_one_job_at_a_time_and_all_are_done(start: START, path: Path, run: str) -> None:
    start()
    basis, size = prepared(path, run)
    found: list[RecordDict] = []
    threads = [
        threading.Thread(target=lambda: found.append(ask(path, TRAIN, question(run, TRAIN, basis, size).content, SECONDS)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len({unpack_state(reply[ARRAYS]).numpy().tobytes() for reply in found}) == 1 and len(found) == 4


@pytest.mark.parametrize(
    ("kind", "content", "said"),
    [
        ("train.everything", {}, "is asked query.sketch, query.prepare, train"),
        (
            TRAIN,
            {"config": {"run": "{}", "round": 1, "basis": "x", "which": "", "versions": shared_versions(), "members": 0}},
            "is missing; set it",
        ),
        (TRAIN, {"config": {"round": 1}}, "lacks run"),
        (TRAIN, {}, "lacks config"),
    ],
)
def test_what_it_cannot_answer_it_says_in_one_sentence(
    start: START, path: Path, kind: str, content: dict[str, Any], said: str
) -> None:
    start()
    records = RecordDict({name: ConfigRecord(record) for name, record in content.items()})
    with pytest.raises(TrainerError, match=said):
        ask(path, kind, records, SECONDS)
    assert _health(path) == {"site": "client-1", "jobs": []}


def test_a_site_with_own_data_needs_no_place_and_says_what_it_lacks(start: START, path: Path, run: str, tmp_path: Path) -> None:
    """The server is told the folder as the configuration words it, and no row; the site's log says all."""
    content, folder = json.loads(run), tmp_path / "data" / "delta"
    content["data"] |= {"partition": "own", "tasks": [{"name": "words", "source": f"jsonl:{tmp_path}/data/{{client}}"}]}
    own = json.dumps(content)
    start("--name", "delta")
    with pytest.raises(TrainerError, match=f"^{folder}: there is no such folder; a jsonl: task is a folder with train.jsonl"):
        ask(path, PREPARE, question(own, PREPARE, "?").content, SECONDS)
    said = (tmp_path / "log").read_text()
    assert f"query.prepare was refused: {folder}: there is no such folder" in said and f"working folder {ROOT}" in said
    save_task(folder)
    basis = str(ask(path, PREPARE, question(own, PREPARE, "?").content, SECONDS)["identity"]["basis"])
    (folder / "train.jsonl").write_text('{"text": "red", "label": "low"}\n')
    (folder / "test.jsonl").write_text('{"text": "a private text", "label": "and a private label"}\n')
    content["name"] = "another"
    with pytest.raises(TrainerError) as caught:
        ask(path, PREPARE, question(json.dumps(content), PREPARE, basis).content, SECONDS)
    assert f"{folder}/test.jsonl:1: label …" in str(caught.value) and "private" not in str(caught.value)
    assert "and a private label" in (tmp_path / "log").read_text()


def test_a_name_that_is_none_is_refused_when_the_trainer_starts(start: START, tmp_path: Path) -> None:
    assert start("--name", "../delta").wait(timeout=60) == 2
    assert "fedsb: '../delta' is no name of a site" in (tmp_path / "log").read_text()


def test_a_trainer_that_is_away_is_named(path: Path) -> None:
    with pytest.raises(TrainerError, match=r"no trainer answers at .*trainer.sock .* start it with `fedsb trainer`"):
        ask(path, TRAIN, RecordDict(), SECONDS, wait_seconds=0.3)


def test_a_file_at_the_place_of_the_socket_stays(start: START, path: Path) -> None:
    path.write_text("precious")
    assert start().wait(timeout=60) == 2
    assert path.read_text() == "precious"


def test_two_trainers_do_not_share_a_socket(start: START, path: Path) -> None:
    start()
    _health(path)
    second = start()
    assert second.wait(timeout=60) == 2
    assert _health(path)["site"] == "client-1"


def test_a_trainer_counts_its_jobs(start: START, path: Path, run: str, tmp_path: Path) -> None:
    """As Prometheus is told by the relay, which has a network; and while the trainer is away, that it is."""
    said: list[str] = []
    collector = TrainerRelay(path, said.append)
    assert _told(collector) == {"fedsb_trainer_up": 0}
    process = start()
    basis, size = prepared(path, run)
    for _ in range(2):
        ask(path, TRAIN, question(run, TRAIN, basis, size).content, SECONDS)
    for kind in (TRAIN, "train.everything", "train.nothing"):
        with pytest.raises(TrainerError):
            ask(path, kind, RecordDict(), SECONDS)
    told = _told(collector)
    jobs = {name: value for name, value in told.items() if name.startswith("fedsb_trainer_jobs_total") and value}
    assert jobs == {
        _jobs(PREPARE, "answered"): 1,
        _jobs(TRAIN, "answered"): 2,
        _jobs(TRAIN, "refused"): 1,
        _jobs("other", "refused"): 2,
    }
    assert _jobs("evaluate", "failed") in told  # 0 from the start, so that the first is seen as a rise
    assert told[f'fedsb_trainer_job_seconds_count{{kind="{TRAIN}"}}'] == 3
    assert 0 < told[f'fedsb_trainer_job_seconds_sum{{kind="{TRAIN}"}}'] < 60
    assert told["fedsb_trainer_up"] == 1 and told["fedsb_trainer_jobs_running"] == told["fedsb_trainer_jobs_waiting"] == 0
    assert told["process_resident_memory_bytes"] > 50e6
    process.kill()
    process.wait()
    for _ in range(2):
        assert _told(collector) == {"fedsb_trainer_up": 0}
    assert len(said) == 2 and all(str(path) in sentence for sentence in said)


def test_jobs_that_wait_and_fail_are_counted_for_each_trainer_alone(path: Path) -> None:
    """In this process, with answers that wait, refuse and break."""
    released, at_work = threading.Event(), threading.Event()

    def answer(kind: str, content: RecordDict, node: Any) -> RecordDict:
        if kind == TRAIN:
            at_work.set()
            assert released.wait(60)
            return content
        if kind == PREPARE:
            raise PolicyError("is not allowed here")
        raise RuntimeError("a defect")

    async def met() -> None:
        mine, other = _client(trainer_app({"name": "mine"}, answer)), _client(trainer_app({"name": "other"}))
        body = to_bytes(RecordDict())
        asked = [asyncio.create_task(mine.post(f"/answer/{TRAIN}", content=body)) for _ in range(3)]
        async with asyncio.timeout(60):
            while not at_work.is_set() or _figures((await mine.get("/metrics")).text)["fedsb_trainer_jobs_waiting"] < 2:
                await asyncio.sleep(0.01)
        assert _figures((await mine.get("/metrics")).text)["fedsb_trainer_jobs_running"] == 1
        released.set()
        assert [reply.status_code for reply in await asyncio.gather(*asked)] == [200] * 3
        assert (await mine.post(f"/answer/{PREPARE}", content=body)).status_code == 422
        with pytest.raises(RuntimeError, match="a defect"):
            await mine.post("/answer/evaluate", content=body)
        told, others = _figures((await mine.get("/metrics")).text), _figures((await other.get("/metrics")).text)
        found = [told[_jobs(*each)] for each in ((TRAIN, "answered"), (PREPARE, "refused"), ("evaluate", "failed"))]
        assert found == [3, 1, 1] and told["fedsb_trainer_jobs_waiting"] == told["fedsb_trainer_jobs_running"] == 0
        assert others[_jobs(TRAIN, "answered")] == 0

    asyncio.run(met())


@pytest.mark.parametrize(
    "answer", [b"", b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n", b"nonsense\r\n\r\n", OK + b"fedsb_x {"]
)
def test_who_does_not_tell_its_figures_is_away(path: Path, answer: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer that hangs, an older one, and what is none."""
    monkeypatch.setattr(relay, "SECONDS", 0.5)
    said: list[str] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        serving = threading.Thread(target=_answer_once, args=[listener, answer])
        serving.start()
        assert _told(TrainerRelay(path, said.append)) == {"fedsb_trainer_up": 0}
        serving.join(60)
    assert len(said) == 1 and said[0].startswith(f"the trainer at {path} does not tell its figures (")


def _client(served: Starlette) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(served), base_url="http://trainer")


def _answer_once(listener: socket.socket, answer: bytes) -> None:
    connection, _ = listener.accept()
    with connection:
        connection.recv(1000)
        if answer:
            connection.sendall(answer)
        else:
            connection.recv(1000)  # until who asks gives up


def _told(collector: TrainerRelay) -> dict[str, float]:
    registry = CollectorRegistry()
    registry.register(collector)
    return _figures(generate_latest(registry).decode())


def _figures(text: str) -> dict[str, float]:
    """Prometheus's text format: series → value."""
    lines = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
    return {series: float(value) for series, value in lines}


def _jobs(kind: str, outcome: str) -> str:
    return f'fedsb_trainer_jobs_total{{kind="{kind}",outcome="{outcome}"}}'


def _health(path: Path) -> dict[str, Any]:
    deadline = time.monotonic() + 60
    while True:
        connection = UnixConnection(path)
        try:
            connection.request("GET", "/health")
            answer: dict[str, Any] = json.loads(connection.getresponse().read())
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        else:
            return answer
        finally:
            connection.close()
