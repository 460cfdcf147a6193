"""Whole runs with strategies other than the mean."""

import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from flwr.app import Message, RecordDict

from clients.answers import answer
from clients.session import Session, Site
from fedsb.abilities import FOLDING, FUSING, IN_TURN, OWN_SETTINGS, RANKED_LORA, ROBUST
from fedsb.adapters.methods import METHODS
from fedsb.aggregation.optimiser import OPTIMISERS
from fedsb.config import RunConfig
from fedsb.errors import CheckpointError, ConfigError, FederationError, FedsbError
from fedsb.sections import StrategySection
from fedsb.store.files import read_json, write_json
from fedsb.store.tensors import load_tensors
from fedsb.training.loop import largest_update, round_plan
from fedsb.training.start import build_basis
from strategies.records import ARRAYS, TRAIN, VARIATES, pack_state, unpack_state
from strategies.table import SECURE, STRATEGIES
from tests.federation.tiny import (
    assert_same_result,
    assert_same_run,
    classification,
    config_of,
    equal,
    events,
    federate,
    final_state,
    table,
)
from tests.federation.twisted import Twist, failure, killed_and_resumed, twisted

KINDS = ("fedprox", "scaffold", "fedbuff", "fedadam", "median")  # one of each way to count states and to remember
PAIRS = [
    *((name, "lora-sb") for name in STRATEGIES),
    *(("fedprox", method) for method in METHODS if method != "lora-sb"),
    *(("fedyogi", method) for method in METHODS if method not in ("lora-sb", *RANKED_LORA, *FOLDING, *IN_TURN)),
    *((name, "fedsa-lora") for name in ("scaffold", "fedbuff", "median")),  # of whose states a part stays with the clients
    *((name, "lora-ga") for name in ("scaffold", "fedbuff")),  # whose basis adds to the weights
]


def config(llama: str, words: str, name: str, **sections: Any) -> RunConfig:
    """Three clients of the tiny federation, or as many as the strategy needs."""
    federation: dict[str, Any] = {}
    if name in ROBUST:
        federation |= {"weighting": "uniform", "clients": 5, "min_clients": 5}
    if name == "scaffold":
        federation |= {"weighting": "uniform"}
    settings = {key: value for key, value in sections.pop("strategy", {}).items() if name in OWN_SETTINGS[key]}
    federation |= sections.pop("federation", {})
    return config_of(table(llama, words, strategy={"name": name, **settings}, federation=federation, **sections))


@pytest.mark.parametrize("name", KINDS)
def test_killed_and_resumed_is_as_if_uninterrupted(name: str, llama: str, words: str, tmp_path: Path) -> None:
    run = config(llama, words, name)
    federate(run, tmp_path / "whole")
    killed_and_resumed(run, tmp_path / "cut", rounds=2)
    if name == "fedbuff":  # what was at work is asked for twice, and counted twice
        assert_same_result(tmp_path / "whole", tmp_path / "cut")
    else:
        assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("name", OPTIMISERS)
def test_what_a_server_remembers_is_in_its_checkpoints(name: str, llama: str, words: str, tmp_path: Path) -> None:
    """And it counts: without it a resumed run ends elsewhere. A torn one is named."""
    run = config(llama, words, name, federation={"rounds": 2}, personal={"steps": 0})
    federate(run, tmp_path / "whole")
    memory = load_tensors(tmp_path / "whole/checkpoints/round-0002/memory.safetensors")[0]
    assert set(memory) == {"m", "v"} and all(tensor.any() for tensor in memory.values())
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/checkpoints/round-0002")
    torn = tmp_path / "cut/checkpoints/round-0001/memory.safetensors"
    torn.unlink()
    with pytest.raises(CheckpointError, match=r"round-0001/memory\.safetensors: is missing, torn"):
        federate(run, tmp_path / "cut", resume=True)
    record = torn.with_name("round.json")
    write_json(record, read_json(record) | {"memory_sha256": None})
    federate(run, tmp_path / "cut", resume=True)
    assert not equal(final_state(tmp_path / "whole"), final_state(tmp_path / "cut"))


