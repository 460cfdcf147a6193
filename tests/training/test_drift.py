"""What is added to gradients, against autograd; and what that does to training."""

from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

from fedsb.adapters.state import get_state, parameters_of
from fedsb.data.batches import draw
from fedsb.privacy.mechanism import Mechanism
from fedsb.privacy.noise import KeyStream
from fedsb.training import private
from fedsb.training.drift import Control, Proximal
from fedsb.training.loop import Plan, personal_plan, round_plan, train
from fedsb.training.private import train_private
from tests import reference
from tests.adapters.samples import adapted, llama, run_config, same
from tests.training.samples import rows


def _plan(**changes: Any) -> Plan:
    settings = {"first": 0, "count": 3, "total": 3, "batch_size": 5, "microbatch": 2, "warmup": 0, "decay": False}
    return Plan(**(settings | {"learning_rate": 1e-2, "head_learning_rate": 5e-3} | changes))


def _trained(plan: Plan) -> PeftModel:
    model = adapted(llama())
    train(model.get_base_model(), parameters_of(model), rows(8), plan, kind="causal", pad_id=0, seed=0, client="a")
    return model


def test_the_proximal_term_is_what_autograd_makes_of_it() -> None:
    torch.manual_seed(0)
    parameters = {"a": nn.Parameter(torch.randn(3, 4)), "b": nn.Parameter(torch.randn(5))}
    start = {name: p.detach().clone() for name, p in parameters.items()}
    proximal = Proximal(parameters, 0.7)
    with torch.no_grad():
        for p in parameters.values():
            p.add_(torch.randn_like(p))
    torch.stack([p.sin().sum() for p in parameters.values()]).sum().backward()
    proximal.add(parameters)
    found = [p.grad for p in parameters.values()]
    term = torch.stack([(p - start[name]).square().sum() for name, p in parameters.items()]).sum() * 0.7 / 2
    whole = torch.stack([p.sin().sum() for p in parameters.values()]).sum() + term
    for mine, theirs in zip(found, torch.autograd.grad(whole, list(parameters.values())), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_training_with_it_is_adamw_on_the_loss_with_the_term() -> None:
    plan = _plan(mu=3.0)
    naive = adapted(llama())
    start, parameters = get_state(naive), parameters_of(naive)
    optimiser = torch.optim.AdamW(parameters.values(), lr=1e-2, weight_decay=0.0)
    for step in range(3):
        optimiser.zero_grad()
        loss = reference.batch_loss(naive.get_base_model(), [rows(8)[i] for i in draw(8, step, 5, 0, "a")])
        now = parameters_of(naive)
        term = torch.stack([(p - start[name]).square().sum() for name, p in now.items()]).sum()
        (loss + 3.0 / 2 * term).backward()
        optimiser.step()
    expected = get_state(naive)
    for name, core in get_state(_trained(plan)).items():
        torch.testing.assert_close(core, expected[name], atol=2e-4, rtol=0)
    assert not same(get_state(_trained(plan)), get_state(_trained(_plan())))


@pytest.mark.parametrize("mu", [10.0, 1000.0])
def test_the_larger_mu_the_nearer_a_client_stays(mu: float) -> None:
    def far(plan: Plan) -> float:
        start = get_state(adapted(llama()))
        return sum(float((t - start[name]).square().sum()) for name, t in get_state(_trained(plan)).items())

    assert far(_plan(mu=mu, count=12)) < far(_plan(mu=mu / 10, count=12)) < far(_plan(count=12))


def test_only_rounds_have_the_term() -> None:
    config = run_config(strategy={"name": "fedprox", "mu": 0.3})
    assert round_plan(config, 1).mu == 0.3 and personal_plan(config).mu == 0.0
    assert round_plan(run_config(), 1).mu == 0.0


def test_under_privacy_the_term_is_added_after_clipping_and_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would be clipped with a record's gradient, and change what a record adds."""
    seen: list[torch.Tensor] = []
    added: list[torch.Tensor] = []
    put, add = private.put_gradient, Proximal.add

    def watch_put(parameters: Any, *rest: Any) -> None:
        put(parameters, *rest)
        seen.append(torch.cat([p.grad.flatten() for p in parameters.values()]))

    def watch_add(self: Proximal, parameters: Any) -> None:
        add(self, parameters)
        added.append(torch.cat([p.grad.flatten() for p in parameters.values()]) - seen[-1])

    monkeypatch.setattr(private, "put_gradient", watch_put)
    monkeypatch.setattr(Proximal, "add", watch_add)
    model, mechanism = adapted(llama()), Mechanism(noise_multiplier=1.0, sample_rate=0.5, clip_norm=1e-3)
    plan, stream = _plan(mu=5.0), KeyStream()
    train_private(model.get_base_model(), parameters_of(model), rows(8), plan, mechanism, stream, kind="causal", pad_id=0)
    assert not added[0].any() and added[1].norm() > 100 * 1e-3, "beyond what clipping would have left"


CURVES = (torch.diag(torch.tensor([4.0, 0.5])), torch.tensor([[1.0, 0.4], [0.4, 2.0]]))
CENTRES = (torch.tensor([3.0, -1.0]), torch.tensor([-2.0, 2.0]))
OPTIMUM = torch.linalg.solve(CURVES[0] + CURVES[1], CURVES[0] @ CENTRES[0] + CURVES[1] @ CENTRES[1])  # of the mean of both losses


def _two_clients(scaffold: bool, rounds: int, steps: int, rate: float, optimiser: Any = torch.optim.SGD) -> float:
    """How far from the optimum two clients with quadratic losses end, whose own optima and curvatures differ."""
    x, common = torch.zeros(2), torch.zeros(2)
    variates = [torch.zeros(2), torch.zeros(2)]
    for number in range(rounds):
        ends, changes = [], []
        for client, (curve, centre) in enumerate(zip(CURVES, CENTRES, strict=True)):
            parameters = {"w": nn.Parameter(x.clone())}
            control = Control({"w": variates[client]}, {"w": common})
            local = optimiser(parameters.values(), lr=rate * (1 - number / rounds) if optimiser is not torch.optim.SGD else rate)
            for _ in range(steps):
                local.zero_grad()
                off = parameters["w"] - centre
                (0.5 * off @ curve @ off).backward()
                if scaffold:
                    control.add(parameters)
                local.step()
            end = parameters["w"].detach()
            ends.append(end)
            if scaffold:
                after = control.variate()["w"]
                if optimiser is torch.optim.SGD:  # option II of the paper
                    torch.testing.assert_close(
                        after, variates[client] - common + (x - end) / (steps * rate), atol=1e-4, rtol=1e-3
                    )
                changes.append(after - variates[client])
                variates[client] = after
        x = torch.stack(ends).mean(0)
        common = common + torch.stack(changes).mean(0) if scaffold else common
    return float((x - OPTIMUM).norm())


def test_scaffold_reaches_the_optimum_from_which_the_mean_drifts() -> None:
    """Ten steps of SGD a round: FedAvg ends between the clients' own optima, SCAFFOLD where the mean of the losses is least."""
    assert _two_clients(False, 200, 10, 0.1) > 0.3
    assert _two_clients(True, 200, 10, 0.1) < 1e-4


def test_scaffold_drifts_less_with_adamw_too() -> None:
    fedavg, scaffold = (_two_clients(each, 300, 10, 0.05, torch.optim.AdamW) for each in (False, True))
    assert scaffold < fedavg / 3 and fedavg > 0.2, (scaffold, fedavg)


def test_a_control_without_correction_changes_no_bit() -> None:
    """As of a client that is alone: its own variate and the server's are the same."""
    plain, controlled = _trained(_plan()), adapted(llama())
    same_variate = {name: torch.randn_like(t) for name, t in get_state(controlled).items()}
    control = Control(same_variate, same_variate)
    settings: dict[str, Any] = {"kind": "causal", "pad_id": 0, "seed": 0, "client": "a", "control": control}
    train(controlled.get_base_model(), parameters_of(controlled), rows(8), _plan(), **settings)
    assert same(get_state(plain), get_state(controlled))
    assert all(tensor.any() for tensor in control.variate().values())
