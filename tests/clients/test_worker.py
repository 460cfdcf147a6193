"""The resident trainer, a process behind its socket: the answers of this process, one job at a time, back after a crash."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from clients import answers, app
from clients.ask import SOCKET, UnixConnection, ask
from clients.session import open_session
from fedsb.errors import TrainerError
from server.local_grid import node_configs
from strategies.records import ARRAYS, PREPARE, TRAIN, Identity, Order, order_message, pack_state, unpack_state
from tests.federation.tiny import config_of, save_model, save_task, table

ROOT = Path(__file__).parents[2]
START = Callable[..., subprocess.Popen[bytes]]
PLACE = ("--name", "client-1", "--index", "1", "--sites", "3")


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


def prepared(path: Path, run: str) -> tuple[str, int]:
    """Fingerprint of the basis, and size of a state."""
    reply = ask(path, PREPARE, question(run, PREPARE, "?").content)
    return str(reply["identity"]["basis"]), open_session(run).layout.size


def test_it_answers_as_this_process_would(start: START, path: Path, run: str, tmp_path: Path) -> None:
    start()
    basis, size = prepared(path, run)
    message = question(run, TRAIN, basis, size)
    there = ask(path, TRAIN, message.content)
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


def test_killed_in_a_job_it_is_asked_again_when_it_is_back(start: START, path: Path, run: str) -> None:
    process = start()
    basis, size = prepared(path, run)
    long = json.loads(run)
    long["train"]["steps"] = 400
    slow, found = json.dumps(long), []
    ask(path, PREPARE, question(slow, PREPARE, basis).content)
    asking = threading.Thread(target=lambda: found.append(ask(path, TRAIN, question(slow, TRAIN, basis, size).content)))
    asking.start()
    while not _health(path)["jobs"]:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    start()
    asking.join(timeout=60)
    assert found and unpack_state(found[0][ARRAYS]).any()


def test_one_job_at_a_time_and_all_are_done(start: START, path: Path, run: str) -> None:
    start()
    basis, size = prepared(path, run)
    found: list[RecordDict] = []
    threads = [
        threading.Thread(target=lambda: found.append(ask(path, TRAIN, question(run, TRAIN, basis, size).content)))
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
        ("train.everything", {}, "is asked query.prepare, train"),
        (TRAIN, {"config": {"run": "{}", "round": 1, "basis": "x", "which": ""}}, "is missing; set it"),
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
        ask(path, kind, records)
    assert _health(path) == {"site": "client-1", "jobs": []}


def test_a_site_with_own_data_needs_no_place_and_says_what_it_lacks(start: START, path: Path, run: str, tmp_path: Path) -> None:
    """The server is told the folder as the configuration words it, and no row; the site's log says all."""
    content, folder = json.loads(run), tmp_path / "data" / "delta"
    content["data"] |= {"partition": "own", "tasks": [{"name": "words", "source": f"jsonl:{tmp_path}/data/{{client}}"}]}
    own = json.dumps(content)
    start("--name", "delta")
    with pytest.raises(TrainerError, match=f"^{folder}: there is no such folder; a jsonl: task is a folder with train.jsonl"):
        ask(path, PREPARE, question(own, PREPARE, "?").content)
    said = (tmp_path / "log").read_text()
    assert f"query.prepare was refused: {folder}: there is no such folder" in said and f"working folder {ROOT}" in said
    save_task(folder)
    basis = str(ask(path, PREPARE, question(own, PREPARE, "?").content)["identity"]["basis"])
    (folder / "train.jsonl").write_text('{"text": "red", "label": "low"}\n')
    (folder / "test.jsonl").write_text('{"text": "a private text", "label": "and a private label"}\n')
    content["name"] = "another"
    with pytest.raises(TrainerError) as caught:
        ask(path, PREPARE, question(json.dumps(content), PREPARE, basis).content)
    assert f"{folder}/test.jsonl:1: label …" in str(caught.value) and "private" not in str(caught.value)
    assert "and a private label" in (tmp_path / "log").read_text()


def test_a_name_that_is_none_is_refused_when_the_trainer_starts(start: START, tmp_path: Path) -> None:
    assert start("--name", "../delta").wait(timeout=60) == 2
    assert "fedsb: '../delta' is no name of a site" in (tmp_path / "log").read_text()


def test_a_trainer_that_is_away_is_named(path: Path) -> None:
    with pytest.raises(TrainerError, match=r"no trainer answers at .*trainer.sock .* start it with `fedsb trainer`"):
        ask(path, TRAIN, RecordDict(), wait_seconds=0.3)


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
