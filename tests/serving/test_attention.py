"""Attention a sequence at a time: against each sequence alone, and what it relies on in transformers."""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fedsb.serving.attention import Plan, attend, by_sequence
from fedsb.serving.bank import Bank
from fedsb.serving.engine import Engine, Limits, Sampling
from fedsb.serving.mixed import mix
from tests.adapters.samples import llama
from tests.serving.test_engine import Answer

SIZES = st.lists(st.tuples(st.integers(1, 5), st.integers(0, 9)), min_size=1, max_size=6)  # new tokens, and those before


def alone(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, queries: list[int], keys: list[int]) -> torch.Tensor:
    """Each sequence by itself, by the formula."""
    found, q0, k0 = [], 0, 0
    for q, k in zip(queries, keys, strict=True):
        mask = torch.ones(q, k, dtype=torch.bool).tril(k - q)
        ks, vs = (side[:, :, k0 : k0 + k].repeat_interleave(query.shape[1] // side.shape[1], 1) for side in (key, value))
        scores = (query[:, :, q0 : q0 + q] @ ks.mT / query.shape[-1] ** 0.5).masked_fill(~mask, float("-inf"))
        found.append((scores.softmax(-1) @ vs).transpose(1, 2))
        q0, k0 = q0 + q, k0 + k
    return torch.cat(found, 1)


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, groups=st.sampled_from([1, 2, 4]))
def test_each_looks_at_its_own(sizes: list[tuple[int, int]], groups: int) -> None:
    queries, keys = [new for new, _ in sizes], [new + before for new, before in sizes]
    draw = torch.Generator().manual_seed(sum(keys))
    query = torch.randn(1, 4, sum(queries), 8, generator=draw, dtype=torch.float64)
    key, value = (torch.randn(1, groups, sum(keys), 8, generator=draw, dtype=torch.float64) for _ in range(2))
    found = attend(query, key, value, Plan.of(queries, keys), None)
    torch.testing.assert_close(found, alone(query, key, value, queries, keys))


class Cache:
    """As transformers' paged cache: it writes what is new, and reads what an index says."""

    def __init__(self, plan: Plan, key: torch.Tensor, value: torch.Tensor) -> None:
        self.plan, self.key, self.value = plan, key, value

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, kwargs: dict) -> tuple:  # type: ignore[type-arg]
        index = kwargs["read_index"][0]
        return self.key[:, :, index], self.value[:, :, index]


@pytest.mark.parametrize(("keys", "parts"), [([3, 7, 1, 5], 1), ([2, 20, 2, 3], 2), ([1, 30, 1, 8], 3)])
def test_a_step_of_single_tokens_reads_the_cache_as_it_lies(keys: list[int], parts: int) -> None:
    """In pages in any order, two steps with one plan."""
    plan = Plan.of([1] * 4, keys)
    assert len(plan.singles) == parts
    for seed in (0, 1):
        draw = torch.Generator().manual_seed(seed)
        stored = torch.randn(1, 2, 40, 8, generator=draw), torch.randn(1, 2, 40, 8, generator=draw)
        index = torch.randperm(40, generator=draw)[: sum(keys)]
        query = torch.randn(1, 4, 4, 8, generator=draw)
        module = type("Layer", (), {"layer_idx": 0})()
        told = {"read_index": [index], "scaling": None}
        found, _ = by_sequence(module, query, query, query, None, cache=Cache(plan, *stored), **told)
        torch.testing.assert_close(found, alone(query, *(side[:, :, index] for side in stored), [1] * 4, keys))


@given(before=st.lists(st.integers(0, 3000), min_size=1, max_size=40))
def test_one_long_context_makes_nobody_read_much_more_than_its_own(before: list[int]) -> None:
    """The padded keys are at most twice those that there are."""
    keys = [each + 1 for each in before]
    plan = Plan.of([1] * len(keys), keys)
    assert sum(each.theirs.numel() for each in plan.singles) <= 2 * sum(keys)
    assert sorted(torch.cat([each.queries for each in plan.singles]).tolist()) == list(range(len(keys)))


def test_the_engine_uses_it_and_puts_the_model_back() -> None:
    model = mix(llama(), Bank(2))
    assert model.config._attn_implementation == "sdpa"
    engine = Engine(model, Bank(2), Limits(4, 16, 256, 4))
    during = model.config._attn_implementation
    answer = Answer()
    engine.submit([5, 6, 7], Sampling(3), None, answer)
    answer.wait()
    engine.close()
    assert (during, model.config._attn_implementation) == ("fedsb_by_sequence", "sdpa")


def test_a_model_with_windows_keeps_transformers_own() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=64,
        sliding_window=8,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MistralForCausalLM(config).eval().requires_grad_(False)
    prompt = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14]
    mask = torch.ones(1, len(prompt), dtype=torch.int64)
    expected = model.generate(
        torch.tensor([prompt]), attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    bank = Bank(2)
    engine = Engine(mix(model, bank), bank, Limits(4, 16, 256, 4))
    assert model.config._attn_implementation == "sdpa"
    answer = Answer()
    engine.submit(prompt, Sampling(6), None, answer)
    answer.wait()
    engine.close()
    assert answer.tokens == expected[0, len(prompt) :].tolist()


def test_what_it_relies_on() -> None:
    """Fails when transformers changes what the attention function gets, or what the cache takes."""
    assert [*inspect.signature(PagedAttentionCache.update).parameters] == [
        "self",
        "key_states",
        "value_states",
        "layer_idx",
        "kwargs",
    ]
    taken = inspect.signature(sdpa_attention_forward).parameters
    assert [*taken][:5] == ["module", "query", "key", "value", "attention_mask"] and {"cache", "scaling"} <= taken.keys()
