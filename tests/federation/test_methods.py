"""Whole federations with each method: what travels, how exact the mean is, one client alone, export, privacy, refusals."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from peft import PeftModel
from peft.tuners.miss.layer import MissLinear
from safetensors.torch import load_file

from clients.session import Session, Site
from fedsb.abilities import FOLDING, FUSING, HEADED, NO_RECORDS, PROMPTING, RANKED, SCALED
from fedsb.adapters.attach import restarted, scale_of, shapes_of, start_state
from fedsb.adapters.bone import BoneLinear
from fedsb.adapters.head import features_of
from fedsb.adapters.methods import METHODS
from fedsb.adapters.share import share_of
from fedsb.adapters.state import HEAD, get_state, layers_of, set_state
from fedsb.aggregation.folding import fold_of
from fedsb.basis.frames import Basis
from fedsb.cli.evaluate import evaluate_run
from fedsb.config import RunConfig
from fedsb.errors import AdapterError, BasisError, ConfigError, PrivacyError, StoreError
from fedsb.models import device_of, load_model, load_tokenizer, locate
from fedsb.privacy.accounting import epsilon
from fedsb.store import adapters
from fedsb.store.basis_files import first_basis, load_basis
from fedsb.store.export import export_core, export_hira, export_lora
from fedsb.store.files import read_json
from fedsb.store.ledger import NAME, Ledger
from fedsb.training.loop import round_plan
from fedsb.training.private import check_gradients
from fedsb.training.start import build_basis
from strategies.records import ARRAYS, PREPARE, TRAIN, pack_basis, unpack_basis, unpack_state
from strategies.sums import PAYLOAD
from tests.federation.tiny import (
    classification,
    config_of,
    equal,
    events,
    federate,
    final_state,
    lasting,
    personal_states,
    table,
)
from tests.federation.twisted import killed_and_resumed, twisted
from tests.reference import bone_update

EVERY = pytest.mark.parametrize("method", METHODS)
CHANGING = pytest.mark.parametrize("method", [method for method in METHODS if method not in PROMPTING])  # weights
OTHERS = [  # without cores
    method for method, says in METHODS.items() if says.frames != ("B", "A") and not says.expand and method not in PROMPTING
]
FAMILY = pytest.mark.parametrize("method", OTHERS)
TOKENS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


def config(llama: str, words: str, method: str, **sections: Any) -> RunConfig:
    return config_of(table(llama, words, **{"adapter": {"method": method}, **basis_for(method, words), **sections}))


def basis_for(method: str, task: str) -> dict[str, Any]:
    """The section of a method that needs one: of LoRA-GA public examples, with which one side alone can build its basis."""
    public = {"source": "public", "examples": 8, "public": {"name": "words", "source": task}}
    return {"basis": public} if method == "lora-ga" else {}


def delta(layer: Any) -> torch.Tensor:
    """The update of one layer's weight (out, in)."""
    if isinstance(layer, MissLinear):  # PEFT has no function of it
        d = layer.miss_block["default"]
        return torch.stack([d[i % len(d)] for i in range(layer.in_features)], 1)
    if isinstance(layer, BoneLinear):
        return bone_update(layer.base_layer.weight, layer.bone("default"), layer.fedsb_bone_form["default"])
    update: torch.Tensor = layer.get_delta_weight("default")
    return update


def weights_of(run: RunConfig) -> dict[str, torch.Tensor]:
    """Layer → W0."""
    return {name: layer.get_base_layer().weight for name, layer in layers_of(Session(run).model).items()}


def dense(run: RunConfig, state: dict[str, torch.Tensor], basis: Basis | None = None) -> dict[str, torch.Tensor]:
    """Layer → by how much its weight differs from the base model's, as the model itself has it under a state and a basis."""
    session = opened(run, state, basis)
    found = {}
    for name, layer in layers_of(session.model).items():
        folded = sum((u.double() @ v.double() for fold in session.folds for u, v in [fold[name]]), torch.zeros(()))
        found[name] = delta(layer).detach().double() + folded
    return found