@pytest.mark.parametrize("name", ["fedadam"])
@pytest.mark.parametrize("privacy", [{"secure_sum": True}, {"unit": "client", "noise_multiplier": 1e-6, "clip_norm": 1.0}])
def test_a_servers_optimiser_after_a_secure_or_private_mean(
    privacy: dict[str, Any], name: str, llama: str, words: str, tmp_path: Path
) -> None:
    """What the sum is rounded by, or almost no noise, is all that differs from the plain mean."""
    federation = {"weighting": "uniform", "rounds": 2}
    for folder, section in (("plain", {}), ("protected", privacy)):
        sections = {"federation": federation, "privacy": section, "strategy": {"tau": 0.1, "rate": 1.0}, "personal": {"steps": 0}}
        federate(config(llama, words, name, **sections), tmp_path / folder)
    plain, protected = final_state(tmp_path / "plain"), final_state(tmp_path / "protected")
    for key, exact in plain.items():
        torch.testing.assert_close(protected[key], exact, atol=1e-3, rtol=1e-2)
    assert max(float(t.abs().max()) for t in plain.values()) > 0.02


def loss(summary: dict[str, Any], which: str) -> float:
    return sum(score["loss"] * score["n"] for score in summary["evaluation"][which].values())


def test_the_table_has_what_the_configuration_names() -> None:
    names = get_args(StrategySection.model_fields["name"].annotation)
    assert set(names) == set(STRATEGIES) and set(SECURE) <= set(names)


@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_it_trains_with_every_method(name: str, method: str, llama: str, words: str, out: Path) -> None:
    sections: dict[str, Any] = {"data": {"partition": "iid"}, "federation": {"rounds": 2}, "personal": {"steps": 0}}
    if method in FUSING:  # a few numbers, that mix random adapters
        sections |= {"train": {"steps": 8, "learning_rate": 0.3}, "strategy": {"rate": 0.3}}
    run = config(llama, words, name, adapter={"method": method}, **sections)
    summary = federate(run, out)
    assert summary["strategy"] == name and summary["method"] == method
    assert loss(summary, "global") < loss(summary, "base")
    assert (summary["aggregation_error"] is None) == (name in (*ROBUST, "fedbuff") or bool(METHODS[method].kept))


@pytest.mark.parametrize("name", KINDS)
def test_it_trains_a_head(name: str, bert: str, labels: str, out: Path) -> None:
    settings = config("m", "jsonl:w", name)
    sections = {key: getattr(settings, key).model_dump(exclude_none=True) for key in ("strategy", "federation")}
    federate(config_of(classification(bert, labels, data={"partition": "iid"}, **sections)), out)
    assert final_state(out)["head.classifier.bias"].abs().min() > 0


@pytest.mark.parametrize("name", KINDS)
def test_rounding_on_the_wire_is_all_that_bf16_changes(name: str, llama: str, words: str, tmp_path: Path) -> None:
    states = []
    for wire in ("fp32", "bf16"):
        run = config(llama, words, name, federation={"wire_dtype": wire, "rounds": 1}, personal={"steps": 0})
        federate(run, tmp_path / wire)
        states.append(final_state(tmp_path / wire))
    for key, exact in states[0].items():
        torch.testing.assert_close(states[1][key], exact, rtol=2e-2, atol=2e-3)


def test_one_hostile_client_within_all_bounds_turns_only_the_mean_round(llama: str, words: str, tmp_path: Path) -> None:
    """Five clients; the reply of one passes every check and goes as far as steps can go, the other way than the four others'.

    Progress: how far the result goes toward the honest clients' mean, which is 1. The mean of all five is on the wrong side.
    """
    progress = {}
    for name in ("fedavg", "trimmed-mean", "krum"):
        sections: dict[str, Any] = {
            "data": {"partition": "iid"},
            "personal": {"steps": 0},
            "train": {"steps": 40, "learning_rate": 0.3, "warmup_steps": 0, "batch_size": 2},
            "federation": {"rounds": 1, "clients": 5, "weighting": "uniform"},
        }
        run, folder, honest = config(llama, words, name, **sections), tmp_path / name, list[torch.Tensor]()
        most = largest_update(round_plan(run, 1))[0]

        def twist(
            kind: str, client: int, reply: Message, honest: list[torch.Tensor] = honest, most: float = most
        ) -> list[Message]:
            if kind == TRAIN and client == 4:
                reply.content[ARRAYS] = pack_state(-most * torch.stack(honest).mean(0).sign(), "fp32")
            elif kind == TRAIN:
                honest.append(unpack_state(reply.content[ARRAYS]))
            return [reply]

        federate(run, folder, grid=twisted(run, folder, twist))
        assert not events(folder, "refused") and len(events(folder, "reply")) == 5
        right, found = torch.stack(honest).mean(0), Session(run).layout.flatten(final_state(folder))
        progress[name] = float(found @ right / right.square().sum())
    assert progress["fedavg"] < 0, progress
    assert all(found > 0.4 for name, found in progress.items() if name != "fedavg"), progress


