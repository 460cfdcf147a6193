"""Whole federations with privacy: what leaves a client, what its ledger holds, and when it stops."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message

from clients.budget import fingerprint
from fedsb.config import RunConfig
from fedsb.errors import ConfigError, LedgerError, PrivacyError
from fedsb.privacy.accounting import Release, epsilon
from fedsb.privacy.mechanism import mechanism_of
from fedsb.store.files import read_json
from fedsb.store.ledger import NAME, Entry, Ledger, spent
from server.local_grid import LocalGrid
from strategies.records import ARRAYS, METRICS, PERSONALISE, TRAIN
from tests.federation.tiny import classification, config_of, events, federate, final_state, local_grid, personal_states, table
from tests.federation.twisted import twisted

UNIFORM = {"weighting": "uniform"}


def config(llama: str, words: str, federation: dict[str, Any] | None = None, **privacy: Any) -> RunConfig:
    section = {"unit": "record", "epsilon": 20.0, "clip_norm": 0.5, **privacy}
    return config_of(table(llama, words, federation=UNIFORM | (federation or {}), privacy=section))


def entries(out: Path, client: str = "client-0") -> list[Entry]:
    return Ledger(out / "sites" / client / NAME, client).entries()


def replies(grid: LocalGrid) -> list[Message]:
    """All replies that pass through a grid, as they will have passed when it is used."""
    found: list[Message] = []
    pull = grid.pull_messages

    def watched(ids: Any) -> Any:
        for reply in pull(ids):
            found.append(reply)
            yield reply

    grid.pull_messages = watched  # type: ignore[method-assign]
    return found


def test_a_run_by_record_is_in_every_ledger_and_within_its_epsilon(llama: str, words: str, tmp_path: Path) -> None:
    run = config(llama, words)
    summary = federate(run, tmp_path)
    for name in run.client_names:
        found = entries(tmp_path, name)
        assert [(entry.what, entry.round, entry.steps) for entry in found] == [
            (TRAIN, 1, 2),
            (TRAIN, 2, 2),
            (TRAIN, 3, 2),
            (PERSONALISE, 3, 2),
        ]
        assert {entry.config for entry in found} == {run.digest()} and {entry.unit for entry in found} == {"record"}
        count = found[0].records
        delta = 1 / max(2, count)
        cost = spent(found, delta).best
        assert 0.9 * 20 < cost <= 20.0
        assert cost == epsilon([Release(found[0].noise_multiplier, min(1.0, 4 / count), 8)], delta).best
    assert summary["privacy"] == {
        "unit": "record",
        "epsilon": 20.0,
        "delta": None,
        "accountant": None,
        "clients": dict.fromkeys(run.client_names, 3),
    }
    assert all(state.isfinite().all() for state in final_state(tmp_path).values())


def test_nothing_leaves_but_the_noisy_state(llama: str, words: str, tmp_path: Path) -> None:
    """No loss, no number of examples, no time, no score; and nowhere in what the server writes."""
    run = config(llama, words)
    grid = local_grid(run, tmp_path)
    seen = replies(grid)
    summary = federate(run, tmp_path, grid=grid)
    for reply in seen:
        if reply.metadata.message_type in (TRAIN, PERSONALISE):
            assert set(reply.content) == {"identity", METRICS, ARRAYS} and dict(reply.content[METRICS]) == {}
        assert reply.metadata.message_type != "evaluate"
    assert summary["evaluation"] == {"base": {}, "global": {}, "personal": {}}
    assert all(entry["loss"] is None for entry in summary["history"])
    for event in events(tmp_path, "reply") + events(tmp_path, "personal"):
        assert not event.keys() & {"loss", "examples"} and "seconds" not in event
    json.loads((tmp_path / "summary.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_scores_are_told_in_plain_only_where_the_run_says_so(llama: str, words: str, tmp_path: Path) -> None:
    summary = federate(config(llama, words, scores="plain"), tmp_path)
    assert set(summary["evaluation"]["personal"]) == {"client-0", "client-1", "client-2"}


def test_two_runs_of_one_seed_differ_since_noise_is_nobodys_to_know(llama: str, words: str, tmp_path: Path) -> None:
    states = []
    for name in ("a", "b"):
        federate(config(llama, words), tmp_path / name)
        states.append(final_state(tmp_path / name))
    assert all(not torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_classifier_trains_its_head_in_private_too(bert: str, labels: str, tmp_path: Path) -> None:
    section = {"unit": "record", "noise_multiplier": 0.8}
    run = config_of(classification(bert, labels, federation=UNIFORM, privacy=section))
    federate(run, tmp_path)
    assert {entry.noise_multiplier for entry in entries(tmp_path)} == {0.8}
    heads = [state for name, state in final_state(tmp_path).items() if name.startswith("head.")]
    assert heads and all(state.any() for state in heads)


def test_with_much_noise_the_state_is_noise_and_with_little_the_plain_one(llama: str, words: str, tmp_path: Path) -> None:
    """Full batches, so that only clipping and noise set the two apart."""
    train = {"steps": 2, "batch_size": 7}  # of the 7 that each client has
    plain = table(llama, words, federation=UNIFORM | {"rounds": 1}, train=train, data={"partition": "iid"})
    federate(config_of(plain), tmp_path / "plain")
    expected = final_state(tmp_path / "plain")
    distances = []
    for noise in (1e-9, 50.0):
        section = {"unit": "record", "noise_multiplier": noise, "clip_norm": 100.0}
        out = tmp_path / str(noise)
        federate(config_of(plain | {"privacy": section}), out)
        found = final_state(out)
        distances.append(float(torch.cat([(found[name] - expected[name]).flatten() for name in expected]).norm()))
    size = float(torch.cat([state.flatten() for state in expected.values()]).norm())
    assert distances[0] < 0.02 * size < 0.5 * size < distances[1]


def test_a_resumed_run_asks_again_and_pays_nothing_twice(llama: str, words: str, tmp_path: Path) -> None:
    """The server dies before it has heard the last client of round 2: the others' answers are the same, from their disks."""

    class Died(Exception):
        pass

    run = config(llama, words)

    def die(kind: str, client: int, reply: Message) -> list[Message]:
        if kind == TRAIN and reply.content["identity"]["round"] == 2 and client == 2 and not (tmp_path / "died").exists():
            (tmp_path / "died").touch()
            raise Died
        return [reply]

    with pytest.raises(Died):
        federate(run, tmp_path / "run", grid=twisted(run, tmp_path / "run", die))
    paid = {name: len(entries(tmp_path / "run", name)) for name in run.client_names}
    federate(run, tmp_path / "run", resume=True)
    assert paid == dict.fromkeys(run.client_names, 2)  # the third had paid as well when the server died
    for name in run.client_names:
        assert [entry.round for entry in entries(tmp_path / "run", name)] == [1, 2, 3, 3]


