"""The engine: each request gets what its tenant alone would say, whatever runs beside it; what it relies on in transformers."""

import dataclasses
import inspect
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import ContinuousBatchingConfig
from transformers.generation.continuous_batching import continuous_api, input_outputs, model_runner, requests, scheduler

from fedsb.errors import RequestError
from fedsb.serving.bank import Bank, Place
from fedsb.serving.engine import Chosen, Engine, Limits, Output, Sampling
from fedsb.serving.mixed import mix
from tests.adapters.samples import llama
from tests.serving.test_mixed import adapter, basis_of, dense

TENANTS = 5
SMALL = Limits(requests=8, step_tokens=32, cache_tokens=1024, waiting=64)


class Answer:
    """Collects what is delivered, and waits for the end."""

    def __init__(self) -> None:
        self.outputs: list[Output] = []
        self._done = threading.Event()

    def __call__(self, output: Output) -> None:
        self.outputs.append(output)
        if output.reason:
            self._done.set()

    def wait(self) -> Output:
        """The last output. Raises if none comes."""
        assert self._done.wait(60), self.outputs
        assert sum(output.reason is not None for output in self.outputs) == 1
        return self.outputs[-1]

    @property
    def chosen(self) -> list[Chosen]:
        return [each for output in self.outputs for each in output.tokens]

    @property
    def tokens(self) -> list[int]:
        return [each.token for each in self.chosen]


class Served:
    """An engine over a random model with tenants of two forms."""

    def __init__(self, limits: Limits = SMALL) -> None:
        self.basis, self.none = basis_of("lora-sb"), basis_of("lora")
        self.bank = Bank(TENANTS + 4)
        self.model = mix(llama(max_position_embeddings=512), self.bank)
        self.stored = [(adapter("lora-sb", self.basis, i), self.basis) for i in range(TENANTS - 1)]
        self.stored.append((adapter("lora", self.none, 9), self.none))
        self.places: list[Place | None] = [None, *(self.bank.add(*each) for each in self.stored)]
        self.engine = Engine(self.model, self.bank, limits)

    def ask(self, prompt: list[int], tenant: int, tokens: int = 8, **sampling: Any) -> Answer:
        """Submit a request of tenant 1, 2, …, or of the base model, 0."""
        answer = Answer()
        self.engine.submit(prompt, Sampling(tokens, **sampling), self.places[tenant], answer)
        return answer

    def alone(self, prompt: list[int], tenant: int, tokens: int = 8) -> list[int]:
        """What the tenant's own model would say, by transformers' `generate`."""
        model = llama(max_position_embeddings=512)
        if tenant:
            dense(model, *self.stored[tenant - 1])
        found = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
        answer: list[int] = found[0, len(prompt) :].tolist()
        return answer


@pytest.fixture
def served() -> Iterator[Served]:
    found = Served()
    yield found
    found.engine.close()


def test_every_request_is_answered_as_its_tenant_alone_would(served: Served) -> None:
    """Unlike prompts and the same one for all, more requests than run at one time, the base model among them."""
    asked = [(prompt, tenant) for tenant in range(TENANTS + 1) for prompt in ([5, 6, 7], [9, 9, 3, 4, 11, 8, 5], [3])]
    answers = [served.ask(prompt, tenant) for prompt, tenant in asked]
    for (prompt, tenant), answer in zip(asked, answers, strict=True):
        assert answer.wait().reason == "length" and answer.tokens == served.alone(prompt, tenant)
    assert len({tuple(a.tokens) for (p, _), a in zip(asked, answers, strict=True) if p == [5, 6, 7]}) > 3
    assert served.engine.running == 0 and served.engine.alive


def test_the_same_long_prompt_of_several_tenants_shares_no_cache(served: Served) -> None:
    """Long enough for several blocks, and for several steps; one after another, so that a block could be found again."""
    prompt = [3 + i % 50 for i in range(75)]
    for tenant in (1, 2, 0, 5, 1):
        answer = served.ask(prompt, tenant)
        answer.wait()
        assert answer.tokens == served.alone(prompt, tenant), tenant


def test_where_the_cache_is_full_requests_wait_and_are_right(served: Served) -> None:
    tight = Served(Limits(requests=8, step_tokens=16, cache_tokens=128, waiting=64))
    try:
        asked = [([3 + tenant, 7, 9, 4] * 5, tenant) for tenant in (1, 2, 3, 4, 5, 0, 1, 2)]
        answers = [tight.ask(prompt, tenant, 30) for prompt, tenant in asked]
        for (prompt, tenant), answer in zip(asked, answers, strict=True):
            assert answer.wait().reason == "length" and answer.tokens == tight.alone(prompt, tenant, 30)
    finally:
        tight.engine.close()