def opened(run: RunConfig, state: dict[str, torch.Tensor], basis: Basis | None = None) -> Session:
    """A session with a basis, by default the one that the run starts with, and a state in place."""
    session = Session(run)
    session.use(basis or build_basis(run, session.model, session.tokenizer, session.device))
    set_state(session.model, state)
    return session


def started(run: RunConfig) -> Session:
    """A session as every client starts."""
    session = Session(run)
    basis = build_basis(run, session.model, session.tokenizer, session.device)
    return opened(run, start_state(session.layout, basis, run), basis)


def last_basis(run: Path) -> Basis:
    """The basis of a run's newest checkpoint."""
    record = sorted((run / "checkpoints").glob("*/round.json"))[-1]
    return load_basis(run, read_json(record)["basis_fingerprint"])


@EVERY
def test_it_trains_scores_and_publishes(method: str, llama: str, words: str, tmp_path: Path) -> None:
    longer = {"steps": 8, "learning_rate": 0.3} if method in FUSING else {}  # a few numbers, that mix random adapters
    run = config(llama, words, method, train=longer)
    summary = federate(run, tmp_path)
    assert summary["method"] == method
    parts = {name.rpartition(".")[2] for name in final_state(tmp_path)}
    assert parts == set(METHODS[method].parts) - set(METHODS[method].kept)
    base, after = (sum(s["loss"] for s in summary["evaluation"][which].values()) for which in ("base", "global"))
    assert after < base
    assert set(personal_states(tmp_path)) == set(run.client_names)
    scores = evaluate_run(tmp_path, sequential=True)
    for which in ("base", "global", "personal"):
        for client, score in summary["evaluation"][which].items():
            assert scores[which][client]["loss"] == pytest.approx(score["loss"], rel=1e-5)


@EVERY
def test_the_base_model_is_where_everybody_starts(method: str, llama: str, words: str) -> None:
    run = config(llama, words, method)
    source = locate(run.model.source)
    plain = load_model(source, run.model, None, device_of("cpu"))
    close = {"rtol": 1e-3, "atol": 1e-3} if method == "lora-xs" else {}  # its core starts as near to 0 as N(0, 1e-5²) is
    if method == "lorafusion-product":  # whose gradient would be 0 there: it starts from the first adapter of the pool
        plain = PeftModel.from_pretrained(plain, sorted(Path(str(run.basis.pool)).iterdir())[0])
    torch.testing.assert_close(started(run).model(input_ids=TOKENS).logits, plain(input_ids=TOKENS).logits, **close)


def expanded_parts(run: RunConfig, session: Session, state: dict[str, torch.Tensor]) -> Any:
    """Layer → the parts that the method's chain takes, fp64."""
    method, shapes = METHODS[run.adapter.method], shapes_of(session.model)
    layers = {layer: {part: state[f"{layer}.{part}"].double() for part in method.parts} for layer in shapes}
    return method.expand(layers, shapes, run.adapter.rank, run.seed) if method.expand else layers


@CHANGING
def test_the_chain_is_the_update_that_the_layer_adds(method: str, llama: str, words: str) -> None:
    alpha = {"alpha": 12.0} if method in SCALED else {}
    run = config(llama, words, method, adapter={"method": method, **alpha})
    session = Session(run)
    torch.manual_seed(0)
    state = {name: torch.randn_like(t) for name, t in session.layout.unflatten(session.base_vector()).items()}
    found = dense(run, state)
    basis = build_basis(run, session.model, session.tokenizer, session.device)
    assert scale_of(run) == (6.0 if method == "lora-ga" else 3.0 if method in SCALED else 1.0)
    folded = {name: u.double() @ v.double() for fold in basis.folds for name, (u, v) in fold.items()}
    for layer, update in found.items():
        parts = expanded_parts(run, session, state)[layer]
        b, a = (side[layer].double() if layer in side else None for side in (basis.B, basis.A))
        product = METHODS[method].update(parts, b, a, scale_of(run), weights_of(run)[layer])
        torch.testing.assert_close(product + folded.get(layer, 0), update, rtol=1e-4, atol=1e-5)


