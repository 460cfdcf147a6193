"""Whole federations under a secure sum: the plain result within its bound, whoever drops out, and nothing else for the server."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message

from clients import secure
from fedsb.config import RunConfig
from fedsb.errors import ConfigError, FederationError
from fedsb.store.ledger import NAME, Ledger
from strategies.records import ARRAYS, EVALUATE, METRICS, PERSONALISE, PREPARE, TRAIN
from strategies.sums import ADVERTISE, PAYLOAD, REVEAL, SHARE, fixed_point_of
from tests.federation.tiny import config_of, events, federate, final_state, local_grid, personal_states, table
from tests.federation.twisted import Twisted, failure, twisted

CLIENTS = 5
STAGES = [ADVERTISE, SHARE, TRAIN, REVEAL]


def config(llama: str, words: str, federation: dict[str, Any] | None = None, **privacy: Any) -> RunConfig:
    section = {"clients": CLIENTS, "rounds": 2, "weighting": "uniform"} | (federation or {})
    return config_of(table(llama, words, federation=section, privacy={"secure_sum": True} | privacy))


def plain(run: RunConfig, folder: Path, lost: dict[int, set[int]] | None = None) -> dict[str, torch.Tensor]:
    """The final state without a secure sum; in the rounds of `lost` without those clients."""
    content = run.model_dump(mode="json", exclude_none=True)
    content["privacy"]["secure_sum"] = False

    def drop(kind: str, client: int, reply: Message) -> list[Message]:
        gone = kind == TRAIN and client in (lost or {}).get(int(str(reply.content["identity"]["round"])), set())
        return [failure(reply)] if gone else [reply]

    open_run = config_of(content)
    federate(open_run, folder, grid=twisted(open_run, folder, drop))
    return final_state(folder)


def distance(run: RunConfig, a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest difference, over what the rounds' sums may differ by."""
    largest = max(float((a[name] - b[name]).abs().max()) for name in a)
    rounds = range(1, run.federation.rounds + 1)
    return largest / sum(fixed_point_of(run, number, CLIENTS).mean_error for number in rounds)


def test_the_result_is_the_plain_one_within_the_bound(llama: str, words: str, tmp_path: Path) -> None:
    run = config(llama, words)
    summary = federate(run, tmp_path / "secure")
    found, expected = final_state(tmp_path / "secure"), plain(run, tmp_path / "plain")
    assert 0 < distance(run, found, expected) < 100  # of 1e-9: the second round trains from states that far apart
    assert [(e["asked"], e["summed"]) for e in events(tmp_path / "secure", "secure-sum")] == [(5, 5), (5, 5)]
    assert summary["aggregation_error"] is None and all(entry["loss"] > 0 for entry in summary["history"])
    assert summary["history"][0]["up"] > 4 * sum(tensor.numel() for tensor in found.values()) * CLIENTS


def test_the_server_sees_masked_words_and_no_single_update(llama: str, words: str, tmp_path: Path) -> None:
    """In no message of a round; and the personal cores, which nothing covers, stay where they are."""
    run, seen = config(llama, words), []

    def watch(kind: str, client: int, reply: Message) -> list[Message]:
        seen.append((kind, reply))
        return [reply]

    federate(run, tmp_path, grid=twisted(run, tmp_path, watch))
    kinds = [kind for kind, _ in seen]
    assert (
        kinds
        == [PREPARE] * 5 + [kind for _ in range(2) for kind in STAGES for _ in range(5)] + [PERSONALISE] * 5 + [EVALUATE] * 5
    )
    size = sum(tensor.numel() for tensor in final_state(tmp_path).values())
    for kind, reply in seen:
        if kind == TRAIN:
            assert list(reply.content[ARRAYS]) == [PAYLOAD]
            sent = np.frombuffer(reply.content[ARRAYS][PAYLOAD].data, "<u4")
            assert len(sent) == size
            bits = np.unpackbits(sent.view(np.uint8)).mean()
            assert abs(bits - 0.5) < 5 * 0.5 / np.sqrt(32 * size)
        elif kind == PERSONALISE:
            assert ARRAYS not in reply.content
        elif kind in STAGES:
            assert dict(reply.content[METRICS]) == {} and ARRAYS not in reply.content
    assert personal_states(tmp_path) == {} and len(events(tmp_path, "kept")) == 5


