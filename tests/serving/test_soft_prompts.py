"""Soft prompts that clients send along: LoPA through the engine and over HTTP, beside others, and what is refused."""

import base64
import pickle
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from safetensors.torch import save
from transformers import OPTConfig, OPTForCausalLM

from fedsb.adapters.lopa import LopaConfig
from fedsb.errors import RequestError
from fedsb.serving.bank import Bank
from fedsb.serving.engine import Engine, Limits, Sampling, _soft_rows
from fedsb.serving.mixed import mix
from fedsb.serving.soft_prompts import SoftEmbedding, decoded, encoded
from tests.adapters.samples import llama
from tests.serving.test_engine import Answer, Served
from tests.serving.test_http import WORDS, Running, finished, running, shop, text

__all__ = ["finished", "running", "shop"]  # fixtures
INSTANCES = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def served() -> Iterator[Served]:
    found = Served(Limits(requests=8, step_tokens=16, cache_tokens=1024, waiting=64))  # so that prompts take several steps
    yield found
    found.engine.close()


def test_the_engine_answers_as_lopa_does_beside_tenants_without_prompts(served: Served) -> None:
    torch.manual_seed(1)
    model = get_peft_model(llama(max_position_embeddings=512), LopaConfig(tokens=21, r=2, encoder_width=6, hidden=4)).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "fedsb_lopa" in name:
                parameter.add_(torch.randn_like(parameter))
    layer = model.base_model.model.model.embed_tokens
    prompts = layer.prompts(INSTANCES)
    ids = [5, 6, 7]
    answers = []
    for prompt in prompts:
        answers.append(Answer())
        served.engine.submit(ids, Sampling(8), None, answers[-1], prompt)
    plain = [served.ask(ids, tenant) for tenant in (0, 1, 5)]
    for instance, answer in zip(INSTANCES, answers, strict=True):
        answer.wait()
        mask = torch.ones(1, 3, dtype=torch.int64)
        found = model.generate(
            input_ids=torch.tensor([ids]), attention_mask=mask, instance=instance[None], max_new_tokens=8, do_sample=False,
            pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
        assert answer.tokens == found[0].tolist()[-8:]
    for tenant, answer in zip((0, 1, 5), plain, strict=True):
        answer.wait()
        assert answer.tokens == served.alone(ids, tenant)
    assert len({tuple(answer.tokens) for answer in answers}) > 1


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 9), st.integers(1, 5)), min_size=1, max_size=5))
def test_rows_of_a_step(requests: list[tuple[int, int, int]]) -> None:
    """Each request: tokens of its soft prompt (0: none), tokens before this step, tokens in it."""
    softs = [
        torch.full((m, 1), float(i + 1)) + torch.arange(m)[:, None] / 10 if m else None for i, (m, _, _) in enumerate(requests)
    ]
    embedding = SoftEmbedding(torch.nn.Embedding(3, 1, _weight=torch.zeros(3, 1)))
    embedding.rows = _soft_rows(softs, [before for _, before, _ in requests], [new for _, _, new in requests])
    found = embedding(torch.zeros(1, sum(new for _, _, new in requests), dtype=torch.int64))[0, :, 0].tolist()
    expected = [
        float(softs[i][at]) if softs[i] is not None and at < m else 0.0  # type: ignore[index]
        for i, (m, before, new) in enumerate(requests)
        for at in range(before, before + new)
    ]
    assert found == expected


def test_over_http(running: Running) -> None:
    client, width = running.client(), running.engine.width
    plain = text(client, "client-0")
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randn(3, width, generator=draw) for _ in range(4)]
    told = [text(client, "client-0", extra_body={"prompt_embeds": encoded(prompt)}) for prompt in prompts]
    assert any(each != plain for each in told)
    table = running.engine.model.get_input_embeddings().base.weight
    ids = running.service.tokenizer(WORDS)["input_ids"]
    as_tokens = text(client, "client-0", extra_body={"prompt_embeds": encoded(table[ids[:2]])})
    whole = client.completions.create(model="client-0", prompt=ids[:2] + ids, temperature=0, max_tokens=6)
    assert as_tokens == whole.choices[0].text and whole.usage is not None and whole.usage.prompt_tokens == len(ids) + 2
    body = {"model": "client-0", "prompt": WORDS, "max_tokens": 2, "prompt_embeds": encoded(prompts[0])}
    assert running.post("/v1/completions", body).json()["usage"]["prompt_tokens"] == len(ids) + 3


def test_what_is_refused(running: Running) -> None:
    width = running.engine.width
    good = torch.zeros(2, width)
    for sent, said in [
        ("%%%", "is no safetensors file in base64"),
        (base64.b64encode(pickle.dumps(good)).decode(), "is no safetensors file in base64"),
        (encoded(good)[:-8], "is no safetensors file in base64"),
        (base64.b64encode(save({"other": good})).decode(), "holds other tensors than one `prompt`"),
        (encoded(torch.zeros(2, width + 1)), f"is (2, {width + 1}) in float32, and this model takes (tokens, {width})"),
        (encoded(torch.zeros(width)), f"is ({width},) in float32"),
        (encoded(torch.zeros(0, width)), f"is (0, {width}) in float32"),
        (encoded(torch.zeros(2, width, dtype=torch.int64)), "in int64"),
        (encoded(good.log() - good.log()), "holds NaN or infinity"),
        (encoded(good + 3e38), "1000 times the largest of the model's embeddings"),
    ]:
        answer = running.post("/v1/completions", {"model": "client-0", "prompt": "red", "prompt_embeds": sent})
        assert answer.status_code == 400 and said in answer.json()["error"]["message"], (said, answer.text)
    long = encoded(torch.zeros(2000, width))
    assert running.post("/v1/completions", {"model": "client-0", "prompt": "red", "prompt_embeds": long}).status_code == 400
    assert running.engine.alive and text(running.client(), "client-0")


def test_a_model_whose_embeddings_are_narrower_than_its_layers_takes_prompts_of_that_width() -> None:
    """As OPT-350m's are. A prompt of another width would end the engine for all."""
    torch.manual_seed(0)
    config = OPTConfig(
        hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64, word_embed_proj_dim=16,
        max_position_embeddings=128, do_layer_norm_before=False,
    )  # fmt: skip
    bank = Bank(2)
    engine = Engine(mix(OPTForCausalLM(config).eval().requires_grad_(False), bank), bank, Limits(4, 16, 256, 8))
    try:
        assert engine.width == 16
        with pytest.raises(RequestError, match=r"prompt_embeds: is \(2, 32\), and this model takes \(tokens, 16\)"):
            engine.submit([5, 6, 7], Sampling(4), None, Answer(), torch.zeros(2, 32))
        engine.submit([5, 6, 7], Sampling(4), None, answer := Answer(), torch.zeros(2, 16))
        assert answer.wait().reason == "length" and engine.alive
    finally:
        engine.close()


def test_it_comes_back_in_its_own_dtype() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        prompt = torch.randn(4, 3).to(dtype)
        assert torch.equal(decoded(encoded(prompt), 3), prompt)
    with pytest.raises(RequestError, match="takes"):
        decoded(encoded(torch.zeros(1, 2)), 3)
