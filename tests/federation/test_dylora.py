"""Federations with DyLoRA: every rank of the result, who trains what, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from peft import PeftModel

from fedsb.adapters.dylora import at_rank, drawn_rank
from fedsb.adapters.methods import METHODS
from fedsb.errors import ConfigError, StoreError
from fedsb.models import device_of, load_model, locate
from fedsb.store import adapters
from fedsb.store.basis_files import load_basis
from fedsb.store.export import export_lora
from fedsb.store.tensors import load_tensors
from strategies.records import ARRAYS, TRAIN, unpack_state
from tests.cli.front_door import call, complaint
from tests.federation.test_methods import TOKENS, config, opened, started
from tests.federation.tiny import events, federate, final_state
from tests.federation.twisted import twisted


def dylora(llama: str, words: str, adapter: dict[str, Any] | None = None, **sections: Any) -> Any:
    return config(llama, words, "dylora", adapter={"method": "dylora", **(adapter or {})}, **sections)


def test_every_rank_of_an_export_is_the_truncated_model(llama: str, words: str, tmp_path: Path) -> None:
    run = dylora(llama, words, {"alpha": 6.0})
    federate(run, tmp_path)
    stored = adapters.load(tmp_path / "adapters", "client-1")
    basis = load_basis(tmp_path, stored.manifest.basis_fingerprint)
    model = opened(run, stored.state).model
    logits = []
    for rank in (None, 1, 2, 3, 4):
        folder = export_lora(stored, basis, tmp_path / f"{rank}", rank=rank)
        plain = load_model(locate(run.model.source), run.model, None, device_of("cpu"))
        loaded = PeftModel.from_pretrained(plain, folder)
        assert loaded.peft_config["default"].r == (rank or 4)
        logits.append(loaded(input_ids=TOKENS).logits)
        with at_rank(model, rank or 4), torch.no_grad():
            torch.testing.assert_close(logits[-1], model(input_ids=TOKENS).logits, rtol=1e-4, atol=1e-5)
        assert f"| method | dylora, rank {rank or 4} |" in (folder / "README.md").read_text()
    torch.testing.assert_close(logits[0], logits[-1], rtol=0, atol=0)
    assert not any(torch.allclose(logits[-1], other, atol=1e-6) for other in logits[1:4])


def test_the_command_cuts_and_says_what_it_cannot(llama: str, words: str, tmp_path: Path, capsys: Any) -> None:
    federate(dylora(llama, words, federation={"rounds": 1}), tmp_path / "run")
    told = ["export", str(tmp_path / "run"), "--client", "client-0", "--out", str(tmp_path / "out")]
    assert call(*told, "--rank", "2") == 0
    weights = load_tensors(tmp_path / "out" / "client-0" / "adapter_model.safetensors")[0]
    assert {t.shape[0] for name, t in weights.items() if "lora_A" in name} == {2}
    for more, said in (
        (["--rank", "5"], "its rank is 4; give --rank from 1 to that, not 5"),
        (["--rank", "2", "--format", "core"], "has no cores, and so no format of ours"),
    ):
        assert said in complaint(capsys, *told, *more)


@pytest.mark.parametrize(
    "method", sorted(name for name, method in METHODS.items() if not method.nested and not method.takes_weights)
)
def test_a_method_without_smaller_ranks_says_so(method: str, llama: str, words: str, tmp_path: Path) -> None:
    federate(config(llama, words, method, federation={"rounds": 1}), tmp_path)
    stored = adapters.load(tmp_path / "adapters", "client-0")
    basis = load_basis(tmp_path, stored.manifest.basis_fingerprint)
    with pytest.raises(StoreError, match=f"an adapter of method {method} cannot be cut to a rank; leave --rank out"):
        export_lora(stored, basis, tmp_path / "out", rank=2)


@pytest.mark.parametrize("frozen", [False, True])
def test_with_one_rank_a_round_all_train_the_same_rows(frozen: bool, llama: str, words: str, tmp_path: Path) -> None:
    run = dylora(llama, words, {"draw": "round", "frozen": frozen}, federation={"rounds": 4})
    sent: list[torch.Tensor] = []

    def watch(kind: str, client: int, reply: Message) -> list[Message]:
        if kind == TRAIN:
            sent.append(unpack_state(reply.content[ARRAYS]))
        return [reply]

    federate(run, tmp_path, grid=twisted(run, tmp_path, watch))
    assert not events(tmp_path, "refused") and len(sent) == 12
    session = started(run)
    before = session.layout.unflatten(session.base_vector())
    for place in range(4):
        rank = drawn_rank(run, "whoever", place * run.train.steps)
        learns = range(rank - 1, rank) if frozen else range(rank)
        for vector in sent[3 * place : 3 * place + 3]:
            for name, after in session.layout.unflatten(vector).items():
                moved = (after - before[name]).abs().amax(1 if name.endswith("A") else 0) > 1e-6  # a mean of like numbers rounds
                assert all(k in learns for k in moved.nonzero().flatten().tolist()), (name, rank)
                assert moved[rank - 1] or name.endswith("A"), "A has no gradient where B is zero"
        before = load_tensors(tmp_path / "checkpoints" / f"round-{place + 1:04d}" / "state.safetensors")[0]


@pytest.mark.parametrize("frozen", [False, True])
def test_private_by_record_at_one_rank_a_round(frozen: bool, llama: str, words: str, tmp_path: Path) -> None:
    privacy = {"unit": "record", "epsilon": 8.0}
    run = dylora(
        llama,
        words,
        {"draw": "round", "frozen": frozen},
        privacy=privacy,
        federation={"weighting": "uniform", "rounds": 1},
        data={"partition": "iid"},
        personal={"steps": 0},
    )
    federate(run, tmp_path)
    rank, session = drawn_rank(run, "", 0), started(run)
    learns = range(rank - 1, rank) if frozen else range(rank)
    before = session.layout.unflatten(session.base_vector())
    for name, after in final_state(tmp_path).items():
        moved = (after - before[name]).abs().amax(1 if name.endswith("A") else 0) > 1e-6
        assert [bool(m) for m in moved] == [k in learns for k in range(4)], "noise reaches what learns and nothing else"


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        ({"method": "lora", "frozen": True}, 'adapter.frozen is of dylora, and adapter.method = "lora" has none'),
        ({"method": "ravan", "draw": "round"}, 'adapter.draw is of dylora, and adapter.method = "ravan" has none'),
        ({"method": "lora-sb", "smallest_rank": 2}, "adapter.smallest_rank is of dylora"),
        ({"method": "dylora", "smallest_rank": 5}, "adapter.smallest_rank is larger than adapter.rank"),
        ({"method": "dylora", "heads": 2}, "adapter.heads are those of ravan, "),
    ],
)
def test_what_it_or_another_has_no_use_for_is_refused(adapter: dict[str, Any], said: str, llama: str, words: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config(llama, words, "", adapter=adapter)


@pytest.mark.parametrize("unit", ["record", "client"])
def test_a_rank_that_each_draws_is_refused_under_privacy(unit: str, llama: str, words: str) -> None:
    with pytest.raises(ConfigError, match='privacy.unit needs adapter.draw = "round"'):
        dylora(llama, words, privacy={"unit": unit, "epsilon": 8.0}, federation={"weighting": "uniform"})
