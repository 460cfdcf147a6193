"""GaLore's AdamW against its algorithm written out, its accumulation, its files, and the federated form."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedsb.adapters.galore import GaloreConfig, GaloreLinear
from fedsb.errors import AdapterError
from fedsb.training.galore import GaLoreAdamW, leading
from tests.adapters.samples import llama, tokens

SHAPES = [(6, 10), (10, 6), (8, 8)]


def _problem(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[list[nn.Parameter], list[Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    parameters = [nn.Parameter(torch.randn(shape, generator=draw).to(dtype)) for shape in SHAPES]
    return parameters, [torch.randn(shape, generator=draw).to(dtype) for shape in SHAPES]


def _loss(parameters: list[nn.Parameter], targets: list[Tensor], part: float = 1.0) -> Tensor:
    return part * sum(((p - t) ** 3).abs().sum() for p, t in zip(parameters, targets, strict=True))  # type: ignore[return-value]


def _take(optimiser: GaLoreAdamW, parameters: list[nn.Parameter], targets: list[Tensor], steps: int, parts: int = 1) -> None:
    for _ in range(steps):
        optimiser.zero_grad()
        for _ in range(parts):
            _loss(parameters, targets, 1 / parts).backward()  # type: ignore[no-untyped-call]
        optimiser.step()


def test_steps_are_those_of_the_algorithm() -> None:
    """With a new P every two steps, moments that go on, weight decay; matrices wide, tall and square."""
    parameters, targets = _problem()
    expected = [p.detach().clone() for p in parameters]
    optimiser = GaLoreAdamW([{"params": parameters, "rank": 3}], lr=0.1, gap=2, scale=0.5, weight_decay=0.1)
    _take(optimiser, parameters, targets, 5)
    for w, target in zip(expected, targets, strict=True):
        mean = square = p = torch.zeros(())
        for step in range(5):
            gradient = 3 * (w - target) ** 2 * (w - target).sign()
            side = gradient if w.shape[0] <= w.shape[1] else gradient.T
            if step % 2 == 0:
                p = leading(side, 3)
            r = p.T @ side
            mean, square = 0.9 * mean + 0.1 * r, 0.999 * square + 0.001 * r * r
            n = mean / (1 - 0.9 ** (step + 1)) / ((square / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
            move = 0.5 * p @ n
            w *= 1 - 0.1 * 0.1
            w -= 0.1 * (move if w.shape[0] <= w.shape[1] else move.T)
    for found, w in zip(parameters, expected, strict=True):
        torch.testing.assert_close(found.detach(), w, atol=1e-5, rtol=1e-4)


def test_a_group_without_rank_is_torchs_adamw() -> None:
    ours, targets = _problem()
    theirs, _ = _problem()
    one = GaLoreAdamW(ours, lr=0.05, weight_decay=0.2)
    two = torch.optim.AdamW(theirs, lr=0.05, weight_decay=0.2)
    for _ in range(4):
        for optimiser, parameters in ((one, ours), (two, theirs)):
            optimiser.zero_grad()
            _loss(parameters, targets).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("parts", [1, 4])
def test_per_layer_is_the_same_and_holds_one_gradient_at_a_time(parts: int) -> None:
    """Also where a step has several backward passes: the released per-layer mode steps in each of them."""
    whole, targets = _problem()
    layered, _ = _problem()
    alive: list[int] = []
    for p in layered:  # before the optimiser's own hooks
        p.register_post_accumulate_grad_hook(lambda _: alive.append(sum(q.grad is not None for q in layered)))
    one = GaLoreAdamW([{"params": whole, "rank": 3}], lr=0.1, gap=2)
    two = GaLoreAdamW([{"params": layered, "rank": 3}], lr=0.1, gap=2, per_layer=True)
    _take(one, whole, targets, 5)
    _take(two, layered, targets, 5, parts)
    for a, b in zip(whole, layered, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert set(alive) == {1} and all(p.grad is None for p in layered)
    assert two.state[layered[0]]["step"] == 5, "one step, however many backward passes"


def test_passes_of_different_gradients_add_up_to_one_step() -> None:
    whole, targets = _problem()
    layered, _ = _problem()
    others = [_problem(seed)[1] for seed in (1, 2, 3)]
    one = GaLoreAdamW([{"params": whole, "rank": 3}], lr=0.1, gap=100)
    two = GaLoreAdamW([{"params": layered, "rank": 3}], lr=0.1, gap=100, per_layer=True)
    for optimiser, parameters in ((one, whole), (two, layered)):
        _take(optimiser, parameters, targets, 1)  # P, of the same gradient
        for _ in range(3):
            optimiser.zero_grad()
            for other in others:
                _loss(parameters, other).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    for a, b in zip(whole, layered, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_hooks_end_with_their_optimiser_and_read_settings_are_in_force(tmp_path: Path) -> None:
    parameters, targets = _problem()
    saved = GaLoreAdamW([{"params": parameters, "rank": 2}], lr=0.1, gap=3, per_layer=True)
    _take(saved, parameters, targets, 2)
    told = saved.state_dict()
    with pytest.raises(RuntimeError, match=r"another per-layer optimiser has taken this gradient; close\(\) that one first"):
        _take(GaLoreAdamW([{"params": parameters, "rank": 2}], per_layer=True), parameters, targets, 1)
    saved.close()
    read = GaLoreAdamW([{"params": parameters, "rank": 4}], lr=0.1, gap=1, per_layer=True)
    read.load_state_dict(told)
    _take(read, parameters, targets, 2)
    assert all(read.state[p]["P"].shape[1] == 2 and read.state[p]["projected"] == 3 for p in parameters)
    with pytest.raises(ValueError, match="matrices alone are projected"):
        read.add_param_group({"params": [nn.Parameter(torch.ones(3))], "rank": 2})
    more = nn.Parameter(torch.ones(4, 6))
    read.add_param_group({"params": [more], "rank": 2})
    (more**2).sum().backward()  # type: ignore[no-untyped-call]
    assert more.grad is None
    del read
    gc.collect()
    before = more.detach().clone()
    (more**2).sum().backward()  # type: ignore[no-untyped-call]
    torch.optim.SGD([more], lr=0.1).step()
    assert not torch.equal(before, more), "a dead optimiser takes no gradients"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_read_without_pickle_it_goes_on_to_the_same_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    whole, targets = _problem(dtype=dtype)
    settings: Any = {"lr": 0.1, "gap": 3}
    _take(GaLoreAdamW([{"params": whole, "rank": 3}], **settings), whole, targets, 7)
    cut, _ = _problem(dtype=dtype)
    first = GaLoreAdamW([{"params": cut, "rank": 3}], **settings)
    _take(first, cut, targets, 4)
    torch.save({"weights": [p.detach() for p in cut], "optimiser": first.state_dict()}, tmp_path / "state.pt")
    read = torch.load(tmp_path / "state.pt", weights_only=True)
    again = [nn.Parameter(w) for w in read["weights"]]
    second = GaLoreAdamW([{"params": again, "rank": 3}], **settings)
    second.load_state_dict(read["optimiser"])
    _take(second, again, targets, 3)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))


@pytest.mark.parametrize("shape", [(20, 30), (300, 320), (320, 300)])
def test_the_projection_is_on_the_leading_singular_vectors(shape: tuple[int, int]) -> None:
    draw = torch.Generator().manual_seed(1)
    u, v = (torch.linalg.qr(torch.randn(side, 20, generator=draw)).Q for side in shape)
    matrix = u @ torch.diag(0.7 ** torch.arange(20.0)) @ v.T
    p = leading(matrix, 6)
    torch.testing.assert_close(p.T @ p, torch.eye(6), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(p @ p.T, u[:, :6] @ u[:, :6].T, atol=2e-3, rtol=1e-2)
    full = leading(matrix, max(shape))
    torch.testing.assert_close(full @ (full.T @ matrix), matrix, atol=1e-5, rtol=1e-4)
    zero = leading(torch.zeros(shape), 5)
    torch.testing.assert_close(zero.T @ zero, torch.eye(5))


def test_what_cannot_be_projected_is_refused() -> None:
    with pytest.raises(ValueError, match="matrices alone are projected"):
        GaLoreAdamW([{"params": [nn.Parameter(torch.ones(3))], "rank": 2}])
    with pytest.raises(ValueError, match="rank = 0"):
        GaLoreAdamW([{"params": [nn.Parameter(torch.ones(3, 3))], "rank": 0}])
    p = nn.Parameter(torch.ones(3, 3))
    optimiser = GaLoreAdamW([{"params": [p], "rank": 2}])
    (p * float("nan")).sum().backward()  # type: ignore[no-untyped-call]
    with pytest.raises(FloatingPointError, match="holds NaN or infinity"):
        optimiser.step()


def test_a_round_of_the_federated_form_is_adamw_in_one_projection() -> None:
    """P·N with AdamW on N moves the weight as this does, while P stays."""
    draw = torch.Generator().manual_seed(2)
    weight, x, target = (torch.randn(shape, generator=draw) for shape in ((6, 10), (16, 10), (16, 6)))
    base = nn.Linear(10, 6, bias=False).requires_grad_(False)
    base.weight.copy_(weight)
    layer = GaloreLinear(base, "default", 3)
    n, p = layer.trained("default")["N"], layer.frozen("default")["P"]
    adamw = torch.optim.AdamW([n], lr=0.02, weight_decay=0.0)
    full = nn.Parameter(weight.clone())
    galore = GaLoreAdamW([{"params": [full], "rank": 3}], lr=0.02, scale=1.0, gap=100)
    galore.state[full] |= {"step": 0, "P": p.clone(), "projected": 0}
    for _ in range(6):
        for optimiser, y in ((adamw, layer), (galore, lambda z: z @ full.T)):
            optimiser.zero_grad()
            (y(x) - target).square().mean().backward()
            optimiser.step()
    torch.testing.assert_close(weight + layer.get_delta_weight("default"), full, atol=1e-5, rtol=1e-4)
    assert (full - weight).abs().max() > 0.01


def test_a_whole_model_learns_with_less_state() -> None:
    model = llama().requires_grad_(True)
    matrices = [m.weight for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    optimiser = GaLoreAdamW([{"params": matrices, "rank": 4}, {"params": others}], lr=5e-3, gap=4, scale=1.0, per_layer=True)
    losses = []
    for _ in range(10):
        optimiser.zero_grad()
        loss = model(tokens(), labels=tokens()).loss
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    state = sum(t.numel() for p in matrices for t in optimiser.state[p].values() if isinstance(t, Tensor))
    assert state == sum(4 * min(p.shape) + 2 * 4 * max(p.shape) for p in matrices) < sum(p.numel() for p in matrices)


def test_settings_that_make_no_projection() -> None:
    with pytest.raises(AdapterError, match="r = 0 makes no projection"):
        GaloreConfig(r=0)