@pytest.mark.parametrize("stage", STAGES)
def test_a_client_that_drops_out_at_any_stage_costs_its_own_update_at_most(
    stage: str, llama: str, words: str, tmp_path: Path
) -> None:
    run = config(llama, words, {"rounds": 1})

    def lose(kind: str, client: int, reply: Message) -> list[Message]:
        return [failure(reply)] if kind == stage and client == 3 else [reply]

    federate(run, tmp_path / "secure", grid=twisted(run, tmp_path / "secure", lose))
    lost = {} if stage == REVEAL else {1: {3}}
    assert distance(run, final_state(tmp_path / "secure"), plain(run, tmp_path / "plain", lost)) < 1
    (told,) = events(tmp_path / "secure", "secure-sum")
    assert told["summed"] == (5 if stage == REVEAL else 4)
    assert {event["client"] for event in events(tmp_path / "secure", "refused")} == {"client-3"}


@pytest.mark.parametrize("stage", STAGES)
def test_with_too_few_left_the_round_fails_and_can_be_resumed(stage: str, llama: str, words: str, tmp_path: Path) -> None:
    run, broken = config(llama, words), [True]

    def lose(kind: str, client: int, reply: Message) -> list[Message]:
        at_it = reply.has_content() and int(str(reply.content["identity"]["round"])) == 2
        return [failure(reply)] if broken[0] and at_it and kind == stage and client > 2 else [reply]

    with pytest.raises(FederationError, match="round 2: .*--resume tries"):
        federate(run, tmp_path / "secure", grid=twisted(run, tmp_path / "secure", lose))
    broken[0] = False
    federate(run, tmp_path / "secure", grid=twisted(run, tmp_path / "secure", lose), resume=True)
    assert distance(run, final_state(tmp_path / "secure"), plain(run, tmp_path / "plain")) < 100


def test_a_client_whose_process_is_new_is_left_out_of_that_round_alone(llama: str, words: str, tmp_path: Path) -> None:
    run = config(llama, words)

    def forget(kind: str, client: int, reply: Message) -> list[Message]:
        if kind == SHARE and client == 1 and int(str(reply.content["identity"]["round"])) == 1:
            secure._members.pop((str(tmp_path / "sites" / "client-1"), run.digest()))
        return [reply]

    federate(run, tmp_path, grid=twisted(run, tmp_path, forget))
    assert [(e["asked"], e["summed"]) for e in events(tmp_path, "secure-sum")] == [(5, 4), (5, 5)]
    (reason,) = [event["reason"] for event in events(tmp_path, "refused")]
    assert "client-1 has no secrets for the secure sum of round 1: its process is a new one" in reason


def test_a_client_that_is_told_another_number_of_members_stops(llama: str, words: str, tmp_path: Path) -> None:
    """With more of them its part of the noise would be smaller."""
    run = config(llama, words, {"rounds": 1}, unit="client", noise_multiplier=1.0)

    class Lying(Twisted):
        def push_messages(self, messages: Iterable[Message]) -> list[str]:
            outgoing = list(messages)
            for message in outgoing:
                if message.metadata.message_type == TRAIN and message.metadata.dst_node_id == 3:
                    message.content["config"]["members"] = 500
            return super().push_messages(outgoing)

    grid = twisted(run, tmp_path, lambda *args: [args[2]])
    grid.__class__ = Lying
    federate(run, tmp_path, grid=grid)
    (reason,) = [event["reason"] for event in events(tmp_path, "refused")]
    assert "client-1 was told 500 members where its secrets are for another number" in reason
    assert not Ledger(tmp_path / "sites" / "client-1" / NAME, "client-1").entries()[:-1]  # only the round it was not heard in
    assert events(tmp_path, "secure-sum")[0]["summed"] == 4


