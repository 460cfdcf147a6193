"""GaLore in a federation: another projection each round, r·in numbers a layer up, and what a round leaves in the weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from peft import PeftModel, get_peft_model

from fedsb.adapters.galore import GaloreConfig, GaloreLinear
from fedsb.adapters.state import get_state, layers_of, parameters_of
from fedsb.errors import BasisError, ConfigError
from strategies.records import ARRAYS, PERSONALISE, TRAIN, pack_state, unpack_state
from tests.adapters.samples import llama as tiny_llama
from tests.adapters.samples import randomise, same, snapshot, tokens
from tests.federation.test_methods import config, last_basis, opened, weights_of
from tests.federation.tiny import events, federate, final_state, personal_states
from tests.federation.twisted import twisted


def test_another_projection_each_round_and_what_travels(llama: str, words: str, tmp_path: Path) -> None:
    run = config(llama, words, "galore", federation={"rounds": 3})
    up: list[int] = []

    def watch(kind: str, client: int, reply: Message) -> list[Message]:
        if kind == TRAIN:
            up.append(unpack_state(reply.content[ARRAYS]).numel())
        return [reply]

    summary = federate(run, tmp_path, grid=twisted(run, tmp_path, watch))
    shapes = {name: tuple(w.shape) for name, w in weights_of(run).items()}
    assert set(up) == {sum(4 * in_ for _, in_ in shapes.values())} == {summary["trainable_parameters"]}
    basis, state = last_basis(tmp_path), final_state(tmp_path)
    assert len(basis.folds) == 3
    for name, (out, in_) in shapes.items():
        projections = [*(fold[name][0] for fold in basis.folds), state[f"{name}.P"]]
        assert all(
            p.shape == (out, 4) and fold[name][1].shape == (4, in_) for p, fold in zip(projections, basis.folds, strict=False)
        )
        for i, p in enumerate(projections):
            torch.testing.assert_close(p.T @ p, torch.eye(4), atol=1e-5, rtol=1e-5)
            assert all((p.T @ other).norm() < 1.9 for other in projections[:i]), "another subspace"
        assert not state[f"{name}.N"].any(), "each round starts from zero"
        update = sum((u.double() @ v.double() for u, v in (fold[name] for fold in basis.folds)), torch.zeros(()))
        assert int(torch.linalg.matrix_rank(update, atol=1e-7)) == min(12, *shapes[name]), "rank grows with the rounds"


def test_weights_with_what_was_folded_in_are_the_merged_model(llama: str, words: str, tmp_path: Path) -> None:
    run = config(llama, words, "galore", federation={"rounds": 2})
    federate(run, tmp_path)
    basis, plain = last_basis(tmp_path), weights_of(run)
    merged = weights_of_opened(opened(run, final_state(tmp_path), basis))
    for name, weight in merged.items():
        update = sum((u.double() @ v.double() for u, v in (fold[name] for fold in basis.folds)), torch.zeros(()))
        torch.testing.assert_close(weight.double(), plain[name].double() + update, atol=1e-6, rtol=1e-5)
        assert not torch.equal(weight, plain[name])


def weights_of_opened(session: Any) -> dict[str, torch.Tensor]:
    """Layer → weight as it is now."""
    return {name: layer.get_base_layer().weight for name, layer in layers_of(session.model).items()}


@pytest.mark.parametrize(
    "sections",
    [
        {"privacy": {"secure_sum": True}, "federation": {"weighting": "uniform"}},
        {"privacy": {"unit": "client", "epsilon": 8.0}, "federation": {"weighting": "uniform"}},
    ],
)
def test_sums_that_hide_states_are_refused(sections: Any, llama: str, words: str) -> None:
    with pytest.raises(ConfigError, match='"galore" adds to the weights after each round from each client\'s own state'):
        config(llama, words, "galore", **sections)


def test_a_rank_that_a_layer_has_no_room_for_is_refused() -> None:
    with pytest.raises(BasisError, match=r"adapter\.rank = 40 is larger than the smallest side of layer .*k_proj"):
        get_peft_model(tiny_llama(), GaloreConfig(r=40))


def test_a_personal_adapter_with_a_projection_of_its_own_is_refused(llama: str, words: str, tmp_path: Path) -> None:
    run = config(llama, words, "galore", federation={"rounds": 1})

    def lie(kind: str, client: int, reply: Message) -> list[Message]:
        if kind == PERSONALISE and client == 1:
            vector = unpack_state(reply.content[ARRAYS])
            share = opened(run, final_state(tmp_path), last_basis(tmp_path)).layout
            state = share.unflatten(vector)
            name = next(name for name in state if name.endswith(".P"))
            reply.content[ARRAYS] = pack_state(share.flatten(state | {name: state[name] + 1e-3}), "fp32")
        return [reply]

    federate(run, tmp_path, grid=twisted(run, tmp_path, lie))
    assert set(personal_states(tmp_path)) == {"client-0", "client-2"}
    assert {event["client"] for event in events(tmp_path, "refused")} == {"client-1"}


def test_the_adapter_alone_comes_back_and_only_n_is_trained(tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), GaloreConfig(r=4)).eval()
    assert torch.equal(model(tokens()).logits, tiny_llama()(tokens()).logits)
    frozen = snapshot(model)
    model(tokens(), labels=tokens()).loss.backward()
    assert {name.rpartition(".")[2] for name in parameters_of(model)} == {"N"}
    assert all(p.grad is not None and p.grad.any() for p in parameters_of(model).values())
    randomise(model, "default", 1)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert same(get_state(loaded), get_state(model))
    expected = model(tokens()).logits
    torch.testing.assert_close(loaded(tokens()).logits, expected)
    model.merge_adapter()
    torch.testing.assert_close(model(tokens()).logits, expected, atol=2e-4, rtol=1e-4)
    model.unmerge_adapter()
    assert all(torch.equal(frozen[name], p) for name, p in snapshot(model).items())


def test_rows_of_a_batch_go_through_adapters_of_their_own() -> None:
    model = get_peft_model(tiny_llama(), GaloreConfig(r=4)).eval()
    model.add_adapter("second", GaloreConfig(r=2))
    for number, name in enumerate(("default", "second")):
        randomise(model, name, number)
    ids = tokens(rows=3)
    mixed = model(ids, adapter_names=["second", "__base__", "default"]).logits
    for row, name in ((0, "second"), (2, "default")):
        model.set_adapter(name)
        torch.testing.assert_close(mixed[row], model(ids[row : row + 1]).logits[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(mixed[1], tiny_llama()(ids[1:2]).logits[0], atol=1e-4, rtol=1e-4)
    assert any(isinstance(module, GaloreLinear) for module in model.modules())