@CHANGING
def test_the_aggregation_error_is_that_of_the_dense_updates(method: str, llama: str, words: str, tmp_path: Path) -> None:
    """One round: what the clients sent, formed as matrices, against what the server made of it."""
    rate = {"train": {"learning_rate": 0.3}} if method == "lorafusion-product" else {}  # whose terms that differ are squares
    run = config(llama, words, method, federation={"rounds": 1, "weighting": "uniform"}, **rate)
    sent: list[torch.Tensor] = []

    def watch(kind: str, client: int, reply: Message) -> list[Message]:
        if kind == TRAIN:
            sent.append(unpack_state(reply.content[ARRAYS]))
        return [reply]

    summary = federate(run, tmp_path, grid=twisted(run, tmp_path, watch))
    if METHODS[method].kept:
        assert summary["aggregation_error"] is None, "the server never sees an update"
        return
    layout, before = Session(run).layout, get_state(started(run).model)
    share = share_of(layout, method, run.adapter.rank, up=True)
    whole = [share.put(vector, layout.flatten(before)) for vector in sent]  # what only goes down is as it was
    updates = [dense(run, layout.unflatten(vector)) for vector in (sent if METHODS[method].in_turn else whole)]
    mean = {name: sum(update[name] for update in updates) / len(updates) for name in updates[0]}
    got = dense(run, final_state(tmp_path), last_basis(tmp_path))
    norm = sum(float(m.square().sum()) for m in mean.values()) ** 0.5
    exact = sum(float((mean[name] - got[name]).square().sum()) for name in mean) ** 0.5 / norm
    if METHODS[method].exact:
        assert exact < 1e-6 and summary["aggregation_error"] < 1e-6
    else:
        assert exact > 1e-4
        assert summary["aggregation_error"] == pytest.approx(exact, rel=0.5)  # four probes


@EVERY
def test_one_client_alone_is_local_training(method: str, llama: str, words: str, tmp_path: Path) -> None:
    rounds = 1 if method == "flexlora" else 2  # of which only the product of the factors is kept
    run = config(llama, words, method, federation={"clients": 1, "rounds": rounds})
    federate(run, tmp_path)
    session = started(run)
    site, layout, basis = Site("client-0", 0, tmp_path), session.layout, first_basis(tmp_path)
    assert basis is not None
    vector = layout.flatten(get_state(session.model))
    for number in range(1, rounds + 1):
        vector = session.train(site, vector, round_plan(run, number)).vector
        state = layout.unflatten(vector)
        if METHODS[method].restarts:
            rule = METHODS[method].fold
            assert rule
            basis = basis.fold(fold_of(rule, [(state, 1.0)], state, 1.0))
            session.use(basis)
            vector = layout.flatten(restarted(layout, run.seed, number, state))
    whole = layout.unflatten(vector)
    assert basis.fingerprint == last_basis(tmp_path).fingerprint, "one client alone leaves nothing to fold in, but by restarting"
    if method == "flexlora":
        expected, found = dense(run, whole), dense(run, final_state(tmp_path))
        for layer, update in expected.items():
            torch.testing.assert_close(found[layer], update, rtol=1e-4, atol=1e-7)
        return
    assert equal({name: whole[name] for name in final_state(tmp_path)}, final_state(tmp_path))
    assert whole.keys() - final_state(tmp_path).keys() == set(session.kept)


@EVERY
def test_a_killed_run_resumes_to_the_same_bits(method: str, llama: str, words: str, tmp_path: Path) -> None:
    run = config(llama, words, method)
    whole, resumed = federate(run, tmp_path / "whole"), killed_and_resumed(run, tmp_path / "cut", rounds=2, replies=0)
    assert equal(final_state(tmp_path / "whole"), final_state(tmp_path / "cut"))
    assert lasting(whole, "bytes")["evaluation"] == lasting(resumed, "bytes")["evaluation"]


