"""Methods that add to the base model's weights: what travels, who is sent what, and that the base model comes back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from peft import PeftModel

from clients.session import Session, Site
from fedsb.adapters.attach import scale_of
from fedsb.adapters.fedex_lora import residual
from fedsb.adapters.flora_stacking import stacked
from fedsb.adapters.folding import fold_into
from fedsb.adapters.lora_ga import lora_ga_basis, start
from fedsb.adapters.state import layers_of
from fedsb.basis.frames import Basis
from fedsb.config import RunConfig
from fedsb.data.sites import all_parts
from fedsb.errors import BasisError, ConfigError
from fedsb.models import device_of, load_model, locate
from fedsb.store import adapters
from fedsb.store.basis_files import load_basis
from fedsb.store.export import export_lora
from fedsb.store.files import read_json
from fedsb.training.loop import round_plan
from fedsb.training.start import build_basis
from strategies.records import EVALUATE, FOLDS, PERSONALISE, PREPARE, pack_folds, unpack_folds
from strategies.shared import Shared
from tests.federation.test_methods import config, last_basis
from tests.federation.tiny import assert_same_result, config_of, equal, events, federate, final_state, local_grid, table
from tests.federation.twisted import killed_and_resumed, twisted

FOLDING = pytest.mark.parametrize("method", ["fedex-lora", "flora-stacking"])


def parts(seed: int, count: int, rank: int = 3) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {"A": torch.randn(rank, 7, generator=generator), "B": torch.randn(9, rank, generator=generator)} for _ in range(count)
    ]


def mean_of(clients: list[dict[str, torch.Tensor]], weights: list[float]) -> dict[str, torch.Tensor]:
    return {part: sum(w * c[part].double() for c, w in zip(clients, weights, strict=True)) for part in ("A", "B")}  # type: ignore[misc]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_residual_is_what_averaging_apart_misses(count: int) -> None:
    clients, weights = parts(1, count), [w / (count * (count + 1) / 2) for w in range(1, count + 1)]
    mean = mean_of(clients, weights)
    u, v = residual(clients, weights, mean, 0.5)
    assert u.shape == (9, 3 * (count - 1)) and v.shape == (3 * (count - 1), 7)
    wanted = sum(w * 0.5 * c["B"].double() @ c["A"].double() for c, w in zip(clients, weights, strict=True))
    torch.testing.assert_close(0.5 * mean["B"] @ mean["A"] + u @ v, wanted, rtol=1e-12, atol=1e-12)


def test_what_is_stacked_is_the_mean_of_the_updates() -> None:
    clients, weights = parts(2, 3), [0.2, 0.3, 0.5]
    u, v = stacked(clients, weights, mean_of(clients, weights), 2.0)
    wanted = sum(w * 2 * c["B"].double() @ c["A"].double() for c, w in zip(clients, weights, strict=True))
    torch.testing.assert_close(u @ v, wanted, rtol=1e-12, atol=1e-12)
    assert u.shape == (9, 9)


def test_what_a_client_does_not_hold_is_not_stacked() -> None:
    clients, weights = parts(2, 3), [0.2, 0.3, 0.5]
    clients[1]["B"][:, 1:] = 0  # rank 1
    u, v = stacked(clients, weights, mean_of(clients, weights), 2.0)
    assert u.shape == (9, 7) and v.shape == (7, 7)
    wanted = sum(w * 2 * c["B"].double() @ c["A"].double() for c, w in zip(clients, weights, strict=True))
    torch.testing.assert_close(u @ v, wanted, rtol=1e-12, atol=1e-12)


def test_stacked_ranks_are_the_sum_of_the_clients_and_the_mean_is_exact(llama: str, words: str, tmp_path: Path) -> None:
    """Two rounds; the first one's fold is also computed by hand from what the clients train, each at its rank."""
    ranks = {"client-0": 1, "client-1": 3}  # client-2: 4
    run = config(llama, words, "flora-stacking", adapter={"method": "flora-stacking", "ranks": ranks}, federation={"rounds": 2})
    summary = federate(run, tmp_path)
    folds = last_basis(tmp_path).folds
    assert [{u.shape[1] for u, _ in fold.values()} for fold in folds] == [{8}, {8}]
    assert summary["aggregation_error"] < 1e-6
    session, weights = Session(run), [len(part) for part in all_parts(run, "train")]
    session.use(build_basis(run, session.model, session.tokenizer, session.device))
    wanted: dict[str, Any] = {}
    for i, client in enumerate(run.client_names):
        site = Site(client, i, tmp_path)
        share = session.share(site)
        begun = share.put(share.take(session.base_vector()), torch.zeros(session.layout.size))
        trained = session.layout.unflatten(session.train(site, begun, round_plan(run, 1)).vector)
        for layer in folds[0]:
            update = trained[f"{layer}.B"].double() @ trained[f"{layer}.A"].double() * scale_of(run) * weights[i] / sum(weights)
            wanted[layer] = wanted.get(layer, 0) + update
    for layer, (u, v) in folds[0].items():
        torch.testing.assert_close(u.double() @ v.double(), wanted[layer], rtol=1e-4, atol=1e-8)
    stored = adapters.load(tmp_path / "adapters", "client-1")
    assert stored.manifest.rank == 3
    folder = export_lora(stored, load_basis(tmp_path, stored.manifest.basis_fingerprint), tmp_path / "out")
    loaded: Any = PeftModel.from_pretrained(load_model(locate(run.model.source), run.model, None, device_of("cpu")), folder)
    assert loaded.peft_config["default"].r == 3 + 8 + 8