def test_tenants_come_and_go_while_others_are_answered(served: Served) -> None:
    answers = [(tenant, served.ask([5, 6, tenant], tenant, 60)) for tenant in (1, 2, 5)]
    for seed in range(20, 40):
        place = served.bank.add(adapter("lora-sb", served.basis, seed), served.basis)
        newcomer = Answer()
        served.engine.submit([7, 8], Sampling(2), place, newcomer)
        newcomer.wait()
        served.bank.remove(place)
    for tenant, answer in answers:
        answer.wait()
        assert answer.tokens == served.alone([5, 6, tenant], tenant, 60)


def test_a_cancelled_request_ends_and_leaves_the_others_alone(served: Served) -> None:
    kept, gone = served.ask([5, 6], 1, 200), Answer()
    name = served.engine.submit([5, 6], Sampling(400), served.places[2], gone)
    while not gone.outputs:
        time.sleep(0.001)
    served.engine.cancel(name)
    assert gone.wait().reason == "cancelled" and 0 < len(gone.tokens) < 400
    served.engine.cancel(name)  # once more, and after its end
    assert kept.wait().reason == "length" and kept.tokens == served.alone([5, 6], 1, 200)
    waiting = [served.ask([4], 1, 100) for _ in range(12)]
    last = Answer()
    served.engine.cancel(served.engine.submit([4], Sampling(100), None, last))
    assert last.wait().reason == "cancelled"  # though it had not begun
    assert all(answer.wait().reason == "length" for answer in waiting)


def test_an_answer_ends_with_its_end(served: Served) -> None:
    whole = served.alone([5, 6, 7], 2, 20)
    end = whole[4]
    other = next(token for token in range(64) if token not in whole)
    answer = served.ask([5, 6, 7], 2, 20, ends=(other, end))
    assert answer.wait().reason == "stop" and answer.tokens == whole[: whole.index(end) + 1]


def test_what_is_drawn_follows_from_the_seed_alone(served: Served) -> None:
    first = served.ask([5, 6, 7], 1, 12, temperature=1.0, seed=3)
    first.wait()
    beside = [served.ask([9, 4], tenant, 12, temperature=2.0, seed=tenant) for tenant in (1, 2, 5)]
    again, other = (served.ask([5, 6, 7], 1, 12, temperature=1.0, seed=seed) for seed in (3, 4))
    for answer in (*beside, again, other):
        answer.wait()
    assert again.tokens == first.tokens != other.tokens
    narrow = served.ask([5, 6, 7], 1, 12, temperature=1.5, top_p=1e-6)
    narrow.wait()
    assert narrow.tokens == served.alone([5, 6, 7], 1, 12)  # of which only the most likely is left


def test_drawn_tokens_have_the_models_probabilities(served: Served) -> None:
    model = dense(llama(max_position_embeddings=512), *served.stored[0])
    with torch.no_grad():
        wanted = torch.softmax(model(torch.tensor([[5, 6, 7]])).logits[0, -1] / 0.7, -1)
    top = wanted.sort(descending=True)
    kept = top.indices[: int((top.values.cumsum(-1) < 0.8).sum()) + 1]
    drawn = torch.zeros(len(wanted))
    for start in range(0, 600, 60):
        answers = [served.ask([5, 6, 7], 1, 1, temperature=0.7, top_p=0.8, seed=start + i) for i in range(60)]
        for answer in answers:
            answer.wait()
            drawn[answer.tokens[0]] += 1
    allowed = torch.zeros(len(wanted))
    allowed[kept] = wanted[kept] / wanted[kept].sum()
    assert (drawn[allowed == 0] == 0).all()
    assert (drawn / 600 - allowed).abs().max() < 4 * 0.5 / 600**0.5


def test_log_probabilities_are_the_models(served: Served) -> None:
    answer = served.ask([5, 6, 7], 3, 4, logprobs=2)
    answer.wait()
    model, tokens = dense(llama(max_position_embeddings=512), *served.stored[2]), [5, 6, 7]
    for chosen in answer.chosen:
        with torch.no_grad():
            logs = model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
        assert chosen.logprob == pytest.approx(float(logs[chosen.token]), abs=1e-4)
        assert [token for token, _ in chosen.likely] == logs.topk(2).indices.tolist() and chosen.token == chosen.likely[0][0]
        tokens.append(chosen.token)
    assert served.ask([5], 0, 1).wait().tokens[0].logprob is None


