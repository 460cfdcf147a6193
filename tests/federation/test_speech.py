"""Speech recognition in a federation: what is heard, what is learnt, in which layers, and what leaves."""

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from peft import PeftModel
from transformers import AutoModelForSpeechSeq2Seq

from clients.budget import fingerprint
from clients.session import Session, Site
from fedsb.abilities import FUSING, PROMPTING
from fedsb.adapters.methods import METHODS
from fedsb.adapters.state import get_state, layers_of, parameters_of, set_state
from fedsb.cli.evaluate import evaluate_run
from fedsb.config import RunConfig
from fedsb.data.batches import collate
from fedsb.data.fingerprint import data_fingerprint
from fedsb.errors import ConfigError, DataError, ModelError
from fedsb.report.table import evaluation_table, languages_table
from fedsb.serving.transcripts import transcribe, word_errors
from fedsb.store import adapters
from fedsb.store.basis_files import first_basis
from fedsb.store.export import export_core, export_lora
from fedsb.store.files import read_json
from fedsb.training.loop import round_plan
from fedsb.training.loss import causal_loss
from fedsb.training.private import check_gradients, gradients_of_records
from tests.federation.test_methods import basis_for, started
from tests.federation.tiny import config_of, federate, final_state, table
from tests.federation.twisted import killed_and_resumed
from tests.federation.voices import TONES, save_recordings, save_whisper, sound

SITE = Site("client-0", 0, Path())


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_whisper(tmp_path_factory.mktemp("whisper"))


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_recordings(tmp_path_factory.mktemp("spoken"))


def config(whisper: str, task: str, /, **sections: Any) -> RunConfig:
    base = {
        "model": {"kind": "speech"},
        "evaluation": {"max_new_tokens": 8},
        "federation": {"clients": 2},
        "data": {"partition": "iid"},
    }
    merged = {name: {**base.get(name, {}), **sections.get(name, {})} for name in base | sections}
    return config_of(table(whisper, task, **merged))


def test_a_federation_learns_to_write_down_what_it_hears(whisper: str, tmp_path: Path) -> None:
    run = config(
        whisper,
        save_recordings(tmp_path / "task", 24, 8),
        adapter={"rank": 16},
        train={"steps": 60, "batch_size": 8, "microbatch": 8, "learning_rate": 0.005},
        federation={"clients": 2, "rounds": 2},
    )
    tmp_path = tmp_path / "run"
    summary = federate(run, tmp_path)
    scores = summary["evaluation"]
    for client in ("client-0", "client-1"):
        assert scores["global"][client]["loss"] < 0.5 * scores["base"][client]["loss"]
        assert scores["base"][client]["wer"] >= 1 and scores["global"][client]["wer"] < 0.8
    again = evaluate_run(tmp_path)
    for which in ("base", "global", "personal"):
        for client, score in again[which].items():
            wrong, words = score["languages"]["en"]
            assert words == 2 * score["n"] and score["wer"] == wrong / words
            assert score["wer"] == scores[which][client]["wer"] and score["exact_match"] == scores[which][client]["exact_match"]
    told = languages_table(again)
    assert told is not None and told.title == "word error rate by language"
    assert evaluation_table(again).title == "word error rate and loss on each client's own test set"


def test_adapters_stand_in_encoder_and_decoder_and_both_learn(whisper: str, spoken: str) -> None:
    session = started(config(whisper, spoken))
    before = {name: tensor.clone() for name, tensor in get_state(session.model).items()}
    after = session.layout.unflatten(session.train(SITE, session.layout.flatten(before), round_plan(session.config, 1)).vector)
    sides = {"model.encoder": 0, "model.decoder": 0}
    for layer in layers_of(session.model):
        sides[".".join(layer.split(".")[:2])] += 1
        assert (after[f"{layer}.core"] != before[f"{layer}.core"]).any(), layer
    assert sides == {"model.encoder": 2 * 6, "model.decoder": 2 * 10}  # q, k, v, out and two of the MLP; twice those of attention


@pytest.mark.parametrize("method", [method for method in METHODS if method not in (*PROMPTING, *FUSING)])
def test_every_method_takes_part(whisper: str, spoken: str, method: str, tmp_path: Path) -> None:
    run = config(
        whisper,
        spoken,
        adapter={"method": method, "rank": 4},
        **basis_for(method, spoken),
        train={"steps": 1, "warmup_steps": 1},
        federation={"clients": 2, "rounds": 1},
        personal={"steps": 1},
    )
    summary = federate(run, tmp_path)
    first = {name: score["loss"] for name, score in summary["evaluation"]["base"].items()}
    assert any(abs(score["loss"] - first[name]) > 1e-6 for name, score in summary["evaluation"]["personal"].items())


