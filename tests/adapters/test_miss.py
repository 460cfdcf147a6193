"""MiSS against the formula written as a loop, and against PEFT's own layer."""

from typing import Any

import pytest
import torch
from peft import MissConfig, PeftModel
from torch import Tensor

from fedsb.adapters.attach import attach, give_basis, layout_of
from fedsb.adapters.methods import METHODS
from fedsb.adapters.miss import tiled_identity
from fedsb.adapters.state import get_state, layers_of, parameters_of, set_state
from fedsb.basis.frames import Basis
from fedsb.errors import AdapterError, BasisError
from tests.adapters.samples import bert, llama, randomise, run_config, same, tokens

RANK = 5  # divides no side of the model: PEFT fills the last slice up


def _attached(model: Any, **adapter: Any) -> PeftModel:
    made: PeftModel = attach(model, run_config(adapter={"method": "miss", "rank": RANK} | adapter))
    return made


def _looped(weight: Tensor, d: Tensor, x: Tensor) -> Tensor:
    """W0·x plus Dᵀ times every slice of x, one vector after the other, in fp64."""
    weight, d, x = weight.double(), d.double(), x.double()
    rows = []
    for vector in x.reshape(-1, x.shape[-1]):
        y = weight @ vector
        for start in range(0, len(vector), len(d)):
            piece = vector[start : start + len(d)]
            y = y + d[: len(piece)].T @ piece
        rows.append(y)
    return torch.stack(rows).view(*x.shape[:-1], weight.shape[0])


@pytest.mark.parametrize("rank", [4, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peft_computes_the_formula(rank: int, dtype: torch.dtype) -> None:
    model = _attached(llama(dtype), rank=rank)
    assert {p.dtype for p in parameters_of(model).values()} == {torch.float32}
    randomise(model, "default", 1)
    for layer in list(layers_of(model).values())[:7]:
        x = torch.randn(2, 3, layer.in_features, generator=torch.Generator().manual_seed(4)).to(dtype)
        expected = _looped(layer.get_base_layer().weight, layer.miss_block["default"], x)
        tolerance = 1e-5 if dtype == torch.float32 else 0.02
        torch.testing.assert_close(layer(x).double(), expected, atol=5 * tolerance, rtol=tolerance)


@pytest.mark.parametrize("shape", [(4, 12), (4, 14), (5, 3), (1, 3)])
def test_the_tiled_identity_sums_the_slices(shape: tuple[int, int]) -> None:
    a, (rank, width) = tiled_identity(shape), shape
    assert a.shape == shape and a.is_contiguous()
    assert all(a[j, i] == (i % rank == j) for j in range(rank) for i in range(width))


def test_the_chain_is_the_loop() -> None:
    d, x = torch.randn(4, 9, dtype=torch.float64), torch.randn(14, dtype=torch.float64)
    product = torch.linalg.multi_dot(METHODS["miss"].chain({"D": d}, None, tiled_identity((4, 14)).double(), 1.0))
    torch.testing.assert_close(product @ x, _looped(torch.zeros(9, 14), d, x))


def test_a_new_adapter_changes_nothing_and_trains_d_alone() -> None:
    plain = llama()
    expected = plain(tokens()).logits
    model = _attached(plain)
    assert torch.equal(model(tokens()).logits, expected)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if "miss_block" in name
    }
    shapes = dict(layout_of(model).shapes)
    assert shapes["model.layers.1.mlp.up_proj.D"] == (RANK, 48) and len(shapes) == 14


def test_a_classifiers_head_is_trained_along() -> None:
    names = get_state(_attached_classifier())
    assert "bert.pooler.dense.D" in names and {"head.classifier.weight", "head.classifier.bias"} <= names.keys()


def _attached_classifier() -> Any:
    return attach(bert(), run_config(model={"kind": "classification"}, adapter={"method": "miss", "rank": RANK}))


@pytest.mark.parametrize("rank", [4, 5])
def test_gradients_are_those_of_finite_differences(rank: int) -> None:
    model = _attached(llama(), rank=rank).double()
    randomise(model, "default", 2)
    layer, draw = layers_of(model)["model.layers.0.mlp.down_proj"], torch.Generator().manual_seed(4)
    d, x = layer.miss_block["default"], torch.randn(2, 3, 48, generator=draw).double()

    def loss() -> Tensor:
        found: Tensor = layer(x).square().sum()
        return found

    loss().backward()  # type: ignore[no-untyped-call]
    for place in ((0, 0), (3, 7), (rank - 1, 31)):
        with torch.no_grad():
            d[place] += 1e-4
            above = loss()
            d[place] -= 2e-4
            below = loss()
            d[place] += 1e-4
        assert float((above - below) / 2e-4) == pytest.approx(float(d.grad[place]), rel=1e-6, abs=1e-6)


def test_a_rank_beyond_a_layers_width_is_refused_by_name() -> None:
    with pytest.raises(BasisError, match=r"adapter\.rank = 40 .*layer model\.layers\.0\.self_attn\.k_proj, which is 16"):
        _attached(llama(), rank=40)
    with pytest.raises(BasisError, match=r"adapter\.rank = 20 .*k_proj, which is 16"):
        _attached(llama(), rank=20)
    with pytest.raises(AdapterError, match="matches no layer"):
        _attached(llama(), rank=40, target_modules=["query"])


def test_a_frame_that_is_not_the_tiled_identity_is_refused() -> None:
    model, config = _attached(llama()), run_config(adapter={"method": "miss", "rank": RANK})
    a = {name: tiled_identity((RANK, layer.in_features)) for name, layer in layers_of(model).items()}
    give_basis(model, Basis({}, a, {}), config)
    first = next(iter(a))
    for odd in (a[first] * 2, a[first].roll(1, 1)):
        with pytest.raises(BasisError, match="was not made for adapter.method = miss"):
            give_basis(model, Basis({}, a | {first: odd}, {}), config)
    with pytest.raises(BasisError, match="for other layers or another rank"):
        give_basis(model, Basis({}, {name: tiled_identity((RANK + 1, t.shape[1])) for name, t in a.items()}, {}), config)


def test_states_of_other_methods_are_refused() -> None:
    model = _attached(llama())
    before = get_state(model)
    ffa = attach(llama(), run_config(adapter={"method": "ffa-lora", "rank": RANK}))
    for one, other in ((model, ffa), (ffa, model)):
        with pytest.raises(AdapterError, match="in only one of model and adapter"):
            set_state(one, get_state(other))
    assert same(get_state(model), before)


def test_the_table_asks_peft_for_the_additive_form() -> None:
    config = METHODS["miss"].config(RANK, float(RANK), {"target_modules": "all-linear"})
    assert isinstance(config, MissConfig) and config.init_weights is True and config.miss_dropout == 0
