"""`fedsb privacy plan` and `ledger`: what is printed before a run is what its ledgers say afterwards."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from fedsb.config import RunConfig
from fedsb.privacy.accounting import Release, epsilon
from fedsb.privacy.mechanism import delta_of, mechanism_of, planned_steps, sketch_mechanism
from tests.cli.front_door import call, complaint

Capture = pytest.CaptureFixture[str]
RECORD = ("privacy.unit=record", "privacy.epsilon=8.0", "federation.weighting=uniform")


def sets(*settings: str) -> list[str]:
    return [part for setting in settings for part in ("--set", setting)]


def told(capsys: Capture, *arguments: str) -> dict[str, Any]:
    """The JSON object that a command prints."""
    capsys.readouterr()
    assert call("privacy", *arguments, "--json") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.fixture(scope="module")
def finished(toml: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished private run."""
    folder = tmp_path_factory.mktemp("private") / "run"
    assert call("simulate", str(toml), "--out", str(folder), *sets(*RECORD)) == 0
    return folder


def test_a_plan_is_the_accountants_for_each_client(toml: Path, capsys: Capture) -> None:
    found, config = told(capsys, "plan", str(toml), *sets(*RECORD)), RunConfig.load(toml, RECORD)
    assert found["unit"] == "record" and [row["client"] for row in found["clients"]] == list(config.client_names)
    for row in found["clients"]:
        mechanism, steps, delta = mechanism_of(config, row["of"]), planned_steps(config), delta_of(config, row["of"])
        cost = epsilon([mechanism.release(steps)], delta)
        open_cost = epsilon([Release(mechanism.noise_multiplier, 1.0, steps)], delta)
        assert row["delta"] == delta <= 1 / row["of"] and (row["steps"], row["basis"]) == (steps, 0)
        assert (row["epsilon"], row["rdp"], row["accountant"]) == (cost.best, cost.rdp, cost.accountant)
        assert 7.9 < row["epsilon"] <= 8.0 and row["unamplified"] == open_cost.best >= row["epsilon"]
        signal = mechanism.sample_rate * row["of"]
        assert row["noise_over_signal"] == pytest.approx(mechanism.noise_multiplier * math.sqrt(found["numbers"]) / signal)


def test_noise_falls_on_what_learns(toml: Path, capsys: Capture) -> None:
    """Of cores in turn one alone; of FedSA-LoRA both factors, of which under privacy by client one alone travels."""
    numbers = {}
    for name, method in (("core", "lora-sb"), ("heads", "ravan"), ("turns", "refreshed-sb"), ("both", "fedsa-lora")):
        numbers[name] = told(capsys, "plan", str(toml), *sets(*RECORD, f"adapter.method={method}"))["numbers"]
    client = ("privacy.unit=client", *RECORD[1:], "adapter.method=fedsa-lora")
    assert numbers["turns"] == numbers["core"] and numbers["heads"] == 4 * numbers["core"]
    assert 0 < told(capsys, "plan", str(toml), *sets(*client))["numbers"] < numbers["both"]


def test_a_sketched_basis_is_in_the_plan(toml: Path, capsys: Capture) -> None:
    sketched = (*RECORD, "basis.source=sketch")
    found, config = told(capsys, "plan", str(toml), *sets(*sketched)), RunConfig.load(toml, sketched)
    for row in found["clients"]:
        basis = sketch_mechanism(config, row["of"]).release(1)
        assert row["basis"] == epsilon([basis], row["delta"]).best > 0
        assert row["epsilon"] == epsilon([basis, mechanism_of(config, row["of"]).release(row["steps"])], row["delta"]).best <= 8


def test_with_privacy_by_client_there_is_one_row(toml: Path, capsys: Capture) -> None:
    found = told(capsys, "plan", str(toml), *sets("privacy.unit=client", *RECORD[1:]))
    (row,) = found["clients"]
    assert (row["client"], row["of"], row["steps"]) == ("every client", 3, RunConfig.load(toml).federation.rounds)


def test_a_site_asks_for_its_own_number_of_records(toml: Path, capsys: Capture) -> None:
    rows = told(capsys, "plan", str(toml), *sets(*RECORD), "--records", "100", "--records", "10000")["clients"]
    assert [row["of"] for row in rows] == [100, 10000] and rows[0]["delta"] == 100 * rows[1]["delta"]
    assert rows[0]["noise_multiplier"] > rows[1]["noise_multiplier"], "more records, a smaller share of them a step"
    assert all(row["epsilon"] <= 8.0 and row["unamplified"] > 2 * row["epsilon"] for row in rows)


def test_what_was_planned_is_what_the_ledgers_say(toml: Path, finished: Path, capsys: Capture) -> None:
    planned = {row["client"]: row for row in told(capsys, "plan", str(toml), *sets(*RECORD))["clients"]}
    spent = told(capsys, "ledger", str(finished))
    assert {row["client"] for row in spent["clients"]} == planned.keys()
    for row in spent["clients"]:
        assert row["epsilon"] == pytest.approx(planned[row["client"]]["epsilon"]) and row["data_sets"] == 1
        own = [entry for entry in spent["entries"] if entry["client"] == row["client"]]
        assert sum(entry["steps"] for entry in own) == planned[row["client"]]["steps"] and len(own) == row["releases"]


def test_a_site_and_a_ledger_alone_can_be_asked_at_another_delta(finished: Path, capsys: Capture) -> None:
    folder = finished / "sites" / "client-1"
    of_folder, of_file = told(capsys, "ledger", str(folder)), told(capsys, "ledger", str(folder / "ledger.jsonl"))
    assert of_folder == of_file and [row["client"] for row in of_folder["clients"]] == ["client-1"]
    stricter = told(capsys, "ledger", str(folder), "--delta", "1e-9")["clients"][0]
    assert stricter["delta"] == 1e-9 and stricter["epsilon"] > of_folder["clients"][0]["epsilon"]


def test_people_see_tables(toml: Path, finished: Path, capsys: Capture) -> None:
    assert call("privacy", "plan", str(toml), *sets(*RECORD)) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for text in ("client-2", "unamplified", "noise/signal", "what it costs in accuracy is not known before"):
        assert text in printed
    assert call("privacy", "ledger", str(finished)) == 0
    printed = capsys.readouterr().out
    assert "released of client-0's data" in printed and "1-3" in printed and "spent" in printed


def test_what_cannot_be_planned_or_read_is_said(toml: Path, tmp_path: Path, capsys: Capture) -> None:
    assert "this run promises nothing; set privacy.unit" in complaint(capsys, "privacy", "plan", str(toml))
    too_large = sets(*RECORD, "privacy.delta=0.5")
    assert "privacy.delta" in complaint(capsys, "privacy", "plan", str(toml), *too_large)
    own = sets(*RECORD, "data.partition=own")
    assert "only the sites know how many records" in complaint(capsys, "privacy", "plan", str(toml), *own)
    assert "holds no ledger.jsonl; name the folder" in complaint(capsys, "privacy", "ledger", str(tmp_path))