@pytest.mark.parametrize("name", ROBUST)
def test_a_round_with_fewer_than_promised_does_not_count(name: str, llama: str, words: str, out: Path) -> None:
    run = config(llama, words, name)
    twist: Twist = lambda kind, client, reply: [failure(reply) if (kind, client) == (TRAIN, 2) else reply]  # noqa: E731
    with pytest.raises(FederationError, match="round 1: too few usable replies"):
        federate(run, out, grid=twisted(run, out, twist))


@pytest.mark.parametrize("name", ["multi-krum"])
def test_robust_strategies_take_replies_that_are_private_by_record(name: str, bert: str, labels: str, out: Path) -> None:
    settings = config("m", "jsonl:w", name, federation={"rounds": 1})
    sections = {key: getattr(settings, key).model_dump(exclude_none=True) for key in ("strategy", "federation")}
    privacy = {"unit": "record", "epsilon": 8.0}
    federate(
        config_of(classification(bert, labels, data={"partition": "iid"}, privacy=privacy, personal={"steps": 0}, **sections)),
        out,
    )
    assert len(events(out, "reply")) == 5 and all(t.isfinite().all() for t in final_state(out).values())


@pytest.mark.parametrize(
    ("name", "sections", "said"),
    [
        ("median", {"federation": {"weighting": "examples"}}, 'counts each client once; set federation.weighting = "uniform"'),
        (
            "median",
            {"federation": {"min_clients": 2}},
            "takes 3 clients or more; set federation.min_clients = 3",
        ),
        ("krum", {"strategy": {"hostile": 2}}, "strategy.hostile = 2 takes 7 clients or more; set federation.min_clients = 7"),
        ("multi-krum", {"strategy": {"keep": 3}}, "strategy.keep is at most .* = 2; lower it"),
        ("trimmed-mean", {"strategy": {"trim": 0.1}}, "strategy.trim = 0.1 takes 10 clients or more"),
        ("scaffold", {"privacy": {"secure_sum": True}}, "sends control variates"),
        ("scaffold", {"privacy": {"unit": "record", "epsilon": 1.0}}, "sends control variates"),
        ("scaffold", {"federation": {"weighting": "examples"}}, "counts each client once"),
        ("krum", {"privacy": {"secure_sum": True}}, "looks at single states, which privacy.secure_sum hides; use another"),
        ("median", {"privacy": {"unit": "client", "noise_multiplier": 1.0}}, "has no bounded sensitivity"),
    ],
)
def test_what_cannot_be_kept_is_refused_before_training(name: str, sections: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=f'strategy.name = "{name}".*{said}'):
        config("model", "jsonl:words", name, **sections)


@pytest.mark.parametrize("name", ["fedprox", "scaffold"])
def test_one_client_alone_is_local_training(name: str, llama: str, words: str, tmp_path: Path) -> None:
    run = config(llama, words, name, federation={"clients": 1, "rounds": 3}, strategy={"mu": 2.0})
    federate(run, tmp_path)
    alone = Session(run)
    alone.use(build_basis(run, alone.model, alone.tokenizer, alone.device))
    site, vector = Site("client-0", 0, tmp_path), alone.base_vector()
    for number in (1, 2, 3):
        vector = alone.train(site, vector, round_plan(run, number)).vector
    assert equal(alone.layout.unflatten(vector), final_state(tmp_path))
    assert (round_plan(run, 1).mu == 2.0) == (name == "fedprox")


def test_a_variate_that_the_server_names_outlives_answers_that_do_not_count(llama: str, words: str, out: Path) -> None:
    """A slow site: its reply counts in round 1, and then not before round 6."""
    run = config(llama, words, "scaffold", federation={"rounds": 6})

    def slow(kind: str, client: int, reply: Message) -> list[Message]:
        lost = kind == TRAIN and client == 2 and 0 < len(events(out, "round")) < 5
        return [failure(reply, "too late")] if lost else [reply]

    federate(run, out, grid=twisted(run, out, slow))
    assert [event["round"] for event in events(out, "reply") if event["client"] == "client-2"] == [1, 6]


