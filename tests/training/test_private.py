"""DP-SGD on cores and head: what one record can add, and what happens at the edges."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor, nn
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

from fedsb.adapters.head import Features, standardise
from fedsb.adapters.state import HEAD, get_state, parameters_of
from fedsb.adapters.tuner import LoraSbModel
from fedsb.data.batches import Encoded, collate
from fedsb.errors import PrivacyError
from fedsb.privacy.mechanism import Mechanism
from fedsb.privacy.noise import KeyStream
from fedsb.training.loop import Plan, loss_function
from fedsb.training.private import add_clipped, forbid_mixing, gradients_of_records, put_gradient, train_private, with_head_clip
from tests.adapters.samples import adapted, bert, llama
from tests.training.samples import labelled, rows


def classifier() -> PeftModel:
    """With its head trained along; without dropout, so that gradients can be compared."""
    return adapted(bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), task_type="SEQ_CLS")


KINDS: list[tuple[str, Callable[[], Any], Callable[[int], list[Encoded]]]] = [
    ("causal", lambda: adapted(llama()), rows),
    ("classification", classifier, labelled),
]
PLAN = Plan(
    first=0,
    count=2,
    total=2,
    batch_size=4,
    microbatch=3,
    learning_rate=1e-2,
    head_learning_rate=1e-2,
    warmup=0,
    decay=False,
)


class Fixed(KeyStream):
    """Draws the records it is told to, and noise that is zero unless told otherwise."""

    def __init__(self, *draws: Sequence[int], noisy: bool = False) -> None:
        super().__init__(bytes(32))
        self.draws, self.noisy, self.noises = list(draws), noisy, 0

    def poisson_sample(self, count: int, rate: float) -> list[int]:
        return list(self.draws.pop(0))

    def normal(self, count: int) -> NDArray[np.float64]:
        self.noises += 1
        return super().normal(count) if self.noisy else np.zeros(count)


@pytest.fixture(params=KINDS, ids=lambda case: case[0])
def case(request: pytest.FixtureRequest) -> tuple[str, PeftModel, list[Encoded]]:
    """A kind of model, such a model with random cores, and eight rows of unlike length."""
    kind, made, examples = request.param
    return kind, made(), examples(8)


def test_both_kinds_train_cores_and_a_head(case: tuple[str, PeftModel, list[Encoded]]) -> None:
    kind, model, _ = case
    names = list(parameters_of(model))
    assert isinstance(model.base_model, LoraSbModel) and any(name.endswith(".core") for name in names)
    assert any(name.startswith("head.") for name in names) == (kind == "classification")


def alone(kind: str, model: PeftModel, row: Encoded) -> dict[str, Tensor]:
    """The gradient of one record, by itself, without hooks."""
    parameters = parameters_of(model)
    loss = loss_function(kind)(model.get_base_model(), collate([row], 0, kind))  # type: ignore[arg-type]
    found = torch.autograd.grad(loss, list(parameters.values()))
    return dict(zip(parameters, found, strict=True))


def test_gradients_of_records_of_a_head_on_standardised_features() -> None:
    """Of every record, as the head sees it."""
    model, examples = classifier(), labelled(4)
    plain = [alone("classification", model, row) for row in examples]
    head: nn.Module = model.get_base_model().classifier.modules_to_save["default"]  # type: ignore[union-attr,index,assignment]
    standardise(head, Features(torch.linspace(-1, 1, 32), 0.5))
    parameters = parameters_of(model.train())
    with gradients_of_records(model, parameters):
        batch = collate(examples, 0, "classification")
        (loss_function("classification")(model.get_base_model(), batch) * len(examples)).backward()
        found = {name: p.grad_sample.clone() for name, p in parameters.items()}  # type: ignore[attr-defined]
    for i, (row, before) in enumerate(zip(examples, plain, strict=True)):
        for name, single in alone("classification", model, row).items():
            torch.testing.assert_close(found[name][i], single, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(found["head.classifier.weight"][i], before["head.classifier.weight"])


def norm(gradient: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(g.double().square().sum()) for g in gradient.values()))


def clipped(gradient: dict[str, Tensor], clip: float) -> dict[str, Tensor]:
    """One record's gradient, the head's and the rest of it each clipped to clip / √2; without a head the whole to clip."""
    heads = {name: g for name, g in gradient.items() if name.startswith(HEAD)}
    rest = {name: g for name, g in gradient.items() if name not in heads}
    bound = clip / math.sqrt(2) if heads else clip
    return {name: g * min(1.0, bound / norm(group)) for group in (rest, heads) for name, g in group.items()}


def clipped_sum(kind: str, model: PeftModel, batch: Sequence[Encoded], clip: float) -> dict[str, Tensor]:
    """What `add_clipped` adds up for one batch."""
    parameters, transformer = parameters_of(model), model.get_base_model()
    sums = {name: torch.zeros_like(p) for name, p in parameters.items()}
    transformer.train()
    with gradients_of_records(transformer, parameters):
        (loss_function(kind)(transformer, collate(batch, 0, kind)) * len(batch)).backward()  # type: ignore[arg-type]
        add_clipped(sums, parameters, clip, len(batch))
    transformer.eval()
    return sums


def test_gradients_of_records_are_those_of_each_alone(case: tuple[str, PeftModel, list[Encoded]]) -> None:
    """To 2e-6 (rounding in fp32, which differs between CPUs), in one batch with rows of unlike length."""
    kind, model, examples = case
    parameters, transformer = parameters_of(model), model.get_base_model()
    transformer.train()
    with gradients_of_records(transformer, parameters):
        (loss_function(kind)(transformer, collate(examples, 0, kind)) * len(examples)).backward()  # type: ignore[arg-type]
        found = {name: p.grad_sample.clone() for name, p in parameters.items()}  # type: ignore[attr-defined]
    transformer.eval()
    for number, row in enumerate(examples):
        expected = alone(kind, model, row)
        size = norm(expected)
        assert size > 1e-4
        for name, gradient in expected.items():
            assert (found[name][number] - gradient).norm() <= 2e-6 * max(size, 1)


def test_what_is_summed_is_each_record_clipped_alone(case: tuple[str, PeftModel, list[Encoded]]) -> None:
    kind, model, examples = case
    singles = [alone(kind, model, row) for row in examples]
    clip = sorted(norm(single) for single in singles)[4]  # half of them are clipped
    found = clipped_sum(kind, model, examples, clip)
    for name, total in found.items():
        expected = sum((clipped(single, clip)[name] for single in singles), torch.zeros_like(total))
        assert torch.allclose(total, expected, atol=2e-6 * clip * len(examples))


def test_a_long_gradient_of_the_head_takes_nothing_from_the_rest() -> None:
    parameters = {"a.core": nn.Parameter(torch.zeros(2)), "head.b.weight": nn.Parameter(torch.zeros(1))}
    sums = {name: torch.zeros_like(p) for name, p in parameters.items()}
    parameters["a.core"].grad_sample = torch.tensor([[0.3, 0.4], [6.0, 8.0]])  # type: ignore[attr-defined]
    parameters["head.b.weight"].grad_sample = torch.tensor([[100.0], [0.1]])  # type: ignore[attr-defined]
    add_clipped(sums, parameters, 2**0.5, 2)
    assert torch.allclose(sums["a.core"], torch.tensor([0.3 + 0.6, 0.4 + 0.8]), rtol=1e-5)
    assert torch.allclose(sums["head.b.weight"], torch.tensor([1.1]), rtol=1e-5)


def test_a_head_has_a_clip_and_noise_of_its_own() -> None:
    """Both in units of their own clip: each record is 1 at the most, and the noise on every number is the multiplier."""
    parameters = {"a.core": nn.Parameter(torch.zeros(3000)), "head.b.weight": nn.Parameter(torch.zeros(2000))}
    sums = {name: torch.zeros_like(p) for name, p in parameters.items()}
    core, head = torch.zeros(1, 3000), torch.zeros(1, 2000)
    core[0, :2], head[0, :1] = torch.tensor([6.0, 8.0]), 100.0
    parameters["a.core"].grad_sample, parameters["head.b.weight"].grad_sample = core, head  # type: ignore[attr-defined]
    mechanism = Mechanism(0.5, 0.1, 0.2, 4.0)
    add_clipped(sums, parameters, mechanism.clip_norm, 1, mechanism.head_clip_norm)
    assert math.isclose(float(sums["a.core"].norm()), 0.2 / 2**0.5, rel_tol=1e-5)
    assert math.isclose(float(sums["head.b.weight"].norm()), 4.0 / 2**0.5, rel_tol=1e-5)
    put_gradient(parameters, {name: torch.zeros_like(t) for name, t in sums.items()}, mechanism, KeyStream(bytes(32)), 10.0)
    for name, clip in (("a.core", 0.2), ("head.b.weight", 4.0)):
        gradient = parameters[name].grad
        assert gradient is not None and math.isclose(float(gradient.std()), 0.5 * clip / 10, rel_tol=0.05)


@pytest.mark.parametrize("clip", [1e-6, 1e-2, 1.0])
def test_one_record_adds_no_more_than_the_clip_norm(case: tuple[str, PeftModel, list[Encoded]], clip: float) -> None:
    kind, model, examples = case
    for row in examples:
        assert norm(clipped_sum(kind, model, [row], clip)) <= clip
    with_it, without = (clipped_sum(kind, model, part, clip) for part in (examples, examples[:-1]))
    assert norm({name: with_it[name] - without[name] for name in with_it}) <= clip * (1 + 1e-4)  # sums round too


def test_a_gradient_below_the_clip_norm_stays(case: tuple[str, PeftModel, list[Encoded]]) -> None:
    kind, model, examples = case
    expected, found = alone(kind, model, examples[0]), clipped_sum(kind, model, examples[:1], 1e6)
    assert all(torch.allclose(found[name], expected[name], rtol=1e-4, atol=1e-7) for name in found)


def test_a_record_whose_gradient_is_not_finite_adds_zero() -> None:
    parameters = {"a": nn.Parameter(torch.zeros(2)), "b": nn.Parameter(torch.zeros(1))}
    for bad in (math.nan, math.inf):
        sums = {name: torch.zeros_like(p) for name, p in parameters.items()}
        parameters["a"].grad_sample = torch.tensor([[3.0, 4.0], [bad, 1.0], [0.0, 0.0]])  # type: ignore[attr-defined]
        parameters["b"].grad_sample = torch.tensor([[0.0], [1.0], [0.0]])  # type: ignore[attr-defined]
        add_clipped(sums, parameters, 1.0, 3)
        assert torch.allclose(sums["a"], torch.tensor([0.6, 0.8])) and not sums["b"].any()  # and one of zero adds zero


def run(
    kind: str, model: PeftModel, examples: list[Encoded], stream: KeyStream, noise: float = 1.0, clip: float = 0.5, **plan: Any
) -> dict[str, Tensor]:
    """The state after private training."""
    mechanism = Mechanism(noise, PLAN.batch_size / len(examples), clip, clip)
    settings = Plan(**{**vars(PLAN), **plan})
    parameters = parameters_of(model)
    train_private(
        model.get_base_model(),
        parameters,
        examples,
        settings,
        mechanism,
        stream,
        kind=kind,  # type: ignore[arg-type]
        pad_id=0,
    )
    return get_state(model)


@pytest.mark.parametrize("microbatch", [1, 3, 8])
def test_a_step_is_adamw_on_the_clipped_sum_over_the_expected_number(
    case: tuple[str, PeftModel, list[Encoded]], microbatch: int
) -> None:
    """However the drawn records are cut into physical batches; draws of unlike size, none among them."""
    kind, model, examples = case
    draws = [[0, 2, 3, 5, 6], [], [7]]
    parameters = parameters_of(model)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    copies = {name: nn.Parameter(p.clone()) for name, p in before.items()}
    optimiser = torch.optim.AdamW(copies.values(), lr=1e-2, weight_decay=0.0)
    for drawn in draws:
        singles = [alone(kind, model, examples[i]) for i in drawn]
        for name, copy in copies.items():
            total = sum((clipped(s, 0.05)[name] for s in singles), torch.zeros_like(copy))
            copy.grad = total / 4
        optimiser.step()
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(copies[name])
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(before[name])
    found = run(kind, model, examples, Fixed(*draws), clip=0.05, count=3, microbatch=microbatch)
    for name, copy in copies.items():
        assert torch.allclose(found[name], copy, atol=2e-5), name


def test_noise_is_drawn_once_a_step_and_has_its_size(case: tuple[str, PeftModel, list[Encoded]]) -> None:
    """With nobody drawn a step is noise alone, so the first step of plain SGD would be noise · C / (q n)."""
    kind, model, examples = case
    stream = Fixed([], noisy=True)
    gradients: list[Tensor] = []
    parameters = parameters_of(model)
    original = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        gradients.append(torch.cat([p.grad.flatten() for p in parameters.values() if p.grad is not None]))
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        run(kind, model, examples, stream, noise=3.0, clip=0.5, count=1)
    (gradient,) = gradients
    assert stream.noises == 1
    assert float(gradient.std()) == pytest.approx(3.0 * 0.5 / 4, rel=0.15)
    assert len(set(gradient.tolist())) > 0.9 * gradient.numel()


def test_two_runs_differ_and_the_seed_does_not_matter(case: tuple[str, PeftModel, list[Encoded]]) -> None:
    kind, model, examples = case
    before = get_state(model)
    states = []
    for _ in range(2):
        with torch.no_grad():
            for name, parameter in parameters_of(model).items():
                parameter.copy_(before[name])
        states.append(
            run(kind, model, examples, KeyStream(), count=3)
        )  # AdamW's first step knows signs alone, and they may agree
    assert all(not torch.equal(states[0][name], states[1][name]) for name in before)


def test_a_heads_clip_is_by_default_twice_the_length_of_standardised_features() -> None:
    """Of the group's part, √2·√d; a gradient of √d, as of a record that is half right, is not clipped then."""
    parameters = parameters_of(classifier())
    mechanism = with_head_clip(Mechanism(1.0, 0.5, 0.1), parameters)
    assert mechanism == Mechanism(1.0, 0.5, 0.1, 2 * math.sqrt(32))
    assert with_head_clip(Mechanism(1.0, 0.5, 0.1, 3.0), parameters).head_clip_norm == 3.0
    assert with_head_clip(Mechanism(1.0, 0.5, 0.1), parameters_of(adapted(llama()))).head_clip_norm is None