def cut_short(run: RunConfig, folder: Path, at: str) -> None:
    """A run whose server dies when client 2 has answered `at`."""

    class Died(Exception):
        pass

    def die(kind: str, client: int, reply: Message) -> list[Message]:
        if kind == at and client == 2:
            raise Died
        return [reply]

    with pytest.raises(Died):
        federate(run, folder, grid=twisted(run, folder, die))


def test_a_run_whose_budget_is_spent_can_still_be_resumed(llama: str, words: str, tmp_path: Path) -> None:
    """The server dies when all is paid for but not all has arrived; then once more when the run is over."""
    run = config(llama, words)
    cut_short(run, tmp_path / "run", PERSONALISE)
    paid = {name: entries(tmp_path / "run", name) for name in run.client_names}
    assert all(len(found) == 4 for found in paid.values())
    for _ in range(2):
        federate(run, tmp_path / "run", resume=True)
        assert len(personal_states(tmp_path / "run")) == 3 and not events(tmp_path / "run", "refused")
    assert paid == {name: entries(tmp_path / "run", name) for name in run.client_names}


def test_what_may_change_on_resume_is_not_in_the_question(llama: str, words: str, tmp_path: Path) -> None:
    """More strikes, other threads: the round that was lost is not paid again."""
    run = config(llama, words, {"rounds": 1})
    cut_short(run, tmp_path / "run", TRAIN)
    content = json.loads(run.to_json())
    content["federation"]["strikes"], content["federation"]["round_seconds"] = 9, 77.0
    federate(config_of(content), tmp_path / "run", resume=True)
    for name in run.client_names:
        assert [entry.what for entry in entries(tmp_path / "run", name)] == [TRAIN, PERSONALISE]


