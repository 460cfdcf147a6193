"""Server optimisers against Flower's, over several rounds."""

from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedYogi

from fedsb.aggregation.optimiser import OPTIMISERS, Settings, step
from server.local_grid import LocalGrid
from strategies.rounds import run_rounds

app = ClientApp()
ROUNDS = 6


def _toward(x: np.ndarray, target: np.ndarray) -> np.ndarray:
    moved: np.ndarray = x + 0.3 * (target - x) + np.float32(0.05) * np.sin(40 * x)
    return moved.astype(np.float32)


@app.train()
def _client(message: Message, context: Context) -> Message:
    (array,) = message.content["arrays"].values()
    target = np.linspace(-1, 2, 12, dtype=np.float32)
    metrics = MetricRecord({"num-examples": 1})
    moved = ArrayRecord({"w": Array(_toward(array.numpy().astype(np.float32), target))})
    return Message(RecordDict({"arrays": moved, "metrics": metrics}), reply_to=message)


@pytest.mark.parametrize(("flowers", "name"), [(FedAdam, "fedadam"), (FedYogi, "fedyogi"), (FedAdagrad, "fedadagrad")])
def test_it_goes_the_way_of_flowers_class(flowers: Any, name: str) -> None:
    betas = {"beta_1": 0.8} | ({} if flowers is FedAdagrad else {"beta_2": 0.95})
    chosen = {"fraction_train": 1.0, "fraction_evaluate": 0.0, "min_train_nodes": 1, "min_available_nodes": 1}
    if flowers is FedAdagrad:
        strategy = FedAdagrad(**chosen, eta=0.2, tau=0.01)
        strategy.beta_1 = 0.8
    else:
        strategy = flowers(**chosen, **betas, eta=0.2, tau=0.01)
    theirs: list[torch.Tensor] = []
    start = ArrayRecord({"w": Array(np.zeros(12, dtype=np.float32))})
    keep = lambda result: theirs.append(torch.from_numpy(result.arrays["w"].numpy()))  # noqa: E731
    run_rounds(LocalGrid(app, [{}]), strategy, start, first=1, last=ROUNDS, seconds=10, after_round=keep)
    settings, memory, state = Settings(0.2, 0.8, 0.95, 0.01), dict[str, torch.Tensor](), torch.zeros(12)
    target = np.linspace(-1, 2, 12, dtype=np.float32)
    for number in range(1, ROUNDS + 1):
        average = torch.from_numpy(_toward(state.numpy(), target))
        state, memory = step(state, average, memory, OPTIMISERS[name], settings, number)
        torch.testing.assert_close(state.double(), theirs[number - 1].double(), rtol=1e-4, atol=1e-5)
    assert state.abs().max() > 0.3


@pytest.mark.parametrize("name", OPTIMISERS)
def test_it_finds_the_middle_that_the_clients_pull_to(name: str) -> None:
    target, state, memory = torch.linspace(-1, 1, 8), torch.zeros(8), dict[str, torch.Tensor]()
    for number in range(1, 301):
        average, settings = state + 0.5 * (target - state), Settings(0.05, 0.9, 0.99, 1e-2)
        state, memory = step(state, average, memory, OPTIMISERS[name], settings, number)
    torch.testing.assert_close(state, target, atol=0.1, rtol=0)


def test_without_an_update_nothing_moves() -> None:
    state = torch.randn(5, generator=torch.Generator().manual_seed(0))
    for optimiser in OPTIMISERS.values():
        moved, memory = step(state, state, {}, optimiser, Settings(0.1, 0.9, 0.99, 1e-3), 1)
        assert torch.equal(moved, state) and not memory["v"].any()
