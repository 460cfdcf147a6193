"""The comparison of methods under privacy, on the tiny model: every method runs, once; the peers are what they are called."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import private_accuracy
from fedsb.adapters.attach import attach, initial_state, layout_of
from fedsb.adapters.state import HEAD
from fedsb.models import device_of, load_model, locate
from tests.benchmarks.samples import check, last_line
from tests.federation.tiny import save_model, save_task


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A run with every method on a task of three labels."""
    save_task(tmp_path / "data" / "words", "classification", train=60)
    monkeypatch.setattr(private_accuracy, "RANK", 4)
    monkeypatch.setattr(private_accuracy, "PEER_RANK", 2)
    monkeypatch.setattr(private_accuracy, "PUBLIC", 9)
    monkeypatch.setattr(private_accuracy, "HELD_OUT", 6)
    monkeypatch.setattr(private_accuracy, "SIZES", {3: {"batch": 4, "sketched": 6}})
    monkeypatch.setattr(private_accuracy, "BEST", {("words", method): 1e-2 for method in private_accuracy.METHODS})
    model = save_model(tmp_path / "model", "classification")
    own = ["--model", model, "--tasks", "words", "--clients", "3", "--rounds", "2", "--steps", "2"]
    return ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"), *own]


def test_every_method_runs_once_with_and_without_privacy(
    command: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private_accuracy.main([*command, "--epsilons", "none,8", "--seeds", "0"])
    names = {f"words, 3 clients, ε={e}, {method}, lr=0.01" for e in ("none", "8.0") for method in private_accuracy.METHODS}
    result = last_line(capsys)
    check(result, "private_accuracy", names)
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert len(lines) == len(names)
    assert len({line["loss"] for line in lines}) == len(names), "two methods did the very same"
    monkeypatch.setattr(private_accuracy.grid, "run", lambda *_, **__: pytest.fail("run again"))
    monkeypatch.setattr(private_accuracy, "peer", lambda *_: pytest.fail("run again"))
    private_accuracy.main([*command, "--epsilons", "none,8", "--seeds", "0"])
    assert last_line(capsys)["figures"] == result["figures"]


def test_tuning_scores_on_rows_that_no_client_and_no_test_has(command: list[str], tmp_path: Path) -> None:
    private_accuracy.main([*command, "--epsilons", "none", "--methods", "ffa-lora", "--tune"])
    folder = tmp_path / "out" / "data" / "words"
    rows = {
        (part, name): (folder / part / f"{name}.jsonl").read_text().splitlines()
        for part in ("clients", "public", "tuning")
        for name in ("train", "test")
    }
    assert [len(rows[part]) for part in (("clients", "train"), ("public", "train"), ("tuning", "test"))] == [45, 9, 6]
    whole = (tmp_path / "data" / "words" / "train.jsonl").read_text().splitlines()
    held = [*rows["clients", "train"], *rows["public", "train"], *rows["tuning", "test"]]
    assert sorted(held) == sorted(whole)
    assert rows["tuning", "train"] == rows["clients", "train"]
    assert rows["clients", "test"] == (tmp_path / "data" / "words" / "test.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [line["rate"] for line in lines] == list(private_accuracy.RATES["ffa-lora"])


def test_peers_start_from_the_base_model_and_the_same_head(command: list[str]) -> None:
    options = private_accuracy.parse([*command, "--epsilons", "8"])
    private_accuracy.split(options.data / "words", options.out / "data" / "words")
    (cell, *_) = private_accuracy.cells(options)
    config = private_accuracy.config_of(cell, options)
    source, device = locate(config.model.source), device_of("cpu")
    ours = initial_state(layout_of(attach(load_model(source, config.model, 3, device), config)), config.seed)
    tokens = torch.tensor([[5, 6, 7]])
    for frozen, numbers in ((False, 1.0), (True, 0.5)):
        base = load_model(source, config.model, 3, device)
        model = private_accuracy.lora(base, config, frozen_a=frozen)
        parameters = private_accuracy.trained(model)
        heads = {name: p for name, p in parameters.items() if name.startswith(HEAD)}
        assert heads.keys() == {name for name in ours if name.startswith(HEAD)}
        for name, head in heads.items():
            torch.testing.assert_close(head.data, ours[name])
        factors = {name for name, _ in model.named_parameters() if ".lora_" in name}
        assert len(parameters.keys() - heads.keys()) == numbers * len(factors)
        assert any(".lora_A." in name for name in parameters) != frozen
        before = model(input_ids=tokens).logits
        with model.disable_adapter():  # which takes the head off too
            states = model.get_base_model().bert(input_ids=tokens)[1]
        torch.testing.assert_close(before, states @ ours[f"{HEAD}classifier.weight"].T)


def test_a_missing_folder_or_rate_is_named(command: list[str]) -> None:
    with pytest.raises(SystemExit, match="absent: cannot be read .* --data"):
        private_accuracy.main([*command, "--tasks", "absent", "--tune"])
    with pytest.raises(SystemExit, match="sb-weights on absent; run --tune"):
        private_accuracy.main([*command, "--tasks", "absent"])