def test_a_client_stops_before_its_budget_is_crossed_and_the_run_goes_on(llama: str, words: str, tmp_path: Path) -> None:
    """Its ledger says that most was spent already in this run (a round paid for and lost, say)."""
    run = config(llama, words)
    federate(run, tmp_path / "first")
    before = entries(tmp_path / "first")
    again = tmp_path / "again"
    ledger = Ledger(tmp_path / "sites" / "client-0" / NAME, "client-0")
    for entry in before[:2]:
        ledger.add(entry)
    federate(run, again, grid=local_grid(run, tmp_path))
    reasons = [event["reason"] for event in events(again, "refused") if event["client"] == "client-0"]
    assert reasons and all(
        "where privacy.epsilon of this run = 20.0" in reason and "nothing is released" in reason for reason in reasons
    )
    assert len(ledger.entries()) == 4 and spent(ledger.entries(), 1 / max(2, before[0].records)).best <= 20.0
    assert "client-0" not in personal_states(again) and len(personal_states(again)) == 2


def policy_of(grid: LocalGrid, client: int, path: Path, text: str) -> None:
    """Give one client of a grid a policy."""
    path.write_text(text)
    next(c for c in grid._contexts.values() if c.node_config["partition-id"] == client).node_config["policy"] = str(path)


def test_the_sites_cap_counts_all_runs_together(llama: str, words: str, tmp_path: Path) -> None:
    for number in (1, 2):
        content = json.loads(config(llama, words, epsilon=3.0).to_json())
        content["data"]["partition"] = "iid"  # 7 records each
        run = config_of(content | {"name": f"run-{number}"})
        grid = LocalGrid(
            local_grid(run, tmp_path)._app, [{**c.node_config} for c in local_grid(run, tmp_path)._contexts.values()]
        )
        policy_of(grid, 1, tmp_path / "policy.toml", "max_epsilon = 5.5\nat_delta = 0.14\n")
        federate(run, tmp_path / f"run-{number}", grid=grid)
    assert not events(tmp_path / "run-1", "refused")
    reasons = [event["reason"] for event in events(tmp_path / "run-2", "refused")]
    assert reasons and all("client-1: 2 more steps" in r and "max_epsilon of the site's policy = 5.5" in r for r in reasons)
    found = Ledger(tmp_path / "sites" / "client-1" / NAME, "client-1").entries()
    cost = spent(found, min(0.14, 1 / found[0].records))
    assert 3.0 < cost.best < cost.rdp <= 5.5, "the cap is counted by RDP, which holds whatever comes next"
    assert {entry.run for entry in found} == {"run-1", "run-2"}


def test_a_policy_with_a_cap_takes_part_in_private_runs_alone(llama: str, words: str, tmp_path: Path) -> None:
    run = config_of(table(llama, words))
    grid = local_grid(run, tmp_path)
    policy_of(grid, 0, tmp_path / "policy.toml", "max_epsilon = 4.0\n")
    federate(run, tmp_path / "run", grid=grid)
    assert "without differential privacy" in events(tmp_path / "run", "refused")[0]["reason"]


def test_other_data_than_the_ledgers_are_refused_until_the_policy_takes_them(llama: str, words: str, tmp_path: Path) -> None:
    run, noise = config(llama, words), 30.0
    ledger = Ledger(tmp_path / "sites" / "client-1" / NAME, "client-1")
    ledger.add(Entry("client-1", "f" * 64, 100, "old", "c" * 64, 1, TRAIN, "record", noise, 0.01, 1, 0.5, "a", 1.0))
    federate(run, tmp_path / "refused", grid=local_grid(run, tmp_path))
    (reason, *_) = [event["reason"] for event in events(tmp_path / "refused", "refused")]
    assert "its ledger counts what was released of another data set (ffffffffffff)" in reason and "data_may_change" in reason
    assert len(ledger.entries()) == 1
    grid = local_grid(run, tmp_path)
    policy_of(grid, 1, tmp_path / "policy.toml", "data_may_change = true\n")
    federate(run, tmp_path / "taken", grid=grid)
    assert not [event for event in events(tmp_path / "taken", "refused") if event["client"] == "client-1"]
    assert len(ledger.entries()) == 5