def test_a_site_that_wants_secure_sums_alone_keeps_its_personal_core(llama: str, words: str, tmp_path: Path) -> None:
    """Also where noise by record would let it go: how much noise there is says the server's configuration."""
    run = config(llama, words, {"rounds": 1}, unit="record", noise_multiplier=1e-6)
    grid = local_grid(run, tmp_path)
    (tmp_path / "policy.toml").write_text("secure_sum_only = true\n")
    next(iter(grid._contexts.values())).node_config["policy"] = str(tmp_path / "policy.toml")
    federate(run, tmp_path / "run", grid=grid)
    assert set(personal_states(tmp_path / "run")) == {f"client-{i}" for i in range(1, 5)}


def test_what_is_no_answer_to_a_stage_is_refused_and_named(llama: str, words: str, tmp_path: Path) -> None:
    run = config(llama, words, {"rounds": 1})

    def spoil(kind: str, client: int, reply: Message) -> list[Message]:
        if kind == SHARE and client == 0:
            reply.content["secrets"][PAYLOAD].data = b"short"
        if kind == ADVERTISE and client == 1:
            del reply.content["secrets"]
        return [reply]

    with pytest.raises(FederationError, match="3 clients .* where its threshold is 4"):
        federate(run, tmp_path, grid=twisted(run, tmp_path, spoil))
    reasons = {event["client"]: event["reason"] for event in events(tmp_path, "refused")}
    assert "sent shares of 5 bytes" in reasons["client-0"] and "sent nothing for the secure sum" in reasons["client-1"]


def test_private_by_record_and_summed_in_secret(llama: str, words: str, tmp_path: Path) -> None:
    run = config(llama, words, unit="record", epsilon=20.0, clip_norm=0.5)
    federate(run, tmp_path)
    entries = Ledger(tmp_path / "sites" / "client-0" / NAME, "client-0").entries()
    assert [(entry.what, entry.round) for entry in entries] == [(TRAIN, 1), (TRAIN, 2), (PERSONALISE, 2)]
    assert len(personal_states(tmp_path)) == 5  # covered by their own noise


def test_private_by_client_with_noise_that_the_clients_add(llama: str, words: str, tmp_path: Path) -> None:
    """Each its part, so that three of the threshold's four give the whole: five add two thirds more variance."""
    few = config(llama, words, {"rounds": 1}, unit="client", noise_multiplier=40.0, clip_norm=0.5)
    run = config_of(few.model_dump(mode="json", exclude_none=True) | {"adapter": {"rank": 12}})
    federate(run, tmp_path)
    numbers = torch.cat([tensor.flatten() for tensor in final_state(tmp_path).values()])
    assert len(numbers) > 2000  # so that 10 % is more than six standard deviations of what is measured
    assert float(numbers.std()) == pytest.approx(40.0 * 0.5 / 5 * (5 / 3) ** 0.5, rel=0.1)
    assert personal_states(tmp_path) == {}


def test_privacy_by_client_hardly_noisy_is_the_mean_of_clipped_updates(llama: str, words: str, tmp_path: Path) -> None:
    run = config(llama, words, {"rounds": 1}, unit="client", noise_multiplier=1e-9, clip_norm=0.01)
    federate(run, tmp_path / "secure")
    expected = plain(run, tmp_path / "plain")
    found = final_state(tmp_path / "secure")
    assert all(torch.allclose(found[name], expected[name], atol=1e-7) for name in found)


@pytest.mark.parametrize(
    ("federation", "privacy", "said"),
    [
        ({"clients": 2}, {}, "privacy.secure_sum takes three clients or more"),
        ({"weighting": "examples"}, {}, 'needs federation.weighting = "uniform"'),
        ({"over_sample": 1.5, "fraction": 0.5}, {}, "federation.over_sample = 1"),
        ({"fraction": 0.5}, {"unit": "client", "epsilon": 1.0}, "needs federation.fraction = 1"),
    ],
)
def test_what_contradicts_a_secure_sum_is_refused(
    federation: dict[str, Any], privacy: dict[str, Any], said: str, llama: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        config(llama, words, federation, **privacy)


def test_a_round_that_asks_two_clients_is_refused(llama: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(FederationError, match="round 1: 2 clients are too few for privacy.secure_sum, which takes 3 or more"):
        federate(config(llama, words, {"fraction": 0.4}), tmp_path)