@CHANGING
def test_an_unmodified_peft_reads_the_export(method: str, bert: str, labels: str, tmp_path: Path) -> None:
    alpha = {"alpha": 8.0} if method in SCALED else {}
    run = config_of(classification(bert, labels, adapter={"method": method, **alpha}, **basis_for(method, labels)))
    federate(run, tmp_path)
    stored = adapters.load(tmp_path / "adapters", "client-1")
    whole: dict[str, Any] = {"weights": weights_of(run), "rank": 32} if METHODS[method].takes_weights else {}
    source = locate(run.model.source)
    features = features_of(load_model(source, run.model, 3, device_of("cpu")), load_tokenizer(source))
    assert features is not None and features.mean.norm() > 0.1
    basis = load_basis(tmp_path, stored.manifest.basis_fingerprint)
    with pytest.raises(StoreError, match="client-1 has a head on standardised features, which no other program knows"):
        export_lora(stored, basis, tmp_path / "out", **whole)
    folder = export_lora(stored.plain(features), basis, tmp_path / "out", **whole)
    ours = opened(run, stored.state, last_basis(tmp_path)).model(input_ids=TOKENS).logits
    loaded = PeftModel.from_pretrained(load_model(source, run.model, 3, device_of("cpu")), folder)
    torch.testing.assert_close(loaded(input_ids=TOKENS).logits, ours, rtol=1e-4, atol=1e-5)
    assert not any("fedsb" in name for name in load_file(folder / "adapter_model.safetensors"))
    card = (folder / "README.md").read_text()
    assert METHODS[method].says in card and ("basis fingerprint" in card) == bool(METHODS[method].frames)


@pytest.mark.parametrize("method", ["flora", "flora-ones"])
def test_an_unmodified_peft_reads_what_multiplies_as_hira(method: str, bert: str, labels: str, tmp_path: Path) -> None:
    alpha = {"alpha": 8.0} if method in SCALED else {}
    run = config_of(classification(bert, labels, adapter={"method": method, **alpha}))
    federate(run, tmp_path)
    stored = adapters.load(tmp_path / "adapters", "client-1")
    basis = load_basis(tmp_path, stored.manifest.basis_fingerprint)
    source = locate(run.model.source)
    features = features_of(load_model(source, run.model, 3, device_of("cpu")), load_tokenizer(source))
    assert features is not None
    folder = export_hira(stored.plain(features), basis, tmp_path / "out")
    told = [sys.executable, "-c", LOAD_WITHOUT_US, str(folder), bert]
    done = subprocess.run(told, capture_output=True, text=True, check=True)
    ours = opened(run, stored.state).model(input_ids=TOKENS).logits
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout)), ours, rtol=1e-4, atol=1e-5)
    assert ("here as a HiRA of rank 5" in (folder / "README.md").read_text()) == (method == "flora-ones")


LOAD_WITHOUT_US = f"""
import json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification
base = AutoModelForSequenceClassification.from_pretrained(sys.argv[2], num_labels=3)
model = PeftModel.from_pretrained(base, sys.argv[1]).eval()
assert not any(name.startswith("fedsb") for name in sys.modules)
print(json.dumps(model(input_ids=torch.tensor({TOKENS.tolist()})).logits.tolist()))
"""


@pytest.mark.parametrize("method", ["lora-sb", "bone"])
def test_what_adds_to_weights_is_no_hira(method: str, llama: str, words: str, tmp_path: Path) -> None:
    run = config(llama, words, method, federation={"rounds": 1})
    federate(run, tmp_path)
    stored = adapters.load(tmp_path / "adapters", "client-0")
    with pytest.raises(StoreError, match=f"{method} multiplies no weights, and so is no HiRA; use --format lora"):
        export_hira(stored, load_basis(tmp_path, stored.manifest.basis_fingerprint), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["lora-sb", "ravan", "refreshed-sb", "lorafusion", "lorafusion-product"])
