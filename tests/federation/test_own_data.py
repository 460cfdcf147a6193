"""Clients that hold data of their own: nothing is dealt out, the server reads none, a client without its folder is named."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from flwr.app import UserConfig

from clients.answers import site_of
from clients.app import app as client_app
from clients.session import open_session
from fedsb.cli.evaluate import evaluate_run
from fedsb.config import RunConfig
from fedsb.deploy.home import Admitted, Home
from fedsb.errors import DataError, FedsbError, StoreError
from server.local_grid import FIRST_NODE, LocalGrid
from tests.federation.tiny import (
    assert_same_result,
    classification,
    config_of,
    events,
    federate,
    final_state,
    personal_states,
    save_task,
    table,
)

NAMES = ("alpha", "beta", "gamma")
LABELS = ["middle", "high", "never", "low"]


def own(llama: str, folder: Path, **sections: Any) -> RunConfig:
    data = {"partition": "own"}
    return config_of(
        table(llama, f"jsonl:{folder}/{{client}}", data=data, federation={"rounds": 2, "names": list(NAMES)}, **sections)
    )


def save_own(folder: Path, kind: str = "causal") -> None:
    """Other data, and another amount of it, for every client."""
    for number, name in enumerate(NAMES):
        save_task(folder / name, kind, train=6 + 5 * number, test=4 + number)
        rows = (folder / name / "train.jsonl").read_text().splitlines(keepends=True)
        (folder / name / "train.jsonl").write_text("".join(rows[number:]))


class Sites(LocalGrid):
    """Real sites: they are named by their operators, have no place in a partition, and all their errors are replies."""

    refusals = (FedsbError,)

    def __init__(self, names: tuple[str, ...], folder: Path) -> None:
        nodes: list[UserConfig] = [
            {"name": name, "partition-id": 0, "num-partitions": 1, "folder": str(folder)} for name in names
        ]
        super().__init__(client_app, nodes)


def test_by_client_no_more_take_part_than_privacy_was_planned_for(llama: str, tmp_path: Path) -> None:
    """δ, noise and divisor are those of `federation.clients`, and any number of sites may come."""
    save_own(tmp_path / "data")
    content = json.loads(own(llama, tmp_path / "data", privacy={"unit": "none"}).to_json())
    content["federation"] |= {"clients": 2, "names": [], "weighting": "uniform"}
    content["privacy"] = {"unit": "client", "noise_multiplier": 1.0}
    federate(config_of(content), tmp_path / "run", grid=Sites(NAMES, tmp_path / "sites"))
    assert len({event["client"] for event in events(tmp_path / "run", "reply")}) == 2
    reasons = [event["reason"] for event in events(tmp_path / "run", "refused")]
    assert reasons and all(
        "beyond the federation.clients = 2 that privacy by client is planned for" in reason for reason in reasons
    )


def test_every_client_trains_and_is_scored_on_all_of_its_own(llama: str, tmp_path: Path) -> None:
    save_own(tmp_path / "data")
    summary = federate(own(llama, tmp_path / "data"), tmp_path / "run")
    assert {name: score["n"] for name, score in summary["evaluation"]["personal"].items()} == {"alpha": 4, "beta": 5, "gamma": 6}
    assert {score["task"] for score in summary["evaluation"]["personal"].values()} == {"words"}
    assert evaluate_run(tmp_path / "run", sequential=True) == summary["evaluation"]
    (reply,) = [event for event in events(tmp_path / "run", "reply") if event["round"] == 1 and event["client"] == "beta"]
    rows = tmp_path / "data" / "beta" / "train.jsonl"
    rows.write_text(rows.read_text().splitlines(keepends=True)[0])
    open_session.cache_clear()  # another run
    federate(own(llama, tmp_path / "data"), tmp_path / "again")
    (again,) = [event for event in events(tmp_path / "again", "reply") if event["round"] == 1 and event["client"] == "beta"]
    assert again["loss"] != reply["loss"]


def test_a_classifier_whose_sites_lack_some_labels(bert: str, tmp_path: Path) -> None:
    save_own(tmp_path / "data", "classification")
    alpha = tmp_path / "data" / "alpha" / "train.jsonl"
    kept = [line for line in alpha.read_text().splitlines(keepends=True) if json.loads(line)["label"] == "low"]
    alpha.write_text("".join(kept))
    sections = {"data": {"partition": "own", "labels": LABELS}, "federation": {"rounds": 1, "names": list(NAMES)}}
    config = config_of(classification(bert, f"jsonl:{tmp_path}/data/{{client}}", **sections))
    summary = federate(config, tmp_path / "run")
    assert summary["evaluation"]["global"]["gamma"]["n"] == 6
    (head,) = (tensor for name, tensor in final_state(tmp_path / "run").items() if name.endswith("classifier.weight"))
    assert head.shape[0] == len(LABELS)
    (tmp_path / "data" / "beta" / "test.jsonl").write_text('{"text": "red", "label": "secret"}\n')
    with pytest.raises(DataError, match=r"beta/test.jsonl:1: label 'secret' is none of the run's labels") as caught:
        federate(config.model_copy(update={"name": "spoilt"}), tmp_path / "spoilt")
    assert "secret" not in caught.value.outside and "beta/test.jsonl:1" in caught.value.outside


def test_the_server_reads_no_data_and_sites_need_no_place(bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three sites where `federation.clients` says two, all with place 0 of 1, give what three simulated clients give."""
    save_own(tmp_path / "data", "classification")
    monkeypatch.setattr("fedsb.data.tasks.label_names", lambda task: pytest.fail("read for its labels"))
    data = {"partition": "own", "labels": LABELS}
    source = f"jsonl:{tmp_path}/data/{{client}}"
    three = config_of(classification(bert, source, data=data, federation={"rounds": 2, "names": list(NAMES)}))
    two = config_of(classification(bert, source, data=data, federation={"clients": 2, "rounds": 2, "min_clients": 3}))
    simulated = federate(three, tmp_path / "simulated")
    home = Home(tmp_path / "home")
    home.write_admitted({name: Admitted(node=str(FIRST_NODE + i), key_sha256="", since="") for i, name in enumerate(NAMES)})
    out = tmp_path / "run"
    summary = federate(two, out, grid=Sites(NAMES, tmp_path / "kept"), home=home.folder)
    assert_same_result(tmp_path / "simulated", out)
    assert summary["evaluation"] == simulated["evaluation"] and summary["clients"] == 3
    assert [event["clients"] for event in events(out, "start")] == [None]
    with pytest.raises(StoreError, match="its sites hold their data themselves"):
        evaluate_run(out)


