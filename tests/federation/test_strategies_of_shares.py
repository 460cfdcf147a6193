"""Strategies beyond the mean where clients send a share of the state: different ranks, and parts that stay with each client."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message

from clients.session import Session, Site
from fedsb.aggregation.optimiser import OPTIMISERS
from fedsb.config import RunConfig
from fedsb.errors import ConfigError
from fedsb.store.tensors import load_tensors
from fedsb.training.loop import round_plan
from fedsb.training.start import build_basis
from strategies.records import ARRAYS, TRAIN, VARIATES, unpack_state
from tests.federation.test_strategies import config
from tests.federation.tiny import assert_same_result, assert_same_run, equal, events, federate, final_state
from tests.federation.twisted import killed_and_resumed, twisted

RANKS = {"client-0": 2, "client-1": 3}  # client-2: 4, as the run
NESTED = {"method": "nested-sb", "ranks": RANKS}
FEDSA = {"method": "fedsa-lora"}


def opened(run: RunConfig) -> Session:
    session = Session(run)
    session.use(build_basis(run, session.model, session.tokenizer, session.device))
    return session


def checkpoints(folder: Path, file: str) -> list[dict[str, torch.Tensor]]:
    return [load_tensors(path / file)[0] for path in sorted((folder / "checkpoints").glob("round-*"))]


@pytest.mark.parametrize("name", OPTIMISERS)
def test_an_optimiser_does_not_move_what_nobody_sent(name: str, llama: str, words: str, tmp_path: Path) -> None:
    """Though its moments there are not zero: one client a round, of another rank than the one before."""
    federation = {"rounds": 6, "fraction": 0.1}
    run = config(llama, words, name, adapter=NESTED, federation=federation, strategy={"tau": 0.1}, personal={"steps": 0})
    federate(run, tmp_path)
    session, drawn = Session(run), [run.rank_of(event["client"]) for event in events(tmp_path, "reply")]
    assert len(drawn) == 6 and any(a > b for a, b in pairwise(drawn)) and max(drawn) == 4
    states = [session.layout.unflatten(session.base_vector()), *checkpoints(tmp_path, "state.safetensors")]
    memories = checkpoints(tmp_path, "memory.safetensors")
    rested = False
    for number, rank in enumerate(drawn):
        for key, core in states[number + 1].items():
            before = states[number][key]
            assert torch.equal(core[rank:], before[rank:]) and torch.equal(core[:, rank:], before[:, rank:])
            assert (core[:rank, :rank] != before[:rank, :rank]).all()
        if number:
            old, new = (session.layout.unflatten(memories[i]["m"]) for i in (number - 1, number))
            for key, moment in new.items():
                assert torch.equal(moment[rank:], old[key][rank:]) and torch.equal(moment[:, rank:], old[key][:, rank:])
                rested |= bool(moment[rank:].any())
    assert rested, "a moment that would have moved a number"


@pytest.mark.parametrize("adapter", [NESTED, FEDSA, {"method": "flexlora", "ranks": RANKS}])
def test_fedprox_adds_to_what_a_client_shares_and_trains_alone(
    adapter: dict[str, Any], llama: str, words: str, tmp_path: Path
) -> None:
    """One round by hand: a share that is large in μ is not where it would be without, and the rest is."""
    run = config(llama, words, "fedprox", adapter=adapter, strategy={"mu": 50.0}, train={"steps": 8})
    session, site = opened(run), Site("client-0", 0, tmp_path)
    share, begun = session.share(site), session.base_vector()
    begun = share.put(share.take(begun), torch.zeros(session.layout.size)) if "ranks" in adapter else begun
    held = session.train(site, begun, round_plan(run, 1)).vector
    free = session.train(site, begun, round_plan(config(llama, words, "fedavg", train={"steps": 8}, adapter=adapter), 1)).vector

    def far(vector: torch.Tensor) -> float:
        return float((share.take(vector) - share.take(begun)).norm())

    assert far(held) < 0.9 * far(free)
    if "ranks" in adapter:
        assert all(torch.equal(v, share.put(share.take(v), torch.zeros(len(v)))) for v in (held, free)), "beyond its rank: 0"


def test_fedprox_leaves_what_stays_with_a_client_alone(llama: str, words: str, tmp_path: Path) -> None:
    """With so large a μ that A cannot move, B goes as with A frozen; the term of B would hold it too."""
    moved = {}
    for name, mu in (("fedprox", 1e9), ("fedavg", 1.0)):
        run = config(llama, words, name, adapter=FEDSA, strategy={"mu": mu}, train={"steps": 6, "schedule": "constant"})
        session, site = opened(run), Site("client-0", 0, tmp_path)
        after = session.train(site, session.base_vector(), round_plan(run, 1)).vector
        difference = session.layout.unflatten(after - session.base_vector())
        moved[name] = sum(float(t.square().sum()) for key, t in difference.items() if key.endswith(".B")) ** 0.5
    assert moved["fedprox"] > 0.8 * moved["fedavg"], moved


@pytest.mark.parametrize("name", ["scaffold", "fedbuff", "fedadam", "median"])
def test_killed_and_resumed_is_as_if_uninterrupted(name: str, llama: str, words: str, tmp_path: Path) -> None:
    """With what each client keeps to itself, too; FedBuff asks again for what a client did before it did something newer."""
    buffered = name == "fedbuff"
    federation = {"rounds": 6, "clients": 4} if buffered else {"rounds": 3}
    run = config(llama, words, name, adapter=FEDSA, federation=federation, strategy={"concurrency": 2, "buffer": 3})
    federate(run, tmp_path / "whole")
    killed_and_resumed(run, tmp_path / "cut", rounds=5 if buffered else 2, replies=2 if buffered else 1)
    if buffered:
        assert_same_result(tmp_path / "whole", tmp_path / "cut")
    else:
        assert_same_run(tmp_path / "whole", tmp_path / "cut")
    whole, cut = (
        {p.relative_to(f): load_tensors(p)[0] for p in f.glob("sites/*/own-*/*")} for f in (tmp_path / "whole", tmp_path / "cut")
    )
    assert whole.keys() == cut.keys() and all(equal(whole[path], cut[path]) for path in whole)


@pytest.mark.parametrize("name", ["fedadam", "fedprox"])
def test_killed_and_resumed_with_different_ranks(name: str, llama: str, words: str, tmp_path: Path) -> None:
    run = config(llama, words, name, adapter=NESTED, federation={"fraction": 0.5, "rounds": 4})
    federate(run, tmp_path / "whole")
    killed_and_resumed(run, tmp_path / "cut", rounds=2, replies=0)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_scaffolds_variates_are_of_what_travels(llama: str, words: str, tmp_path: Path) -> None:
    """Two vectors of A's size each way, and nothing of B in either; c is the mean of the clients' own."""
    run, sizes = config(llama, words, "scaffold", adapter=FEDSA), set()

    def watch(kind: str, client: int, reply: Message) -> list[Message]:
        if kind == TRAIN:
            sizes.add(tuple(unpack_state(reply.content[key]).numel() for key in (ARRAYS, VARIATES)))
        return [reply]

    federate(run, tmp_path, grid=twisted(run, tmp_path, watch))
    session = Session(run)
    share = session.share(Site("client-0", 0, tmp_path))
    assert sizes == {(share.layout.size,) * 2} and share.layout.size < session.layout.size
    own = [load_tensors(max(f.glob("round-0003-*")))[0]["variate"] for f in (tmp_path / "sites").glob("*/variates/*")]
    common = checkpoints(tmp_path, "memory.safetensors")[-1]["c"]
    assert len(own) == 3 and common.any()
    torch.testing.assert_close(common, torch.stack(own).mean(0), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ["fedadam", "trimmed-mean"])
def test_personalisation_goes_on_from_a_share_after_any_strategy(name: str, llama: str, words: str, tmp_path: Path) -> None:
    run = config(llama, words, name, adapter=NESTED if name == "fedadam" else FEDSA)
    federate(run, tmp_path)
    assert len(events(tmp_path, "personal")) == run.federation.clients and not events(tmp_path, "refused")
    assert final_state(tmp_path).keys() == {
        key for key in Session(run).layout.unflatten(Session(run).base_vector()) if key.endswith((".core", ".A"))
    }


@pytest.mark.parametrize("method", ["hetlora", "flexlora"])
@pytest.mark.parametrize("name", ["scaffold", "fedbuff", "fedyogi", "krum"])
def test_what_makes_a_mean_of_its_own_takes_no_other(name: str, method: str) -> None:
    with pytest.raises(ConfigError, match=f'"{method}" makes a mean of its own.*strategy.name = "{name}".*fedavg or fedprox'):
        config("m", "jsonl:w", name, adapter={"method": method})


@pytest.mark.parametrize("name", ["scaffold", "fedbuff", "trimmed-mean", "median", "krum", "multi-krum"])
def test_what_takes_states_of_one_size_takes_no_ranks(name: str) -> None:
    with pytest.raises(ConfigError, match=f'strategy.name = "{name}" takes states of one size, and with adapter.ranks'):
        config("m", "jsonl:w", name, adapter=NESTED)