def test_a_method_with_prompts_is_refused(whisper: str, spoken: str) -> None:
    with pytest.raises(ConfigError, match='adapter.method = "lopa" puts a prompt before what a causal model reads'):
        config(whisper, spoken, adapter={"method": "lopa"})


def test_what_is_heard_decides(whisper: str, spoken: str) -> None:
    """The same transcript after two recordings has two losses, and none of them depends on its neighbour or on the padding."""
    session = started(config(whisper, spoken))
    rows = session.rows(SITE, "train")
    batch = collate(rows, 0, "speech")
    assert batch.features is not None and batch.features.shape == (len(rows), 16, 100)
    alone = torch.stack([causal_loss(session.transformer, collate([row], 0, "speech")) for row in rows])
    torch.testing.assert_close(causal_loss(session.transformer, batch), alone.mean(), rtol=1e-5, atol=1e-6)
    one, other = rows[0], next(row for row in rows if row.completion != rows[0].completion)
    swapped = dataclasses.replace(one, recording=other.recording)
    assert abs(alone[0] - causal_loss(session.transformer, collate([swapped], 0, "speech"))) > 1e-3


def test_transcripts_in_a_batch_are_those_of_each_alone(whisper: str, spoken: str) -> None:
    session = started(config(whisper, spoken))
    torch.manual_seed(1)
    set_state(session.model, {name: 0.3 * torch.randn_like(t) for name, t in get_state(session.model).items()})
    rows = session.rows(SITE, "train")
    features = torch.stack([row.recording() for row in rows if row.recording])
    begun = torch.tensor([row.prompt for row in rows])
    together = transcribe(session.transformer, features, begun, session.tokenizer, 100)  # more than there are positions
    parts = zip(features.split(1), begun.split(1), strict=True)
    alone = [transcribe(session.transformer, *part, session.tokenizer, 100)[0] for part in parts]
    assert together == alone and len(set(alone)) > 1


def test_greedy_transcripts_are_what_the_forward_pass_calls_most_likely(whisper: str, spoken: str) -> None:
    session = started(config(whisper, spoken))
    row = session.rows(SITE, "train")[0]
    assert row.recording is not None
    features, begun = row.recording()[None], torch.tensor([row.prompt])
    ids = list(row.prompt)
    with torch.no_grad():
        for _ in range(5):
            logits = session.transformer(input_features=features, decoder_input_ids=torch.tensor([ids])).logits[0, -1]
            ids.append(int(logits.argmax()))
    said = session.tokenizer.decode(ids[len(row.prompt) :], skip_special_tokens=True)
    assert transcribe(session.transformer, features, begun, session.tokenizer, 5) == [said]


def test_a_killed_run_goes_on_to_the_same_bits(whisper: str, spoken: str, tmp_path: Path) -> None:
    """Although the model's own configuration asks for SpecAugment, which draws from a global state."""
    run = config(whisper, spoken)
    federate(run, tmp_path / "whole")
    killed_and_resumed(run, tmp_path / "killed", 2)
    whole, resumed = final_state(tmp_path / "whole"), final_state(tmp_path / "killed")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_gradients_of_single_recordings_are_those_of_each_alone(whisper: str, spoken: str) -> None:
    session = started(config(whisper, spoken, privacy={"unit": "record", "epsilon": 8.0}, federation={"weighting": "uniform"}))
    parameters = parameters_of(session.model)
    check_gradients(session.transformer, parameters, "speech", 0)
    rows = session.rows(SITE, "train")[:3]
    session.transformer.train()
    with gradients_of_records(session.transformer, parameters):
        (causal_loss(session.transformer, collate(rows, 0, "speech")) * len(rows)).backward()
        together = {name: p.grad_sample.clone() for name, p in parameters.items()}  # type: ignore[attr-defined]
    for i, row in enumerate(rows):
        session.model.zero_grad()
        causal_loss(session.transformer, collate([row], 0, "speech")).backward()
        for name, p in parameters.items():
            assert p.grad is not None
            torch.testing.assert_close(together[name][i], p.grad, rtol=1e-4, atol=1e-6)