def test_there_is_no_dropout() -> None:
    """What a model says of it does not matter: a record's part depends on that record alone."""
    draws = [[0, 1, 2, 5], [3, 4]]
    found = [
        run("classification", adapted(bert(**dropout), task_type="SEQ_CLS"), labelled(8), Fixed(*draws))
        for dropout in ({"hidden_dropout_prob": p, "attention_probs_dropout_prob": p} for p in (0.0, 0.5))
    ]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_the_model_is_left_without_hooks_and_gradients(case: tuple[str, PeftModel, list[Encoded]]) -> None:
    kind, model, examples = case
    run(kind, model, examples, Fixed([0], [1]))
    assert all(p.grad is None and p.grad_sample is None for p in parameters_of(model).values())  # type: ignore[attr-defined]
    assert not any(module._forward_hooks for module in model.modules() if isinstance(module, nn.Linear))
    assert not model.training


def test_batch_normalisation_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with pytest.raises(PrivacyError, match="layer 1 is a BatchNorm1d, which mixes the records of a batch; choose a model"):
        forbid_mixing(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [0.2, 0.02])
def test_a_layer_that_runs_on_more_than_the_records_is_refused_by_name(spread: float, dtype: torch.dtype) -> None:
    """DeBERTa's shared keys also run on relative positions, whose gradient Opacus adds to the first record's.

    With weights of a spread of 0.02 that is 3 to 5 % of a gradient, less than rounding in bf16 can be.
    """
    torch.manual_seed(0)
    settings = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64}
    model = DebertaV2ForSequenceClassification(
        DebertaV2Config(
            **settings,
            max_position_embeddings=32,
            relative_attention=True,
            position_buckets=8,
            share_att_key=True,
            pos_att_type=["p2c", "c2p"],
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            pooler_dropout=0.0,
            initializer_range=spread,
            num_labels=3,
        )
    )
    model.requires_grad_(False).to(dtype)
    adapted_model = adapted(model, task_type="SEQ_CLS", target_modules=["query_proj", "key_proj", "value_proj"])
    with pytest.raises(PrivacyError, match="(query|key)_proj.core: in a batch its gradients .* leave that layer out"):
        run("classification", adapted_model, labelled(8), Fixed([0], [1]))


