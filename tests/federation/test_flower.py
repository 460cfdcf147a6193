"""Our loop and grid with Flower's own strategies, and our strategy in Flower's own loop."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAdam, FedAvg, FedMedian, Strategy

from fedsb.models import locate
from fedsb.report.journal import Journal
from fedsb.report.screen import Silent
from fedsb.store.tensors import load_tensors
from server.federation import Federation
from server.local_grid import LocalGrid
from server.run_folder import open_run
from strategies.records import unpack_state
from strategies.rounds import RoundResult, run_rounds
from tests.federation.tiny import config_of, federate, local_grid, table

app = ClientApp()


@app.train()
def _toward_own(message: Message, context: Context) -> Message:
    """Half the way to a number that is each client's own."""
    own = float(context.node_config["own"])
    (array,) = message.content["arrays"].values()
    moved = array.numpy() + (own - array.numpy()) / 2
    metrics = MetricRecord({"num-examples": int(context.node_config["n"]), "loss": own})
    return Message(RecordDict({"arrays": ArrayRecord({"w": Array(moved)}), "metrics": metrics}), reply_to=message)


def _run(strategy: Strategy, rounds: int = 3) -> tuple[np.ndarray, list[RoundResult]]:
    grid = LocalGrid(app, [{"own": own, "n": n} for own, n in ((1.0, 10), (2.0, 30), (9.0, 10))])
    handed: list[RoundResult] = []
    start = ArrayRecord({"w": Array(np.zeros(4, dtype=np.float32))})
    last = run_rounds(grid, strategy, start, first=1, last=rounds, seconds=10, after_round=handed.append)
    return last["w"].numpy(), handed


def test_flowers_fedavg_drops_in() -> None:
    weights, handed = _run(FedAvg(fraction_train=1.0, fraction_evaluate=0.0))
    expected = 0.0
    for _ in range(3):
        expected += ((1 * 10 + 2 * 30 + 9 * 10) / 50 - expected) / 2
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    assert [result.round for result in handed] == [1, 2, 3]
    metrics = handed[0].metrics
    assert metrics is not None and metrics["loss"] == pytest.approx(3.2)


@pytest.mark.parametrize("strategy", [FedMedian, FedAdam])
def test_others_of_flowers_strategies_drop_in(strategy: Any) -> None:
    weights, handed = _run(strategy(fraction_train=1.0, fraction_evaluate=0.0))
    assert len(handed) == 3 and np.isfinite(weights).all() and (weights > 0).all()


def test_our_strategy_runs_in_flowers_loop(llama: str, words: str, tmp_path: Path) -> None:
    """`Strategy.start` with evaluate_config {"which": "global"}; the same cores as our own loop, bit for bit."""
    config = config_of(table(llama, words))
    ours = federate(config, tmp_path / "ours")
    folder = tmp_path / "flowers"
    open_run(folder, config, resume=False)
    run = Federation(config, local_grid(config, folder), folder, Journal(folder / "events.jsonl", Silent()))
    basis = run.choose_basis()
    run.prepare_clients(basis)
    strategy = run.strategy(basis)
    _, state = run.restore_or_start(basis)
    which = ConfigRecord({"which": "global"})
    result = strategy.start(run.grid, state, num_rounds=3, evaluate_config=which)
    saved = load_tensors(tmp_path / "ours/checkpoints/round-0003/state.safetensors")[0]
    assert torch.equal(unpack_state(result.arrays), run.layout.flatten(saved))
    metrics = result.evaluate_metrics_clientapp[3]
    scores = ours["evaluation"]["global"].values()
    assert metrics["n"] == 9
    assert metrics["global-loss"] == pytest.approx(sum(score["loss"] * score["n"] for score in scores) / 9)
    assert [result.train_metrics_clientapp[i]["loss"] for i in (1, 2, 3)] == [e["loss"] for e in ours["history"]]
    assert locate(llama).sha256 == ours["model"]["sha256"]