def test_a_delta_above_one_over_n_is_refused_before_training(llama: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(PrivacyError, match="privacy.delta = 0.9 is above 1/.* records here; lower it to"):
        federate(config(llama, words, delta=0.9), tmp_path)
    assert not list(tmp_path.glob(f"sites/*/{NAME}"))


def test_by_client_updates_are_clipped_and_the_server_adds_noise(llama: str, words: str, tmp_path: Path) -> None:
    run = config(llama, words, {"rounds": 2}, unit="client", epsilon=None, noise_multiplier=1e-9, clip_norm=0.01)
    grid = local_grid(run, tmp_path)
    seen = replies(grid)
    summary = federate(run, tmp_path, grid=grid)
    trained = [reply for reply in seen if reply.metadata.message_type == TRAIN]
    assert len(trained) == 6 and all(dict(reply.content[METRICS]) == {} for reply in trained)
    norms = [event["norm"] for event in events(tmp_path, "reply")]
    assert len(norms) == 6 and all(norm <= 0.01 * (1 + 1e-3) for norm in norms) and max(norms) > 0.009
    moved = torch.cat([state.flatten() for state in final_state(tmp_path).values()]).norm()
    assert 0 < moved <= 2 * 0.01 * (1 + 1e-3)
    assert personal_states(tmp_path) == {} and len(events(tmp_path, "kept")) == 3  # a client's own is not covered, and stays
    assert [(entry.what, entry.unit, entry.steps) for entry in entries(tmp_path)] == [(TRAIN, "client", 1)] * 2
    assert summary["privacy"]["unit"] == "client" and math.isfinite(summary["privacy"]["epsilon"])


def test_by_client_noise_has_its_size(llama: str, words: str, tmp_path: Path) -> None:
    run = config(llama, words, {"rounds": 1}, unit="client", epsilon=None, noise_multiplier=5.0, clip_norm=0.5)
    federate(run, tmp_path)
    numbers = torch.cat([state.flatten() for state in final_state(tmp_path).values()])
    assert float(numbers.std()) == pytest.approx(5.0 * 0.5 / 3, rel=0.2)


def test_by_client_a_fraction_is_a_poisson_sample_that_no_seed_tells(llama: str, words: str, tmp_path: Path) -> None:
    rounds = 12
    federation = {"rounds": rounds, "fraction": 0.5}
    counts = []
    for name in ("a", "b"):
        run = config(llama, words, federation, unit="client", epsilon=None, noise_multiplier=1.0)
        federate(run, tmp_path / name)
        counts.append([entry["clients"] for entry in read_json(tmp_path / name / "summary.json")["history"]])
    assert counts[0] != counts[1] and len(set(counts[0])) > 1
    for client in ("client-0", "client-1", "client-2"):  # in the rounds that drew it and in those that did not
        found = entries(tmp_path / "a", client)
        assert {entry.sample_rate for entry in found} == {0.5} and sum(entry.steps for entry in found) == rounds
        assert [entry.round for entry in found] == sorted({entry.round for entry in found})


def test_the_fingerprint_of_data_is_one_of_a_set(llama: str, words: str) -> None:
    from fedsb.data.sites import client_data

    examples = client_data(config(llama, words), "client-0", 0, "train")
    assert fingerprint(examples) == fingerprint(examples[::-1]) != fingerprint(examples[1:])


def test_an_altered_ledger_stops_its_client(llama: str, words: str, tmp_path: Path) -> None:
    run = config(llama, words)
    path = tmp_path / "sites" / "client-2" / NAME
    path.parent.mkdir(parents=True)
    path.write_text("{}\n")
    federate(run, tmp_path / "run", grid=local_grid(run, tmp_path))
    (reason,) = {event["reason"] for event in events(tmp_path / "run", "refused")}
    assert "line 1 is no entry of a ledger" in reason
    with pytest.raises(LedgerError):
        Ledger(path, "client-2")
    assert isinstance(LedgerError("x"), PrivacyError)


def test_a_clip_for_a_head_that_is_not_there_is_refused(llama: str, words: str) -> None:
    with pytest.raises(ConfigError, match=r"privacy.head_clip_norm clips the head's part .* or leave it out"):
        config(llama, words, head_clip_norm=2.0)


def test_a_heads_own_clip_reaches_the_mechanism(bert: str, labels: str) -> None:
    sections: dict[str, Any] = {
        "privacy": {"unit": "record", "epsilon": 8.0, "clip_norm": 0.25, "head_clip_norm": 2.0},
        "federation": {"weighting": "uniform"},
    }
    mechanism = mechanism_of(config_of(classification(bert, labels, **sections)), 100)
    assert (mechanism.clip_norm, mechanism.head_clip_norm) == (0.25, 2.0)
