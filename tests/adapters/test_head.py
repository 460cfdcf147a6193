"""A classification head on standardised features: what it computes, where mean and spread come from, how it leaves."""

from typing import Any

import pytest
import torch
from transformers import RobertaConfig, RobertaForSequenceClassification

from fedsb.adapters.attach import attach
from fedsb.adapters.head import Features, features_of, linear_head, plain
from fedsb.adapters.state import get_state, set_state
from fedsb.config import RunConfig
from fedsb.models import device_of, load_model, load_tokenizer, locate
from tests.adapters.samples import llama
from tests.federation.tiny import WORDS, save_model

CPU = device_of("cpu")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("bert"), "classification")


def run_config(source: str, kind: str) -> RunConfig:
    data = {"tasks": [{"name": "words", "source": "jsonl:words"}]}
    return RunConfig.model_validate(
        {"name": "tiny", "model": {"source": source, "kind": kind}, "data": data, "adapter": {"rank": 4}}
    )


def loaded(source: str, labels: int = 3) -> tuple[Any, Any, RunConfig]:
    config, found = run_config(source, "classification"), locate(source)
    return load_model(found, config.model, labels, CPU), load_tokenizer(found), config


def test_logits_are_those_of_standardised_features(source: str) -> None:
    base, tokenizer, config = loaded(source)
    known = features_of(base, tokenizer)
    assert known is not None
    batch = tokenizer(["red cat", "two birds up"], padding=True, return_tensors="pt")
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        features = base.bert(**inputs).pooler_output
    model = attach(base, config, tokenizer)
    state = get_state(model)
    state["head.classifier.weight"], state["head.classifier.bias"] = torch.randn(3, 32), torch.randn(3)
    set_state(model, state)
    weight, bias = state["head.classifier.weight"], state["head.classifier.bias"]
    with torch.no_grad():
        wanted = (features - known.mean) / known.spread @ weight.T + bias
        torch.testing.assert_close(model(**inputs).logits, wanted, rtol=1e-4, atol=1e-4)


def test_as_a_plain_head_it_computes_the_same() -> None:
    head, h = {"classifier.weight": torch.randn(3, 8), "classifier.bias": torch.randn(3)}, torch.randn(5, 8)
    features = Features(torch.randn(8), 0.05)
    found = plain(head, features)
    wanted = (h - features.mean) / features.spread @ head["classifier.weight"].T + head["classifier.bias"]
    torch.testing.assert_close(h @ found["classifier.weight"].T + found["classifier.bias"], wanted, rtol=1e-4, atol=1e-4)


def test_mean_and_spread_are_those_of_random_tokens_and_near_those_of_texts(source: str) -> None:
    """From model and tokenizer alone, whatever the head, its size and torch's own chance."""
    base, tokenizer, _ = loaded(source)
    known = features_of(base, tokenizer)
    torch.manual_seed(7)
    again = features_of(loaded(source, labels=5)[0], tokenizer)
    assert known is not None and again is not None and known.mean.shape == (32,)
    assert torch.equal(known.mean, again.mean) and known.spread == again.spread
    batch = tokenizer([" ".join(WORDS[i : i + 3]) for i in range(10)], padding=True, return_tensors="pt")
    with torch.no_grad():
        h = base.bert(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).pooler_output
    assert 0.5 < float(((h - known.mean) / known.spread).square().mean().sqrt()) < 2
    assert (h - known.mean).norm() < 0.9 * h.norm()


def test_a_head_of_several_layers_or_without_a_bias_is_left_alone(source: str) -> None:
    _, tokenizer, _ = loaded(source)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 40}
    assert features_of(RobertaForSequenceClassification(RobertaConfig(**sizes)), tokenizer) is None
    assert features_of(llama(), tokenizer) is None
    assert linear_head(["head.score.weight"]) is None
    assert linear_head(["a.core", "head.classifier.weight", "head.classifier.bias"]) == "classifier"