def test_our_peft_type_reads_the_format_of_ours(method: str, llama: str, words: str, tmp_path: Path) -> None:
    run = config(llama, words, method, federation={"rounds": 1})
    federate(run, tmp_path)
    stored = adapters.load(tmp_path / "adapters", "client-0")
    folder = export_core(stored, load_basis(tmp_path, stored.manifest.basis_fingerprint), tmp_path / "out")
    loaded = PeftModel.from_pretrained(load_model(locate(run.model.source), run.model, None, device_of("cpu")), folder)
    torch.testing.assert_close(loaded(input_ids=TOKENS).logits, opened(run, stored.state).model(input_ids=TOKENS).logits)
    assert equal(get_state(loaded), stored.state)


def test_coefficients_in_fewer_bits_are_a_file_that_our_peft_type_reads(llama: str, words: str, tmp_path: Path) -> None:
    run = config(llama, words, "nola", adapter={"method": "nola", "alpha": 8.0, "bases": 6}, federation={"rounds": 1})
    federate(run, tmp_path)
    stored = adapters.load(tmp_path / "adapters", "client-0")
    basis = load_basis(tmp_path, stored.manifest.basis_fingerprint)
    ours = opened(run, stored.state).model(input_ids=TOKENS).logits
    plain = load_model(locate(run.model.source), run.model, None, device_of("cpu"))(input_ids=TOKENS).logits
    off = []
    for bits in (32, 8, 4):
        folder = export_core(stored, basis, tmp_path / str(bits), bits=bits)
        assert "import fedsb.adapters.nola" in (folder / "README.md").read_text()
        model = load_model(locate(run.model.source), run.model, None, device_of("cpu"))
        loaded = PeftModel.from_pretrained(model, folder)
        off.append((loaded(input_ids=TOKENS).logits - ours).abs().max().item())
    moved = (plain - ours).abs().max().item()
    assert off[0] < 1e-5 < off[1] < off[2] < 0.2 * moved
    bare = adapters.StoredAdapter(stored.state, stored.manifest.model_copy(update={"seed": None}))
    with pytest.raises(AdapterError, match="client-0 does not say its seed or layers; publish it anew"):
        export_lora(bare, basis, tmp_path / "bare")


def test_nothing_but_coefficients_travels(llama: str, words: str, tmp_path: Path) -> None:
    summary = federate(config(llama, words, "nola", adapter={"method": "nola", "bases": 6}), tmp_path)
    layers = len(layers_of(Session(config(llama, words, "lora")).model))
    assert summary["trainable_parameters"] == layers * 12 and summary["bytes"]["basis"] == 0


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"nola"}))
def test_random_matrices_of_what_has_none_are_refused(method: str, llama: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f'adapter.bases is of nola, and adapter.method = "{method}" has none'):
        config(llama, words, method, adapter={"method": method, "bases": 4})


