"""LoPA in a federation: prompts of each text's own, their mean, export, an encoder that must be the same, privacy, refusals."""

import dataclasses
import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from clients.session import Session, Site
from fedsb import models
from fedsb.adapters.lopa import LopaModel, Shared
from fedsb.adapters.methods import METHODS
from fedsb.adapters.state import get_state, parameters_of, set_state
from fedsb.config import RunConfig
from fedsb.data.batches import collate, with_instances
from fedsb.errors import CheckpointError, ConfigError, FederationError, ModelError, StoreError
from fedsb.models import device_of, load_model, locate
from fedsb.serving.evaluator import answers
from fedsb.store import adapters
from fedsb.store.basis_files import first_basis
from fedsb.store.export import export_core, export_lora
from fedsb.store.files import read_json
from fedsb.training.loss import causal_loss
from fedsb.training.private import gradients_of_records
from strategies.records import ARRAYS, TRAIN, unpack_state
from tests.federation.test_methods import config, started
from tests.federation.tiny import WORDS, config_of, federate, final_state, table
from tests.federation.twisted import twisted


@pytest.fixture
def run(llama: str, words: str) -> RunConfig:
    return config(llama, words, "lopa", train={"learning_rate": 0.05})


def _told(session: Session) -> Any:
    """A state whose networks say something."""
    torch.manual_seed(0)
    return {name: torch.randn_like(t) for name, t in get_state(session.model).items()}


def test_the_reported_error_is_that_of_the_prompts(run: RunConfig, tmp_path: Path) -> None:
    """What the clients' parts make of instances, on average, against what the mean of the parts makes of them."""
    sent: list[torch.Tensor] = []

    def watch(kind: str, client: int, reply: Message) -> list[Message]:
        if kind == TRAIN:
            sent.append(unpack_state(reply.content[ARRAYS]))
        return [reply]

    content = run.model_copy(update={"federation": run.federation.model_copy(update={"rounds": 1, "weighting": "uniform"})})
    summary = federate(content, tmp_path, grid=twisted(content, tmp_path, watch))
    session = started(content)
    instances = torch.nn.functional.normalize(torch.randn(200, 16, generator=torch.Generator().manual_seed(1)), dim=1)

    def prompts(state: Any) -> torch.Tensor:
        set_state(session.model, state)
        return session.transformer.model.embed_tokens.prompts(instances).detach().double()

    mean = sum(prompts(session.layout.unflatten(vector)) for vector in sent) / len(sent)
    exact = float((mean - prompts(final_state(tmp_path))).norm() / mean.norm())
    assert len(sent) == 3 and exact > 1e-6 and not METHODS["lopa"].exact
    assert summary["aggregation_error"] == pytest.approx(exact, rel=0.5)


def test_a_state_is_scored_with_each_texts_own_prompt(run: RunConfig, tmp_path: Path) -> None:
    session, site = started(run), Site("client-0", 0, tmp_path)
    state = _told(session)
    vector = session.layout.flatten(state)
    rows, examples = session.rows(site, "test"), session.examples(site, "test")
    assert session.encoder is not None
    embedded = session.encoder.encode([example.prompt for example in examples])
    assert torch.equal(torch.stack([row.instance for row in rows if row.instance is not None]), embedded)
    losses = []
    set_state(session.model, state)
    model = session.model.get_base_model()
    with torch.no_grad():
        for row, instance in zip(rows, embedded, strict=True):
            ids = torch.tensor([[*row.prompt, *row.completion]])
            told = torch.cat([model.model.embed_tokens.prompts(instance[None]), model.model.embed_tokens(ids)], 1)
            logits = model(inputs_embeds=told).logits[0, -len(row.completion) - 1 : -1]
            losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(row.completion)))
    assert session.score(site, vector).loss == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)
    plain = load_model(locate(run.model.source), run.model, None, device_of("cpu"))
    bare = [causal_loss(plain, collate(with_instances([row], [None]), 0, "causal")) for row in rows]
    assert session.score_base(site).loss == pytest.approx(float(torch.stack(bare).mean()), rel=1e-5), "without any prompt"


def test_answers_are_generated_after_the_prompt(llama: str, tmp_path: Path) -> None:
    """Where the answer ends a longer text, it is generated; rows of a batch have prompts of their own."""
    rows = [f'{{"prompt": "{a} {b}", "completion": "{b} #### {a}", "answer": "{a}"}}' for a, b in itertools.pairwise(WORDS)]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows))
    run = config(llama, f"jsonl:{tmp_path}", "lopa", evaluation={"max_new_tokens": 5, "batch_size": 4}, federation={"clients": 1})
    session, site = started(run), Site("client-0", 0, tmp_path)
    state = _told(session)
    examples, rows_ = session.examples(site, "test"), session.rows(site, "test")
    assert all(example.answer != example.completion for example in examples)
    set_state(session.model, state)
    model, said = session.model.base_model, []
    assert isinstance(model, LopaModel)
    for row in rows_:
        ids = torch.tensor([row.prompt])
        assert row.instance is not None
        told: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": 1}
        new = model.generate(ids, torch.ones_like(ids), instance=row.instance[None], **told)
        said.append(session.tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True))
    expected = [dataclasses.replace(example, answer=text.split()[-1]) for example, text in zip(examples, said, strict=True)]
    hits = [answers(text, example.answer) for text, example in zip(said, expected, strict=True)]
    assert all(hits) and len(set(said)) > 1, "each text is told its own"
    session.examples = lambda *_: expected  # type: ignore[assignment]
    assert session.score(site, session.layout.flatten(state)).exact_match == 1.0


