"""Federations that refresh their basis: one core a turn goes up, those so far go down, and nothing else changes."""

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message

from clients.session import Session
from fedsb.adapters.attach import layout_of
from fedsb.adapters.state import HEAD, State
from fedsb.cli.evaluate import evaluate_run
from fedsb.config import RunConfig
from fedsb.errors import ConfigError
from fedsb.store.tensors import load_tensors
from strategies.records import ARRAYS, EVALUATE, PERSONALISE, TRAIN, pack_state, unpack_state
from strategies.shares import Shares
from tests.federation.tiny import classification, config_of, equal, events, federate, final_state, personal_states, table
from tests.federation.twisted import killed, twisted

ROUNDS = {"rounds": 4}
TWO = {"method": "refreshed-sb", "heads": 2}


def config(llama: str, words: str, **sections: Any) -> RunConfig:
    return config_of(table(llama, words, **{"adapter": TWO, "federation": ROUNDS, **sections}))


def state_after(run: Path, server_round: int) -> State:
    return load_tensors(run / "checkpoints" / f"round-{server_round:04d}" / "state.safetensors")[0]


@pytest.mark.parametrize(
    ("heads", "rounds", "turns"),
    [(2, 4, [0, 0, 1, 1, 1, 1]), (3, 5, [0, 0, 1, 1, 2, 2]), (4, 4, [0, 1, 2, 3, 3]), (None, 2, [0, 1]), (1, 3, [0, 0, 0])],
)
def test_the_rounds_are_dealt_to_the_cores(heads: int | None, rounds: int, turns: list[int], llama: str, words: str) -> None:
    adapter = {"method": "refreshed-sb"} | ({"heads": heads} if heads else {})
    run = config(llama, words, adapter=adapter, federation={"rounds": rounds})
    assert [run.turn(number + 1) for number in range(len(turns))] == turns


def test_each_core_learns_in_its_turn_and_stays_as_it_is_afterwards(llama: str, words: str, tmp_path: Path) -> None:
    summary = federate(config(llama, words), tmp_path)
    assert not events(tmp_path, "refused") and summary["aggregation_error"] < 1e-6
    second, last = state_after(tmp_path, 2), final_state(tmp_path)
    for name in last:
        assert second[name][0].any() and not second[name][1].any()
        assert torch.equal(last[name][0], second[name][0]) and last[name][1].any()
    for state in personal_states(tmp_path).values():
        assert all(torch.equal(state[name][0], last[name][0]) for name in last) and not equal(state, last)


def test_one_core_goes_up_and_those_so_far_come_down(bert: str, labels: str, tmp_path: Path) -> None:
    """The classifier's head, which is in no core, goes both ways in every round."""
    run = config_of(classification(bert, labels, adapter=TWO, federation=ROUNDS))
    asked: dict[str, list[int]] = {TRAIN: [], PERSONALISE: [], EVALUATE: []}
    replied: dict[str, list[int]] = {TRAIN: [], PERSONALISE: []}

    def note(found: dict[str, list[int]], message: Message) -> None:
        if message.metadata.message_type in found:
            found[message.metadata.message_type].append(unpack_state(message.content[ARRAYS]).numel())

    def listen(kind: str, client: int, reply: Message) -> list[Message]:
        note(replied, reply)
        return [reply]

    grid = twisted(run, tmp_path, listen)
    push = grid.push_messages

    def seen(messages: Iterable[Message]) -> list[str]:
        outgoing = list(messages)
        for message in outgoing:
            note(asked, message)
        return push(outgoing)

    grid.push_messages = seen  # type: ignore[method-assign]
    federate(run, tmp_path, grid=grid)
    state = final_state(tmp_path)
    one = sum(t[0].numel() for name, t in state.items() if not name.startswith(HEAD))
    head = sum(t.numel() for name, t in state.items() if name.startswith(HEAD))
    assert head and replied[TRAIN] == [one + head] * 4 * run.federation.clients
    early, late = ([cores * one + head] * 2 * run.federation.clients for cores in (1, 2))
    assert asked[TRAIN] == early + late
    assert set(asked[PERSONALISE]) == set(asked[EVALUATE]) == set(replied[PERSONALISE]) == {2 * one + head}


def test_a_run_that_is_not_over_is_scored(llama: str, words: str, tmp_path: Path) -> None:
    """Its newest state has cores whose turn has not come."""
    killed(config(llama, words), tmp_path, 1)
    scores = evaluate_run(tmp_path)
    assert scores["global"].keys() == {"client-0", "client-1", "client-2"} and scores["global"] != scores["base"]


def test_what_goes_out_is_made_once_for_all(llama: str, words: str) -> None:
    run = config(llama, words)
    layout = layout_of(Session(run).model)
    shares, state = Shares(run, layout), pack_state(torch.zeros(layout.size), "fp32")
    one, other = (shares.sent_to(client, state, 1) for client in ("client-0", "client-1"))
    assert one is other and one is not shares.sent_to("client-0", state, 3)


def test_the_tuner_alone_knows_the_format() -> None:
    """What the card of an exported adapter says must be imported, in a process that has imported nothing else."""
    told = "import fedsb.adapters.tuner; from fedsb.adapters.lora_sb import LoraSbConfig; print(*LoraSbConfig.kinds)"
    kinds = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True).stdout.split()
    assert {"ravan", "nested-sb", "lora-xs", "refreshed-sb"} <= set(kinds)


@pytest.mark.parametrize(
    ("sections", "complaint"),
    [
        ({"adapter": TWO | {"heads": 5}}, "adapter.heads = 5 are trained one after another.*rounds = 4; lower"),
        ({"strategy": {"name": "fedadam"}}, 'trains one head a round, and strategy.name = "fedadam".*fedavg or fedprox'),
        ({"strategy": {"name": "median"}, "federation": ROUNDS | {"weighting": "uniform", "min_clients": 3}}, "one head a round"),
        ({"privacy": {"secure_sum": True}, "federation": ROUNDS | {"weighting": "uniform"}}, "secure_sum .* leave both out"),
        (
            {"privacy": {"unit": "client", "epsilon": 8.0}, "federation": ROUNDS | {"weighting": "uniform"}},
            "are about all of them",
        ),
    ],
)
def test_what_it_cannot_be_combined_with_is_refused(sections: dict[str, Any], complaint: str, llama: str, words: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        config(llama, words, **sections)


def test_under_privacy_by_record_noise_moves_the_core_in_turn_alone(llama: str, words: str, tmp_path: Path) -> None:
    privacy = {"unit": "record", "noise_multiplier": 1.0, "clip_norm": 1.0}
    federate(config(llama, words, privacy=privacy, federation=ROUNDS | {"weighting": "uniform"}), tmp_path)
    second, last = state_after(tmp_path, 2), final_state(tmp_path)
    for name in last:
        assert second[name][0].any() and not second[name][1].any() and torch.equal(last[name][0], second[name][0])