@FAMILY
def test_no_format_of_ours_without_cores(method: str, llama: str, words: str, tmp_path: Path) -> None:
    run = config(llama, words, method, federation={"rounds": 1})
    federate(run, tmp_path)
    stored = adapters.load(tmp_path / "adapters", "client-0")
    other = "hira" if METHODS[method].multiplies else "lora"
    with pytest.raises(StoreError, match=f"{method} has no cores, .* --format {other}"):
        export_core(stored, load_basis(tmp_path, stored.manifest.basis_fingerprint), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_half_as_much_travels_with_a_frozen_and_shared_a(llama: str, words: str, tmp_path: Path) -> None:
    whole, half = (
        federate(config(llama, words, method), tmp_path / method)["trainable_parameters"] for method in ("lora", "ffa-lora")
    )
    shapes = [
        (layer.out_features, layer.in_features) for layer in layers_of(Session(config(llama, words, "lora")).model).values()
    ]
    assert half == sum(4 * out for out, _ in shapes) and whole == half + sum(4 * in_ for _, in_ in shapes)
    run = config(llama, words, "ffa-lora")
    trained = opened(run, final_state(tmp_path / "ffa-lora"))
    for name, layer in layers_of(started(run).model).items():
        assert torch.equal(layer.lora_A["default"].weight, layers_of(trained.model)[name].lora_A["default"].weight)
    one, other = (
        {name: layer.lora_A["default"].weight for name, layer in layers_of(started(run).model).items()}
        for run in (
            config(llama, words, "ffa-lora"),
            config_of(table(llama, words, adapter={"method": "ffa-lora"}) | {"seed": 4}),
        )
    )
    assert one.keys() == other.keys()
    assert not any(torch.equal(one[name], other[name]) for name in one), "A follows from the seed"


@pytest.mark.parametrize("method", ["lora", "ffa-lora", "ravan", "flora", "lorafusion"])
def test_private_by_record_and_by_client_and_under_a_secure_sum(method: str, bert: str, labels: str, tmp_path: Path) -> None:
    units = [unit for unit, refused in (("record", NO_RECORDS), ("client", FOLDING)) if method not in refused]
    for unit in units:
        privacy = {"unit": unit, "epsilon": 8.0, "secure_sum": unit == "client"}
        run = config_of(
            classification(
                bert,
                labels,
                adapter={"method": method},
                privacy=privacy,
                federation={"clients": 4, "weighting": "uniform", "rounds": 1},
                data={"partition": "iid"},
            )
        )
        shown: list[list[str]] = []

        def watch(kind: str, client: int, reply: Message, shown: list[list[str]] = shown) -> list[Message]:
            if kind == TRAIN:
                shown.append(list(reply.content[ARRAYS]))
            return [reply]

        federate(run, tmp_path / unit, grid=twisted(run, tmp_path / unit, watch))
        assert shown == [[PAYLOAD if unit == "client" else "state"]] * 4
        federate(run, tmp_path / f"{unit} again")
        again = final_state(tmp_path / f"{unit} again")
        assert not any(torch.equal(tensor, again[name]) for name, tensor in final_state(tmp_path / unit).items()), "noise"
        found = Ledger(tmp_path / unit / "sites" / "client-0" / NAME, "client-0").entries()
        units = found[0].records if unit == "record" else 4
        assert 0 < epsilon([entry.release for entry in found], 1 / units).best <= 8.0
        state = final_state(tmp_path / unit)
        assert any(name.startswith(HEAD) for name in state) and all(bool(t.isfinite().all()) for t in state.values())


def test_a_state_of_another_method_is_refused(llama: str, words: str, tmp_path: Path) -> None:
    run = config(llama, words, "lora", federation={"rounds": 1})
    federate(run, tmp_path)
    stored = adapters.load(tmp_path / "adapters", "client-0")
    told = {
        "base_model": stored.manifest.base_model,
        "rank": 4,
        "basis_fingerprint": stored.manifest.basis_fingerprint,
        "round": 1,
        "task": "words",
    }
    with pytest.raises(AdapterError, match="is neither core nor a head parameter"):
        adapters.publish(tmp_path / "store", "client-0", stored.state, method="lora-sb", **told)
    with pytest.raises(AdapterError, match="is neither B nor a head parameter"):
        adapters.publish(tmp_path / "store", "client-0", stored.state, method="ffa-lora", **told)
    torn = {name: tensor for name, tensor in stored.state.items() if not name.endswith("q_proj.A")}
    with pytest.raises(AdapterError, match="q_proj lacks a part"):
        adapters.publish(tmp_path / "store", "client-0", torn, method="lora", **told)
    with pytest.raises(AdapterError, match="is of the method 'magic', which this version does not have"):
        adapters.publish(tmp_path / "store", "client-0", stored.state, method="magic", **told)
    with pytest.raises(AdapterError, match="in only one of model and adapter"):
        opened(config(llama, words, "ffa-lora"), stored.state)


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"lora-sb", "nested-sb"}))
def test_what_it_has_no_use_for_is_refused_by_name(method: str, llama: str, words: str) -> None:
    source = "random" if method == "lora-xs" else "weights"
    with pytest.raises(ConfigError, match=f'adapter.method = "{method}" has no basis for basis.source = "{source}"'):
        config(llama, words, method, basis={"source": source})