def test_peft_reads_the_export(run: RunConfig, tmp_path: Path) -> None:
    federate(run, tmp_path / "run")
    stored = adapters.load(tmp_path / "run" / "adapters", "client-1")
    basis = first_basis(tmp_path / "run")
    assert basis is not None and basis.nbytes == 0
    encoder = locate(run.adapter.encoder)
    assert stored.manifest.encoder == adapters.ModelId(name=encoder.name, sha256=encoder.sha256)
    folder = export_core(stored, basis, tmp_path / "out")
    assert "import fedsb.adapters.lopa" in (folder / "README.md").read_text()
    loaded = PeftModel.from_pretrained(load_model(locate(run.model.source), run.model, None, device_of("cpu")), folder)
    assert loaded.peft_config["default"].encoder == run.adapter.encoder
    found = get_state(loaded)
    assert found.keys() == stored.state.keys() and all(torch.equal(found[name], stored.state[name]) for name in found)
    with pytest.raises(StoreError, match="lopa changes no weights, and so is no LoRA; use --format core"):
        export_lora(stored, basis, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
    told = read_json(tmp_path / "run" / "summary.json")["encoder"]
    assert told["sha256"] == encoder.sha256 and told["parameters"] == AutoModel.from_pretrained(encoder.folder).num_parameters()


def test_an_encoder_that_is_not_whole_is_refused(run: RunConfig, tmp_path: Path) -> None:
    """Missing weights would be random numbers, other ones at each site."""
    encoder = tmp_path / "encoder"
    shutil.copytree(run.adapter.encoder, encoder)
    weights = load_file(encoder / "model.safetensors")
    (encoder / "model.safetensors").unlink()
    save_file({name: t for name, t in weights.items() if "layer.1" not in name}, encoder / "model.safetensors", {"format": "pt"})
    own = run.model_copy(update={"adapter": run.adapter.model_copy(update={"encoder": str(encoder)})})
    with pytest.raises(ModelError, match=r"adapter.encoder = .*encoder lacks the weights encoder.layer.1.* name a whole model"):
        Session(own)
    (encoder / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ModelError, match="adapter.encoder = .* cannot be read"):
        Session(own)
    gone = run.model_copy(update={"adapter": run.adapter.model_copy(update={"encoder": str(tmp_path / "gone")})})
    with pytest.raises(ModelError, match="adapter.encoder = .*gone: is no folder or file here"):
        Session(gone)


def test_another_encoder_is_another_run(run: RunConfig, llama: str, tmp_path: Path) -> None:
    """Its folder's weights are changed between a run's end and its being scored, and on one client only."""
    encoder = tmp_path / "encoder"
    shutil.copytree(run.adapter.encoder, encoder)
    own = run.model_copy(update={"adapter": run.adapter.model_copy(update={"encoder": str(encoder)})})
    federate(own, tmp_path / "run")
    weights = encoder / "model.safetensors"
    before = Session(own).identity
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.unlink()
    weights.write_bytes(data)
    models._digest.cache_clear()  # which remembers what it has read
    assert Session(own).identity != before
    with pytest.raises((CheckpointError, FederationError)):
        federate(own, tmp_path / "run", resume=True)


def test_single_records_have_gradients_of_their_own(run: RunConfig, tmp_path: Path) -> None:
    session, site = started(run), Site("client-0", 0, tmp_path)
    set_state(session.model, _told(session))
    session.model.train()  # Opacus looks at nothing else
    rows, parameters = session.rows(site, "train")[:3], parameters_of(session.model)
    assert any(isinstance(module, Shared) for module in session.model.modules())
    with gradients_of_records(session.transformer, parameters):
        (causal_loss(session.transformer, collate(rows, 0, "causal")) * 3).backward()
        together = {name: p.grad_sample.clone() for name, p in parameters.items()}  # type: ignore[attr-defined]
    for i, row in enumerate(rows):
        session.model.zero_grad()
        causal_loss(session.transformer, collate([row], 0, "causal")).backward()
        for name, parameter in parameters.items():
            assert parameter.grad is not None and parameter.grad.any()
            torch.testing.assert_close(together[name][i], parameter.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("section", [{"unit": "record", "noise_multiplier": 1.0}, {"secure_sum": True}])
def test_it_learns_in_private(section: dict[str, Any], llama: str, words: str, tmp_path: Path) -> None:
    run = config(llama, words, "lopa", privacy=section, federation={"weighting": "uniform"}, personal={"steps": 0})
    summary = federate(run, tmp_path)
    assert len(summary["history"]) == 3 and all(t.isfinite().all() for t in final_state(tmp_path).values())


def test_what_does_not_go_together_is_refused(llama: str, bert: str, words: str, labels: str) -> None:
    def refused(says: str, **sections: Any) -> None:
        with pytest.raises(ConfigError, match=says):
            config_of(table(llama, words, **sections))

    refused('adapter.tokens is of lopa, and adapter.method = "lora-sb" has none; drop it', adapter={"tokens": 3})
    refused('adapter.encoder is of lopa, and adapter.method = "lora" has none', adapter={"method": "lora", "encoder": "x"})
    refused("adapts no linear layer; drop adapter.target_modules", adapter={"method": "lopa", "target_modules": ["q_proj"]})
    refused(
        'before what a causal model reads; set model.kind = "causal"',
        adapter={"method": "lopa"},
        model={"kind": "classification"},
    )
    content = table(llama, words)
    del content["adapter"]
    assert config_of({**content, "adapter": {"method": "lopa"}}).adapter.rank == 1