def test_a_site_without_its_data_is_named_and_the_run_goes_on(llama: str, tmp_path: Path) -> None:
    save_own(tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "beta")
    home = Home(tmp_path / "home")
    home.write_admitted({name: Admitted(node=str(FIRST_NODE + i), key_sha256="", since="") for i, name in enumerate(NAMES)})
    out = tmp_path / "run"
    summary = federate(own(llama, tmp_path / "data"), out, grid=Sites(NAMES, tmp_path / "kept"), home=home.folder)
    refused, *again = events(out, "refused")
    assert {event["client"] for event in again} <= {refused["client"]}
    assert (refused["round"], refused["client"]) == (0, "beta")
    assert refused["reason"] == (
        f"failed: {tmp_path}/data/beta: there is no such folder; a jsonl: task is a folder with train.jsonl and test.jsonl"
    )
    assert summary["clients"] == 2 and personal_states(out).keys() == {"alpha", "gamma"}


def test_who_a_client_with_own_data_is(llama: str, tmp_path: Path) -> None:
    config = own(llama, tmp_path)
    assert site_of({"name": "delta", "folder": str(tmp_path)}, config).name == "delta"
    assert site_of({"name": "delta", "partition-id": 9, "num-partitions": 4}, config).name == "delta"
    assert site_of({"partition-id": 1, "num-partitions": 3}, config).name == "beta"  # as Flower's simulation numbers them
    for node in ({"partition-id": 3, "num-partitions": 4}, {"partition-id": -1, "num-partitions": 3}):
        with pytest.raises(FedsbError, match="deals its data to federation.clients = 3; make the numbers equal"):
            site_of(node, config)
    for name in ("../beta", "a/b", "..", "", "Beta"):
        with pytest.raises(FedsbError, match="is no name of a site"):
            site_of({"name": name}, config)