@pytest.mark.parametrize(
    ("prompt", "tokens", "said"),
    [
        ([], 4, "the prompt has no tokens; write something"),
        ([1], 0, "1 tokens of prompt and 0 of answer do not fit into 512; ask for less"),
        ([1] * 500, 20, "500 tokens of prompt and 20 of answer do not fit into 512"),
    ],
)
def test_what_cannot_be_answered_is_refused(served: Served, prompt: list[int], tokens: int, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        served.ask(prompt, 0, tokens)
    assert served.engine.running == 0


def test_too_many_requests_are_refused_and_the_rest_is_answered() -> None:
    served = Served(Limits(requests=2, step_tokens=8, cache_tokens=1024, waiting=3))
    try:
        answers = [served.ask([5, 6], 1, 40) for _ in range(5)]
        with pytest.raises(RequestError, match="5 requests are at work or waiting already; try again later"):
            served.ask([5, 6], 1)
        assert all(answer.wait().reason == "length" for answer in answers)
        assert served.ask([5, 6], 1).wait().reason == "length"
    finally:
        served.engine.close()


def test_a_request_as_long_as_the_cache_is_answered_and_no_longer_one_is_taken() -> None:
    served = Served(Limits(requests=2, step_tokens=16, cache_tokens=100, waiting=3))
    try:
        assert served.engine.longest == 96  # whole blocks
        with pytest.raises(RequestError, match="do not fit into 96"):
            served.ask([5] * 80, 1, 17)
        answer = served.ask([5] * 80, 1, 16)
        assert answer.wait().reason == "length" and answer.tokens == served.alone([5] * 80, 1, 16)
    finally:
        served.engine.close()


def test_no_share_ends_the_engine(served: Served) -> None:
    for top_p in (5e-324, 1e-45, 1.0):
        answer = served.ask([5, 6, 7], 1, 4, temperature=1.0, top_p=top_p, seed=0)
        assert answer.wait().reason == "length"
        if top_p < 1:
            assert answer.tokens == served.alone([5, 6, 7], 1, 4)


def test_no_temperature_ends_the_engine(served: Served) -> None:
    for temperature in (5e-324, 1e-45, 1e-10, 100.0):
        answer = served.ask([5, 6, 7], 1, 4, temperature=temperature, seed=0)
        assert answer.wait().reason == "length"
        if temperature < 1:
            assert answer.tokens == served.alone([5, 6, 7], 1, 4)


def test_an_adapter_that_overflows_ends_its_own_request_alone(served: Served) -> None:
    stored = adapter("lora", served.none, 50)
    huge = dataclasses.replace(stored, state={name: 1e30 * tensor for name, tensor in stored.state.items()})
    place = served.bank.add(huge, served.none)
    before = served.ask([5, 6], 1, 20)
    before.wait()
    for temperature in (0.0, 1.0):
        served.engine.submit([5, 6], Sampling(8, temperature), place, answer := Answer())
        assert answer.wait().reason == "error" and "overflow" in str(answer.outputs[-1].error)
    after = served.ask([5, 6], 1, 20)
    assert after.wait().reason == "length" and after.tokens == before.tokens and served.engine.alive


def test_an_error_of_the_model_reaches_everybody_and_ends_the_engine(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(served.model.model.norm, "forward", broken)
    answers = [served.ask([5, 6], tenant) for tenant in (0, 1, 2)]
    for answer in answers:
        last = answer.wait()
        assert last.reason == "error" and last.error and "out of memory" in last.error
    deadline = time.monotonic() + 30
    while served.engine.alive and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(RequestError, match="the engine has ended; start the server again"):
        served.ask([5, 6], 0)


def test_whoever_waits_when_it_is_closed_is_told() -> None:
    served = Served()
    answer = served.ask([5, 6], 1, 500)
    while not answer.outputs:
        time.sleep(0.001)
    served.engine.close()
    assert answer.wait().reason == "error"
    with torch.no_grad():  # and the model is one's own again
        served.model(torch.tensor([[5, 6], [7, 8]]))


def test_what_the_engine_relies_on_in_transformers() -> None:
    """If this fails, transformers has changed beneath `fedsb/serving/engine.py`: look at `Engine._hook` and `_Router`."""
    names = list(inspect.signature(input_outputs.ContinuousBatchingIOs.prepare_batch_tensors).parameters)
    assert names[:2] == ["self", "requests_in_batch"]
    assert list(inspect.signature(model_runner.ModelRunner._sample).parameters) == ["self", "scores", "output_ids"]
    assert {"state", "has_new_token", "query_length"} <= set(requests.FutureRequestState.__slots__)
    assert {"request_id", "generated_tokens"} <= set(requests.RequestState.__dataclass_fields__)
    assert list(inspect.signature(scheduler.Scheduler.clear_cancelled_requests).parameters) == ["self"]
    routed = {name for name, _ in inspect.getmembers(continuous_api.OutputRouter, inspect.isfunction)} - {"__init__"}
    assert routed == {"deliver", "deliver_batch", "fail_and_deliver"}
    manager = inspect.getsource(continuous_api.ContinuousBatchingManager._create_batch_processor)
    assert 'getattr(self, "batch_processor", None)' in manager and "output_router=self.output_router" in manager
    processor = inspect.getsource(continuous_api.ContinuousBatchProcessor)
    for call in ("self.inputs_and_outputs.prepare_batch_tensors(", "self.scheduler.clear_cancelled_requests()"):
        assert call in processor
    assert "self._sample(scores, output_ids)" in inspect.getsource(model_runner.ModelRunner)
    fields = set(ContinuousBatchingConfig.__dataclass_fields__)
    assert {"page_size", "num_blocks", "max_batch_tokens", "max_requests_per_batch", "allow_block_sharing"} <= fields