def test_a_parameter_without_gradients_of_records_is_refused_by_name() -> None:
    with pytest.raises(PrivacyError, match="bare has no gradients of single records .* choose another adapter.method"):
        add_clipped({"bare": torch.zeros(1)}, {"bare": nn.Parameter(torch.zeros(1))}, 1.0, 2)


def test_a_layer_that_sees_a_list_of_tokens_has_no_gradients_of_records_and_is_refused() -> None:
    """Clipped one by one, the tokens of one record could add as many times the bound as there are of them."""
    layer = nn.Linear(2, 2)
    parameters = dict(layer.named_parameters())
    sums = {name: torch.zeros_like(p) for name, p in parameters.items()}
    with gradients_of_records(layer, parameters):
        layer(torch.randn(2, 5, 2).flatten(0, 1)).sum().backward()  # two records of five tokens
        with pytest.raises(PrivacyError, match="weight has no gradients of single records .* on a list of tokens"):
            add_clipped(sums, parameters, 1.0, 2)


@pytest.mark.parametrize("clip", [0.0, -1.0, math.inf, math.nan])
def test_a_clip_norm_that_bounds_nothing_is_refused(clip: float) -> None:
    with pytest.raises(PrivacyError, match=r"privacy.clip_norm = .* bounds nothing"):
        Mechanism(1.0, 0.5, clip)


@pytest.mark.parametrize(("noise", "rate"), [(0.0, 0.5), (math.inf, 0.5), (math.nan, 0.5), (1.0, 0.0), (1.0, 1.5)])
def test_what_is_no_mechanism_is_refused(noise: float, rate: float) -> None:
    with pytest.raises(PrivacyError, match="is no mechanism"):
        Mechanism(noise, rate, 1.0)