def test_a_private_run_withholds_word_error_rates(whisper: str, spoken: str, tmp_path: Path) -> None:
    run = config(
        whisper,
        spoken,
        privacy={"unit": "record", "epsilon": 50.0},
        federation={"weighting": "uniform", "rounds": 1},
        personal={"steps": 0},
    )
    summary = federate(run, tmp_path)
    assert summary["evaluation"]["base"] == {} and "wer" not in json.dumps(summary)


def test_an_exported_adapter_is_loaded_by_peft(whisper: str, spoken: str, tmp_path: Path) -> None:
    run = config(whisper, spoken, train={"learning_rate": 0.05})
    federate(run, tmp_path / "run")
    stored = adapters.load(tmp_path / "run" / "adapters", "client-0")
    basis = first_basis(tmp_path / "run")
    assert basis is not None
    session = started(run)
    row = session.rows(SITE, "test")[0]
    assert row.recording is not None
    set_state(session.model, stored.state)
    inputs = {"input_features": row.recording()[None], "decoder_input_ids": torch.tensor([row.prompt])}
    with torch.no_grad():
        wanted = session.transformer(**inputs).logits
        for export in (export_lora, export_core):
            folder = export(stored, basis, tmp_path / export.__name__)
            assert read_json(folder / "adapter_config.json")["task_type"] is None
            assert "AutoModelForSpeechSeq2Seq.from_pretrained" in (folder / "README.md").read_text()
            assert "vllm" not in (folder / "README.md").read_text()
            model = PeftModel.from_pretrained(AutoModelForSpeechSeq2Seq.from_pretrained(whisper), folder).eval()
            torch.testing.assert_close(model(**inputs).logits, wanted, rtol=1e-4, atol=1e-4)


def test_a_basis_of_public_recordings(whisper: str, spoken: str, tmp_path: Path) -> None:
    public = {"source": "public", "examples": 4, "public": {"name": "open", "source": spoken}}
    summary = federate(config(whisper, spoken, basis=public), tmp_path)
    assert summary["basis"]["source"] == "public" and summary["bytes"]["basis"] > 0


def test_fingerprints_are_of_what_is_heard(whisper: str, tmp_path: Path) -> None:
    """A file of the same name with another sound is other data, for the run and for a ledger."""
    task = save_recordings(tmp_path / "task")
    run = config(whisper, task)
    before, ledger = data_fingerprint(run), fingerprint(Session(run).examples(SITE, "train"))
    for clip in (tmp_path / "task" / "clips").glob("train-*"):
        soundfile.write(clip, sound(["fa", "fa"]), 16000)
    assert data_fingerprint(run) != before
    assert fingerprint(Session(run).examples(SITE, "train")) != ledger


def test_a_text_model_is_no_speech_model(llama: str, spoken: str) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        Session(config(llama, spoken))


def test_texts_are_no_recordings(whisper: str, words: str) -> None:
    with pytest.raises(DataError, match='has no recording, which does not go with model.kind = "speech"'):
        Session(config(whisper, words)).rows(SITE, "train")


def test_recordings_are_no_texts(llama: str, spoken: str) -> None:
    with pytest.raises(DataError, match='has a recording, which does not go with model.kind = "causal"'):
        Session(config_of(table(llama, spoken))).rows(SITE, "train")


def test_wrong_words_are_counted_as_by_hand() -> None:
    """Against the distance of Levenshtein, computed here."""

    def distance(a: list[str], b: list[str]) -> int:
        row = list(range(len(b) + 1))
        for i, x in enumerate(a, 1):
            row, above = [i], row
            for j, y in enumerate(b, 1):
                row.append(min(row[-1] + 1, above[j] + 1, above[j - 1] + (x != y)))
        return row[-1]

    draw = random.Random(0)
    for _ in range(200):
        said, heard = ([draw.choice(list(TONES)) for _ in range(draw.randint(0, 6))] for _ in range(2))
        assert word_errors(" ".join(said), " ".join(heard), "en") == (distance(said, heard), len(said))


def test_case_punctuation_and_missing_spaces() -> None:
    assert word_errors("Guten Tag, Frau Müller!", "guten tag frau müller", "de") == (0, 4)
    assert word_errors("你好，世界。", "你好世间", "zh") == (1, 4)
    assert word_errors("你好，世界。", "你好世间", "en")[1] == 2  # with spaces where its comma was