@pytest.mark.parametrize("method", sorted(METHODS.keys() - SCALED))
def test_a_scale_of_what_has_none_is_refused(method: str, llama: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f'"{method}" has no scale'):
        config(llama, words, method, adapter={"method": method, "alpha": 8.0})


@pytest.mark.parametrize("method", NO_RECORDS)
def test_privacy_by_record_is_refused_where_records_have_no_gradients(method: str, llama: str, words: str) -> None:
    privacy, federation = {"unit": "record", "epsilon": 8.0}, {"weighting": "uniform"}
    with pytest.raises(ConfigError, match=f'adapter.method = "{method}" does not give; set privacy.unit = "client"'):
        config(llama, words, method, privacy=privacy, federation=federation)
    run = config(llama, words, "lora", privacy=privacy, federation=federation)
    blind = Session(run.model_copy(update={"adapter": run.adapter.model_copy(update={"method": method})}))
    with pytest.raises(PrivacyError, match="no gradients of single records"):
        check_gradients(blind.transformer, blind.parameters, "causal", 0)


@pytest.mark.parametrize("method", sorted(METHODS.keys() - set(HEADED)))
def test_heads_of_what_has_none_are_refused(method: str, llama: str, words: str) -> None:
    with pytest.raises(
        ConfigError, match=f'adapter.heads are those of ravan, refreshed-sb, .*, and adapter.method = "{method}" has none'
    ):
        config(llama, words, method, adapter={"method": method, "heads": 4})


@EVERY
def test_one_rank_for_all_is_all_that_most_have(method: str, llama: str, words: str) -> None:
    ranks = {"method": method, "ranks": {"client-1": 2}}
    if method in RANKED:
        assert config(llama, words, method, adapter=ranks).rank_of("client-1") == 2
        return
    with pytest.raises(ConfigError, match=f'"{method}" gives every client one rank.*nested-sb'):
        config(llama, words, method, adapter=ranks)


def test_what_a_model_is_told_first_leaves_torchs_own_chance_alone(llama: str, words: str) -> None:
    """PEFT draws a LoRA's A when it makes one."""
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    session = Session(config(llama, words, "lora"))
    assert torch.equal(torch.rand(3), expected)
    assert get_state(session.model).keys() == session.layout.unflatten(session.base_vector()).keys()


@EVERY
def test_a_client_that_says_it_has_another_basis_is_sent_this_one_and_then_refused(
    method: str, llama: str, words: str, tmp_path: Path
) -> None:
    run = config(llama, words, method, federation={"rounds": 1})

    def lie(kind: str, client: int, reply: Message) -> list[Message]:
        if kind == PREPARE and client == 1:
            reply.content["identity"]["basis"] = "0" * 64
        return [reply]

    grid = twisted(run, tmp_path, lie)
    federate(run, tmp_path, grid=grid)
    assert [kind for kind, client in grid.asked if client == 1].count(PREPARE) >= 2
    assert "holds another basis, although it was sent this one" in {e["reason"] for e in events(tmp_path, "refused")}
    assert {e["client"] for e in events(tmp_path, "reply")} == {"client-0", "client-2"}


def test_a_basis_survives_the_wire_whatever_it_has(llama: str, words: str) -> None:
    for method in METHODS:
        run = config(llama, words, method)
        session = Session(run)
        basis = build_basis(run, session.model, session.tokenizer, session.device)
        assert unpack_basis(pack_basis(basis)).fingerprint == basis.fingerprint


def test_a_basis_of_another_method_is_refused(llama: str, words: str) -> None:
    bases = {}
    for method in METHODS:
        session = Session(config(llama, words, method))
        bases[method] = build_basis(session.config, session.model, session.tokenizer, session.device)
    for method in METHODS:
        session = Session(config(llama, words, method))
        for other, basis in bases.items():
            mine, its = METHODS[method], METHODS[other]
            folds_differ = mine.fold is None and (mine.start is None) != (its.start is None)
            if mine.frames != its.frames or folds_differ or (mine.frame and other != method):
                with pytest.raises(BasisError, match=f"was not made for adapter.method = {method}"):
                    session.use(basis)