def test_lora_ga_takes_the_first_directions_of_one_side_and_the_next_of_the_other() -> None:
    u, _, v = torch.linalg.svd(torch.randn(16, 10, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    leading = Basis({"layer": u[:, :4]}, {"layer": v[:4]}, {"layer": torch.zeros(4, 4)})
    basis = lora_ga_basis(leading, 2, 3.0)
    (begin,) = start(basis, 3.0).values()
    c = 16**0.25 / 16**0.5
    torch.testing.assert_close(begin["A"], c * v[:2])
    torch.testing.assert_close(begin["B"], c * u[:, 2:4])
    ((left, right),) = (fold["layer"] for fold in basis.folds)
    torch.testing.assert_close(left @ right + 3.0 * begin["B"] @ begin["A"], torch.zeros(16, 10))


def test_ranks_and_noise_on_each_record_are_refused_together(llama: str, words: str) -> None:
    adapter = {"method": "flora-stacking", "ranks": {"client-0": 1}}
    with pytest.raises(
        ConfigError, match='adapter.method = "flora-stacking" privacy.unit = "record" puts noise on factors beyond'
    ):
        config(llama, words, "flora-stacking", adapter=adapter, privacy={"unit": "record", "epsilon": 1.0})


def test_the_base_model_comes_back_bit_for_bit(llama: str, words: str) -> None:
    session = Session(config(llama, words, "fedex-lora"))
    layers, pristine = layers_of(session.model), {}
    before = {name: layer.get_base_layer().weight.clone() for name, layer in layers.items()}
    generator = torch.Generator().manual_seed(0)
    sides = {name: [torch.randn(n, 2, generator=generator) for n in w.shape] for name, w in before.items()}
    fold = {name: (u, v.T.contiguous()) for name, (u, v) in sides.items()}
    fold_into(layers, [fold, fold], pristine)
    for name, layer in layers.items():
        u, v = fold[name]
        torch.testing.assert_close(layer.get_base_layer().weight, before[name] + 2 * u @ v)
    fold_into(layers, [], pristine)
    assert all(torch.equal(layer.get_base_layer().weight, before[name]) for name, layer in layers.items())


@FOLDING
def test_base_scores_are_the_base_models_after_rounds_of_folding(method: str, llama: str, words: str, tmp_path: Path) -> None:
    folded, plain = (federate(config(llama, words, each), tmp_path / each)["evaluation"] for each in (method, "lora-sb"))
    for client, score in plain["base"].items():
        assert folded["base"][client]["loss"] == pytest.approx(score["loss"], rel=1e-6)
    assert any(folded["global"][c]["loss"] != folded["base"][c]["loss"] for c in folded["base"])


@FOLDING
def test_a_fold_goes_once_to_those_who_lack_it(method: str, llama: str, words: str, tmp_path: Path) -> None:
    """Of three clients two are drawn a round: who sat out is sent what it missed, and nobody anything twice."""
    run = config(llama, words, method, federation={"clients": 3, "rounds": 4, "fraction": 0.6})
    got: dict[int, list[int]] = {}

    grid = local_grid(run, tmp_path)
    push = grid.push_messages

    def seen(messages: Any) -> list[str]:
        messages = list(messages)
        for message in messages:
            if FOLDS in message.content:
                folds = unpack_folds(message.content[FOLDS])
                got.setdefault(message.metadata.dst_node_id, []).append(len(folds))
        return list(push(messages))

    grid.push_messages = seen  # type: ignore[method-assign]
    summary = federate(run, tmp_path, grid=grid)
    assert {sum(counts) for counts in got.values()} == {4}, "everybody ends up with the folds of all four rounds"
    basis = last_basis(tmp_path)
    assert len(basis.folds) == 4
    assert load_basis(tmp_path / "sites", basis.fingerprint).fingerprint == basis.fingerprint
    fold = sum(t.numel() * 4 for pair in basis.folds[0].values() for t in pair)
    state = 4 * summary["trainable_parameters"]
    sent = summary["bytes"]["down"] - 3 * 4 * fold - state * (4 * 2 + 3 + 3)
    assert 0 <= sent < 0.2 * summary["bytes"]["down"], "folds and states are all that is sent but for the questions themselves"


def test_the_residual_of_two_clients_has_the_rank_of_one(llama: str, words: str, tmp_path: Path) -> None:
    run = config(llama, words, "fedex-lora", federation={"clients": 2, "rounds": 1})
    federate(run, tmp_path)
    assert {u.shape[1] for u, _ in last_basis(tmp_path).folds[0].values()} == {4}


def test_more_directions_than_a_layer_has_are_sent_as_the_matrix_itself(llama: str, words: str, tmp_path: Path) -> None:
    run = config(llama, words, "flora-stacking", adapter={"method": "flora-stacking", "rank": 12})
    federate(run, tmp_path)
    assert max(u.shape[1] for u, _ in last_basis(tmp_path).folds[0].values()) == 32  # of 3 · 12


@FOLDING
def test_a_client_that_comes_late_is_sent_all_that_was_folded_in(method: str, llama: str, words: str, tmp_path: Path) -> None:
    run = config(llama, words, method, federation={"min_clients": 2})
    grid = local_grid(run, tmp_path)
    nodes = grid.get_node_ids

    def there() -> list[int]:
        late = len(events(tmp_path, "round")) >= 2 if (tmp_path / "events.jsonl").exists() else False
        return nodes() if late else nodes()[:2]

    grid.get_node_ids = there  # type: ignore[method-assign]
    federate(run, tmp_path, grid=grid)
    assert [e["clients"] for e in events(tmp_path, "round")] == [2, 2, 3]


@FOLDING
def test_killed_between_rounds_and_resumed_is_the_same_run(method: str, llama: str, words: str, tmp_path: Path) -> None:
    run = config(llama, words, method)
    federate(run, tmp_path / "whole")
    killed_and_resumed(run, tmp_path / "cut", rounds=1)
    assert_same_result(tmp_path / "whole", tmp_path / "cut")
    one, other = (
        [(e["loss"], e["aggregation_error"]) for e in read_json(tmp_path / run / "summary.json")["history"]]
        for run in ("whole", "cut")
    )
    assert one == other
    assert last_basis(tmp_path / "whole").fingerprint == last_basis(tmp_path / "cut").fingerprint


def test_lora_ga_from_sketches_and_resumed_before_its_first_round(llama: str, words: str, tmp_path: Path) -> None:
    run = config_of(table(llama, words, adapter={"method": "lora-ga"}))
    assert run.basis.source == "sketch"

    class Died(Exception):
        pass

    def die(kind: str, client: int, reply: Message) -> list[Message]:
        if kind == PREPARE and not (tmp_path / "died").exists():
            (tmp_path / "died").touch()
            raise Died
        return [reply]

    with pytest.raises(Died):
        federate(run, tmp_path / "cut", grid=twisted(run, tmp_path / "cut", die))
    federate(run, tmp_path / "cut", resume=True)
    summary = federate(run, tmp_path / "whole")
    assert equal(final_state(tmp_path / "cut"), final_state(tmp_path / "whole"))
    assert summary["basis"]["source"] == "sketch" and summary["bytes"]["basis"] > 0


def test_a_fold_of_another_basis_is_refused_by_the_client(llama: str, words: str, tmp_path: Path) -> None:
    run = config(llama, words, "fedex-lora")
    session, site = Session(run), Site("client-0", 0, tmp_path)
    basis = build_basis(run, session.model, session.tokenizer, session.device)
    session.prepare(site, basis.fingerprint)
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers_of(session.model).items()}
    fold = {name: (torch.ones(out, 1), torch.ones(1, in_)) for name, (out, in_) in shapes.items()}
    wanted = basis.fold(fold).fingerprint
    with pytest.raises(BasisError, match="was never given basis"):
        session.require(site, wanted, "0" * 64, [fold])
    with pytest.raises(BasisError, match="was never given basis"):
        session.require(site, wanted, basis.fingerprint, [fold, fold])
    session.require(site, wanted, basis.fingerprint, [fold])
    assert session.basis == wanted and load_basis(tmp_path, wanted).folds


def test_folds_survive_the_wire() -> None:
    fold = {"a.b": (torch.rand(3, 2), torch.rand(2, 4)), "c": (torch.rand(2, 1), torch.rand(1, 5))}
    other = {"a.b": (torch.rand(3, 0), torch.rand(0, 4))}
    found = unpack_folds(pack_folds([fold, other]))
    assert len(found) == 2
    for one, two in zip([fold, other], found, strict=True):
        assert one.keys() == two.keys()
        assert all(torch.equal(x, y) for name in one for x, y in zip(one[name], two[name], strict=True))


def test_who_lacks_what() -> None:
    fold = {"layer": (torch.rand(3, 2), torch.rand(2, 4))}
    shared = Shared(Basis({}, {}, {}))
    start = shared.basis.fingerprint
    shared.has_all("a")
    shared.fold(fold)
    shared.has_all("b")
    assert shared.lacks("b") == (shared.basis.fingerprint, ())
    assert shared.lacks("a") == (start, (fold,)) == shared.lacks("unknown")


@FOLDING
@pytest.mark.parametrize(
    ("section", "values", "says"),
    [
        ("model", {"dtype": "bf16"}, "would round away; leave model.dtype out"),
        ("federation", {"wire_dtype": "bf16"}, 'exact only with federation.wire_dtype = "fp32"'),
        ("privacy", {"secure_sum": True}, "adds to the weights after each round"),
        ("privacy", {"unit": "client", "epsilon": 8.0}, "adds to the weights after each round"),
    ],
)
def test_what_cannot_be_is_refused(method: str, section: str, values: dict[str, Any], says: str, llama: str, words: str) -> None:
    federation = {"weighting": "uniform"} if section == "privacy" else {}
    sections = {"federation": federation} | {section: values | (federation if section == "federation" else {})}
    with pytest.raises(ConfigError, match=says):
        config(llama, words, method, **sections)


def test_a_core_at_the_start_of_a_method_without_cores_is_refused(llama: str, words: str) -> None:
    public = {"source": "public", "r0": "paper", "public": {"name": "words", "source": words}}
    with pytest.raises(ConfigError, match='basis.r0 = "paper" is a core\'s, and adapter.method = "lora-ga" has none; drop it'):
        config(llama, words, "lora-ga", basis=public)


def test_lora_ga_needs_twice_the_rank(llama: str, words: str) -> None:
    run = config(llama, words, "lora-ga", adapter={"method": "lora-ga", "rank": 12})
    with pytest.raises(BasisError, match=r"takes 2 · adapter.rank = 24 directions .* smallest has 16; lower the rank to 8"):
        Session(run)


@pytest.mark.parametrize("method", ["fedex-lora", "flora-stacking", "lora-ga"])
def test_private_by_record(method: str, bert: str, labels: str, tmp_path: Path) -> None:
    sections: dict[str, Any] = {
        "model": {"kind": "classification"},
        "adapter": {"method": method},
        "privacy": {"unit": "record", "epsilon": 8.0},
        "federation": {"weighting": "uniform", "rounds": 2},
    }
    run: RunConfig = config_of(table(bert, labels, **sections))
    federate(run, tmp_path)
    assert all(bool(t.isfinite().all()) for t in final_state(tmp_path).values())
    assert len(events(tmp_path, "reply")) == 6


def test_personal_adapters_and_scores_come_from_the_folded_model(llama: str, words: str, tmp_path: Path) -> None:
    run = config(llama, words, "fedex-lora")
    grid = twisted(run, tmp_path, lambda kind, client, reply: [reply])
    federate(run, tmp_path, grid=grid)
    kinds = [kind for kind, _ in grid.asked]
    assert kinds.count(PERSONALISE) == 3 and kinds.count(EVALUATE) == 3


@FOLDING
def test_the_summary_names_the_basis_that_the_adapters_stand_on(method: str, llama: str, words: str, tmp_path: Path) -> None:
    summary = federate(config(llama, words, method), tmp_path)
    assert summary["basis"]["fingerprint"] == last_basis(tmp_path).fingerprint
    assert summary["basis"]["bytes"] == last_basis(tmp_path).nbytes > 0
