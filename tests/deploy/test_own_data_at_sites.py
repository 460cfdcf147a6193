"""Real sites with data of their own: the run gives what a simulation gives, and a site without its folder is named."""

import json
from pathlib import Path

import pytest

from fedsb.store.files import read_events
from tests.deploy.test_loopback import fedsb
from tests.federation.tiny import assert_same_result, config_of, federate, save_model, save_task, table

pytestmark = [pytest.mark.slow, pytest.mark.apart, pytest.mark.timeout(600)]


def test_a_site_without_its_folder_is_named_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sites where `federation.clients` says nine; a relative folder starts where the trainers run."""
    home = tmp_path / "home"
    save_task(home / "data" / "alpha")
    model, data = save_model(tmp_path / "model"), {"partition": "own"}
    shown = {"progress": "lines"}
    sites = table(model, "jsonl:data/{client}", data=data, federation={"clients": 9, "rounds": 2}, runtime=shown)
    toml = tmp_path / "tiny.toml"
    toml.write_text(config_of(sites).to_toml())
    fedsb("up", "--names", "alpha,gamma", "--home", str(home))
    try:
        done = fedsb("run", str(toml), "--home", str(home))
    finally:
        fedsb("down", "--home", str(home))
    out = home / "runs" / "tiny"
    said = "data/gamma: there is no such folder; a jsonl: task is a folder with train.jsonl and test.jsonl"
    refused = {(e["client"], e["reason"]) for e in read_events(out / "events.jsonl") if e["event"] == "refused"}
    assert refused == {("gamma", f"failed: {said}")}
    assert f"round 0: gamma was left out: it failed: {said}" in done.stdout and "tiny: the clients that join, " in done.stdout
    log = (home / "logs" / "site-gamma-trainer.log").read_text()
    assert f"query.prepare was refused: {said} (in the working folder {home.resolve()})" in log
    monkeypatch.chdir(home)
    here = federate(
        config_of({**sites, "federation": {"clients": 1, "names": ["alpha"], "rounds": 2}, "runtime": {"progress": "none"}}),
        tmp_path / "here",
    )
    assert_same_result(tmp_path / "here", out)
    there = json.loads((out / "summary.json").read_text())
    assert there["evaluation"] == here["evaluation"] and there["clients"] == 1
    again = fedsb("evaluate", str(out), check=False)
    assert again.returncode == 2 and "its sites hold their data themselves" in again.stderr
