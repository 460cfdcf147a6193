"""HetLoRA and FlexLoRA in whole federations whose clients have different ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from peft import PeftModel

from clients.session import Session, Site
from fedsb.adapters.attach import shapes_of
from fedsb.adapters.state import set_state
from fedsb.aggregation.factors import mean_of
from fedsb.cli.evaluate import evaluate_run
from fedsb.config import RunConfig
from fedsb.data.sites import all_parts
from fedsb.errors import ConfigError
from fedsb.models import device_of, load_model, locate
from fedsb.store import adapters
from fedsb.store.basis_files import load_basis
from fedsb.store.export import export_lora
from fedsb.training.loop import round_plan
from strategies.records import ARRAYS, TRAIN, unpack_state
from tests.federation.tiny import assert_same_run, config_of, equal, federate, final_state, table
from tests.federation.twisted import killed_and_resumed, twisted

BOTH = pytest.mark.parametrize("method", ["hetlora", "flexlora"])
RANKS = {"client-0": 1, "client-1": 3}  # client-2: 4, as the run
TOKENS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


def config(llama: str, words: str, method: str, **sections: Any) -> RunConfig:
    adapter = {"method": method, "ranks": RANKS} | sections.pop("adapter", {})
    return config_of(table(llama, words, adapter=adapter, **sections))


@BOTH
def test_two_rounds_are_the_loop_by_hand(method: str, llama: str, words: str, tmp_path: Path) -> None:
    """Truncate, train, aggregate: bytes of a client are r·(in + out) a layer, and beyond its rank it trains nothing."""
    run, sent = config(llama, words, method, federation={"rounds": 2}), []

    def watch(kind: str, client: int, reply: Message) -> list[Message]:
        if kind == TRAIN:
            sent.append(unpack_state(reply.content[ARRAYS]))
        return [reply]

    summary = federate(run, tmp_path / "run", grid=twisted(run, tmp_path / "run", watch))
    session, weights = Session(run), [len(part) for part in all_parts(run, "train")]
    vector, sides = session.base_vector(), sum(map(sum, shapes_of(session.model).values()))
    for number in (1, 2):
        mean = mean_of(method, session.layout)
        for i, client in enumerate(run.client_names):
            site = Site(client, i, tmp_path)
            share = session.share(site)
            begun = share.put(share.take(vector), torch.zeros(session.layout.size))
            trained = session.train(site, begun, round_plan(run, number)).vector
            assert equal({"": share.put(share.take(trained), torch.zeros(session.layout.size))}, {"": trained})
            got = sent.pop(0)
            assert torch.equal(got, share.take(trained)) and got.numel() == run.rank_of(client) * sides
            mean.add(trained, float(weights[i]), share.index)
        vector = mean.result(vector)
    assert equal(session.layout.unflatten(vector), final_state(tmp_path / "run"))
    assert 0 < summary["aggregation_error"] < 2


@BOTH
def test_killed_and_resumed_it_ends_with_the_same_bits(method: str, llama: str, words: str, tmp_path: Path) -> None:
    run = config(llama, words, method)
    federate(run, tmp_path / "whole")
    killed_and_resumed(run, tmp_path / "cut", rounds=1)
    assert_same_run(tmp_path / "whole", tmp_path / "cut", same_bytes=False)


@BOTH
def test_what_a_client_publishes_has_its_rank(method: str, llama: str, words: str, tmp_path: Path) -> None:
    run = config(llama, words, method, adapter={"alpha": 8.0})
    summary = federate(run, tmp_path)
    stored = adapters.load(tmp_path / "adapters", "client-1")
    assert stored.manifest.rank == 3 and stored.manifest.scale == 2.0
    folder = export_lora(stored, load_basis(tmp_path, stored.manifest.basis_fingerprint), tmp_path / "out")
    loaded: Any = PeftModel.from_pretrained(load_model(locate(run.model.source), run.model, None, device_of("cpu")), folder)
    assert loaded.peft_config["default"].r == 3
    session = Session(run)
    share = session.published(Site("client-1", 1, tmp_path))
    set_state(
        session.model,
        session.layout.unflatten(share.put(share.layout.flatten(stored.state), torch.zeros(session.layout.size))),
    )
    torch.testing.assert_close(loaded(input_ids=TOKENS).logits, session.model(input_ids=TOKENS).logits, rtol=1e-4, atol=1e-5)
    scores = evaluate_run(tmp_path, sequential=True)
    for which in ("base", "global", "personal"):
        for client, score in summary["evaluation"][which].items():
            assert scores[which][client]["loss"] == pytest.approx(score["loss"], rel=1e-5)


def test_flexlora_is_off_by_what_it_cuts_away(llama: str, words: str, tmp_path: Path) -> None:
    """With as many directions as the mean has, the mean is exact: three clients of rank 4 have twelve."""
    errors = [
        federate(
            config_of(
                table(
                    llama,
                    words,
                    adapter={"method": "flexlora", "rank": rank, "ranks": dict.fromkeys(names, 4)},
                    federation={"rounds": 1},
                )
            ),
            tmp_path / str(rank),
        )["aggregation_error"]
        for rank, names in ((4, []), (12, ["client-0", "client-1", "client-2"]))
    ]
    assert errors[1] < 1e-6 < 1e-4 < errors[0]


@BOTH
@pytest.mark.parametrize(
    ("privacy", "complaint"),
    [
        ({"secure_sum": True}, "needs each client's own factors"),
        ({"unit": "client", "epsilon": 1.0}, "needs each client's own factors"),
        ({"unit": "record", "epsilon": 1.0}, "puts noise on factors beyond a client's rank"),
    ],
)
def test_what_hides_factors_is_refused_by_name(
    method: str, privacy: dict[str, Any], complaint: str, llama: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        config(llama, words, method, privacy=privacy, federation={"weighting": "uniform"})
