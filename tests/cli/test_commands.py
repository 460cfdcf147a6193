"""What the commands do when all is well."""

import copy
import json
import re
import shutil
from pathlib import Path

import psutil
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import fedsb.adapters.tuner  # noqa: F401  teaches PEFT our format
from clients.policy import template
from clients.session import Session
from fedsb.adapters.state import set_state
from fedsb.cli import doctor
from fedsb.deploy import certs
from fedsb.deploy.site_folder import make_site
from fedsb.store.basis_files import load_basis
from fedsb.store.files import read_events, read_json
from fedsb.store.tensors import load_tensors
from tests.cli.front_door import call
from tests.federation.tiny import (
    assert_same_run,
    classification,
    config_of,
    equal,
    final_state,
    personal_states,
    save_model,
    save_task,
)
from tests.reference import bone_update

Capture = pytest.CaptureFixture[str]
ROOT = Path(__file__).parents[2]
IDS = torch.tensor([[5, 9, 12, 7, 3]])


def test_simulate_leaves_a_run_folder_and_prints_its_table(toml: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "run"
    assert call("simulate", str(toml), "--out", str(out), "--set", "federation.rounds=1", "--set", "runtime.progress=lines") == 0
    printed = capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {
        "adapters", "basis", "checkpoints", "config.toml", "events.jsonl", "sites", "summary.json",
    }  # fmt: skip
    for text in ("client-0", "client-2", "mean", "base", "global", "personal", "round 1/1", "moved: basis 0 B, up "):
        assert text in printed
    assert str(out / "adapters") in printed
    summary = read_json(out / "summary.json")
    assert summary["rounds"] == 1 and f"{summary['evaluation']['base']['client-0']['loss']:.3f}" in printed


def test_simulate_of_the_same_run_gives_the_same(toml: Path, run: Path, tmp_path: Path) -> None:
    assert call("simulate", str(toml), "--out", str(tmp_path / "run")) == 0
    assert_same_run(run, tmp_path / "run")


def test_a_run_is_named_by_its_configuration(toml: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert call("simulate", str(toml), "--set", "name=mine") == 0
    assert equal(final_state(tmp_path / "runs" / "mine"), final_state(run))


def test_the_written_configuration_makes_the_same_run(run: Path, tmp_path: Path) -> None:
    assert call("simulate", str(run / "config.toml"), "--out", str(tmp_path / "run")) == 0
    assert_same_run(run, tmp_path / "run")


def test_simulate_resumes(toml: Path, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(run, out)
    for gone in (
        "adapters/client-1",
        "checkpoints/round-0002",
        "checkpoints/round-0003",
        "adapters/client-0",
        "adapters/client-2",
    ):
        shutil.rmtree(out / gone)
    (out / "summary.json").unlink()
    assert call("simulate", str(toml), "--out", str(out), "--resume") == 0
    assert_same_run(run, out)


def test_ctrl_c_says_how_to_go_on(toml: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "run"
    monkeypatch.setattr("clients.session.Session.train", stop)
    changed = ("--set", "federation.rounds=1", "--set", "personal.steps=0")
    assert call("simulate", str(toml), "--out", str(out), *changed) == 130
    again = f"simulate {toml} --out {out} {' '.join(changed)} --resume"
    assert capsys.readouterr().err == f"fedsb: stopped; go on with `fedsb {again}`\n"
    monkeypatch.undo()
    assert call(*again.split()) == 0


def test_programs_get_json_lines_and_who_wants_quiet_only_the_result(toml: Path, tmp_path: Path, capsys: Capture) -> None:
    command = ("simulate", str(toml), "--set", "federation.rounds=1")
    assert call(*command, "--out", str(tmp_path / "a"), "--json") == 0
    *told, last = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert told == read_events(tmp_path / "a" / "events.jsonl") and told[-1]["event"] == "end"
    assert last == {"event": "summary", "folder": str(tmp_path / "a"), **read_json(tmp_path / "a" / "summary.json")}
    assert call(*command, "--out", str(tmp_path / "b"), "--json", "--quiet") == 0
    (only,) = capsys.readouterr().out.splitlines()
    assert json.loads(only)["event"] == "summary"
    assert call(*command, "--out", str(tmp_path / "c"), "--quiet") == 0
    printed = capsys.readouterr().out
    assert "exact match and loss" in printed and "round 1/1" not in printed


def test_evaluate_says_what_the_summary_says(run: Path, capsys: Capture) -> None:
    evaluation = read_json(run / "summary.json")["evaluation"]
    assert call("evaluate", str(run), "--json", "--sequential") == 0
    assert json.loads(capsys.readouterr().out) == evaluation
    assert call("evaluate", str(run)) == 0
    table = capsys.readouterr().out
    assert re.search(r"27 rows, [0-9.e+]+ a second, 9 adapters in mixed batches", table)
    for client in ("client-0", "client-1", "client-2"):
        assert client in table
        for kind in ("base", "global", "personal"):
            assert f"{evaluation[kind][client]['loss']:.3f}" in table


def test_evaluate_shows_a_client_without_an_adapter(run: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "run"
    shutil.copytree(run, out)
    shutil.rmtree(out / "adapters" / "client-1")
    assert call("evaluate", str(out), "--json") == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["personal"].keys() == {"client-0", "client-2"} and len(scores["global"]) == 3
    assert call("evaluate", str(out)) == 0
    assert re.search(r"client-1.* - ", capsys.readouterr().out)


def _logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(IDS).logits
    return logits


@pytest.mark.parametrize("format_", ["lora", "core"])
def test_export_of_all_computes_what_was_trained(run: Path, llama: str, tmp_path: Path, capsys: Capture, format_: str) -> None:
    out = tmp_path / "exported"
    assert call("export", str(run), "--all", "--format", format_, "--out", str(out)) == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["client-0", "client-1", "client-2"]
    assert sorted(path.name for path in out.iterdir()) == ["client-0", "client-1", "client-2"]
    basis = load_tensors(next((run / "basis").iterdir()))[0]
    plain = AutoModelForCausalLM.from_pretrained(llama)
    base = _logits(plain)
    for client, state in personal_states(run).items():
        files = {"adapter_config.json", "adapter_model.safetensors", "README.md", "manifest.json"}
        assert {path.name for path in (out / client).iterdir()} == files
        byhand = AutoModelForCausalLM.from_pretrained(llama)
        for name, core in state.items():
            layer = name.removesuffix(".core")
            change = basis[f"{layer}.B"].double() @ core.double() @ basis[f"{layer}.A"].double()
            weight = byhand.get_submodule(layer).weight
            weight.data = (weight.data.double() + change).float()
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), str(out / client))
        assert (_logits(byhand) - base).abs().max() > 1e-3
        torch.testing.assert_close(_logits(loaded), _logits(byhand), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("format_", ["lora", "core"])
def test_an_exported_head_is_a_plain_one(tmp_path: Path, format_: str) -> None:
    """Of a classification, whose head is trained on standardised features: PEFT knows nothing of these."""
    bert, labels = save_model(tmp_path / "bert", "classification"), save_task(tmp_path / "labels", "classification")
    config = config_of(classification(bert, labels, train={"head_learning_rate": 0.1}))
    (tmp_path / "run.toml").write_text(config.to_toml())
    run, out = tmp_path / "run", tmp_path / "exported"
    assert call("simulate", str(tmp_path / "run.toml"), "--out", str(run)) == 0
    assert call("export", str(run), "--client", "client-1", "--format", format_, "--out", str(out)) == 0
    session = Session(config)
    session.use(load_basis(run, read_json(out / "client-1" / "manifest.json")["basis_fingerprint"]))
    state = personal_states(run)["client-1"]
    set_state(session.model, state)
    base = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3)
    loaded = PeftModel.from_pretrained(base, str(out / "client-1")).eval()
    torch.testing.assert_close(_logits(loaded), _logits(session.model), atol=1e-5, rtol=1e-5)
    bias = load_tensors(out / "client-1" / "adapter_model.safetensors")[0]["base_model.model.classifier.bias"]
    assert (bias - state["head.classifier.bias"]).abs().max() > 1e-3


def test_export_of_one_client_writes_only_that_one(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "exported"
    for _ in range(2):  # an older export is replaced
        assert call("export", str(run), "--client", "client-1", "--out", str(out)) == 0
    assert [path.name for path in out.iterdir()] == ["client-1"]
    assert read_json(out / "client-1" / "adapter_config.json")["peft_type"] == "LORA"
    assert read_json(out / "client-1" / "manifest.json")["round"] == 3


def test_export_says_what_a_truncated_update_loses(bone: Path, llama: str, tmp_path: Path, capsys: Capture) -> None:
    base = AutoModelForCausalLM.from_pretrained(llama)
    for rank, chosen in ((8, []), (32, ["--rank", "32"])):
        assert call("export", str(bone), "--client", "client-1", "--out", str(tmp_path), *chosen) == 0
        said = read_json(tmp_path / "client-1" / "manifest.json")["truncated"]
        lost = f", truncated to rank {rank}: {said['relative_loss']:.2%} of the update's norm is lost\n"
        assert said["rank"] == rank and capsys.readouterr().out.endswith(lost)
        assert (said["relative_loss"] < 1e-5) == (rank == 32)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), str(tmp_path / "client-1"))
    byhand = copy.deepcopy(base)
    for name, blocks in personal_states(bone)["client-1"].items():
        weight = byhand.get_submodule(name.removesuffix(".bone")).weight
        weight.data = (weight.data.double() + bone_update(weight.data, blocks, "column")).float()
    assert (_logits(byhand) - _logits(base)).abs().max() > 1e-3
    torch.testing.assert_close(_logits(loaded), _logits(byhand), atol=1e-5, rtol=1e-5)


def test_doctor_finds_nothing_to_mend(llama: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "MEMORY_NEEDED", 1)
    monkeypatch.setattr(doctor, "DISK_NEEDED", 1)
    assert call("doctor", "--model", llama) == 0
    printed = capsys.readouterr().out
    assert "MEND" not in printed
    for what in ("python", "torch", "transformers", "peft", "flwr", "device", "model", "memory", "disk"):
        assert re.search(rf"^ok   {what} ", printed, flags=re.MULTILINE), what
    assert str(psutil.virtual_memory().total) not in printed


def test_doctor_says_what_to_mend(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "MEMORY_NEEDED", 1e18)
    monkeypatch.setattr(doctor, "DISK_NEEDED", 1e18)
    monkeypatch.setattr(doctor, "PACKAGES", {"torch": "99.0", "no-such-package": "1.0"})
    assert call("doctor", "--model", "package:no_such_package") == 1
    mend = [line for line in capsys.readouterr().out.splitlines() if line.startswith("MEND")]
    assert [line.split()[1] for line in mend] == ["torch", "no-such-package", "model", "memory", "disk"]
    assert "needs 99.0 or newer; run `make setup`" in mend[0] and "missing → run `make setup`" in mend[1]
    assert all("→" in line for line in mend)


def test_every_command_has_help(capsys: Capture) -> None:
    assert call("--help") == 0
    listed = capsys.readouterr().out
    for command in ("simulate", "evaluate", "export", "doctor"):
        assert command in listed
        assert call(command, "--help") == 0
    assert call() in (0, 2)
    assert "Usage" in capsys.readouterr().out


def test_doctor_names_certificates_that_end_and_what_is_wrong_with_a_site(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = certs.make_authority(tmp_path / "home" / "tls")
    make_site("alpha", tmp_path / "alpha", template(), ca=files.ca)
    options = ("doctor", "--home", str(tmp_path / "home"), "--site", str(tmp_path / "alpha"))
    call(*options)
    printed = capsys.readouterr().out
    assert "ok   server" in printed and f"valid for {certs.SERVER_DAYS - 1} days" in printed
    for what in ("authority", "ca.pem", "key", "policy"):
        assert f"ok   {what}" in printed
    monkeypatch.setattr(certs, "SERVER_DAYS", 20)
    certs.renew_server(files)
    (tmp_path / "alpha" / "policy" / "policy.toml").write_text("max_rnak = 3")
    (tmp_path / "alpha" / "identity" / "ca.pem").unlink()
    assert call(*options) == 1
    printed = capsys.readouterr().out
    assert "MEND server" in printed and "valid for 19 days → `fedsb certs --renew`" in printed
    assert "did you mean max_rank?" in printed and "MEND ca.pem" in printed