def test_scaffold_moves_twice_the_bytes_and_other_bits(llama: str, words: str, tmp_path: Path) -> None:
    plain = federate(config(llama, words, "fedavg", federation={"weighting": "uniform"}), tmp_path / "plain")
    twice = federate(config(llama, words, "scaffold"), tmp_path / "twice")
    state = 4 * plain["trainable_parameters"]
    assert state < twice["bytes"]["up_per_client_round"] - plain["bytes"]["up_per_client_round"] < state + 200
    assert not equal(final_state(tmp_path / "plain"), final_state(tmp_path / "twice"))
    one = config(llama, words, "scaffold", federation={"rounds": 1}), config(llama, words, "fedavg", federation={"rounds": 1})
    federate(one[0], tmp_path / "a")
    uniform = one[1].federation.model_copy(update={"weighting": "uniform"})
    federate(one[1].model_copy(update={"federation": uniform}), tmp_path / "b")
    assert equal(final_state(tmp_path / "a"), final_state(tmp_path / "b")), "in the first round all variates are zero"


def test_the_servers_variate_is_the_mean_of_the_clients(llama: str, words: str, tmp_path: Path) -> None:
    """Also where only some take part in a round, and after a run was killed between a client's file and the checkpoint."""
    run = config(llama, words, "scaffold", federation={"clients": 4, "rounds": 5, "fraction": 0.5})
    federate(run, tmp_path / "whole")
    killed_and_resumed(run, tmp_path / "cut", rounds=2, replies=0)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    last = tmp_path / "cut/checkpoints/round-0005"
    named = read_json(last / "round.json")["progress"]["strategy"]["variates"]
    folder = tmp_path / "cut/sites"
    own = [
        load_tensors(next(folder.glob(f"{client}/variates/*/{key}.safetensors")))[0]["variate"] for client, key in named.items()
    ]
    assert 2 < len(own) <= 4 and all(len(list(f.iterdir())) <= 3 for f in folder.glob("*/variates/*"))
    common = load_tensors(last / "memory.safetensors")[0]["c"]
    torch.testing.assert_close(common, torch.stack(own).sum(0) / 4, atol=1e-6, rtol=1e-4)


def test_a_question_asked_again_has_the_same_answer_whatever_came_between(llama: str, words: str, tmp_path: Path) -> None:
    """A client that answers round 3, then round 2 once more, and then round 3: all as at first. A lost variate is named."""
    run = config(llama, words, "scaffold", federation={"clients": 1, "rounds": 3}, personal={"steps": 0})
    asked: list[RecordDict] = []
    grid = twisted(run, tmp_path, lambda kind, client, reply: [reply])
    push = grid.push_messages
    grid.push_messages = lambda messages: push(  # type: ignore[method-assign]
        asked.append(m.content) or m if m.metadata.message_type == TRAIN else m  # type: ignore[func-returns-value]
        for m in list(messages)
    )
    federate(run, tmp_path, grid=grid)
    node = {"name": "client-0", "partition-id": 0, "num-partitions": 1, "folder": str(tmp_path / "sites")}

    def said(number: int) -> list[torch.Tensor]:
        reply = answer(TRAIN, asked[number - 1], node)
        return [unpack_state(reply[key]) for key in (ARRAYS, VARIATES)]

    first = said(3)
    for number in (2, 3, 2, 3):
        found = said(number)
        assert all(torch.equal(a, b) for a, b in zip(found, first, strict=True)) == (number == 3)
    for file in (tmp_path / "sites").glob("client-0/variates/*/round-0002-*"):
        file.unlink()
    with pytest.raises(FedsbError, match="client-0 has lost its control variate"):
        said(3)
    asked[2]["config"]["variate"] = "../../x"
    with pytest.raises(FedsbError, match="asked for the control variate '../../x', which is none"):
        said(3)


def test_the_mean_is_still_the_default(llama: str, words: str, tmp_path: Path) -> None:
    federate(config_of(table(llama, words)), tmp_path / "unsaid")
    federate(config(llama, words, "fedavg"), tmp_path / "said")
    assert equal(final_state(tmp_path / "unsaid"), final_state(tmp_path / "said"))
