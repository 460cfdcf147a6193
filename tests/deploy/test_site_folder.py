"""The folder that a site joins with, and what the two compose files have in common."""

import re
import stat
from pathlib import Path
from typing import Any

import pytest
import yaml

from clients.policy import load_policy, template
from fedsb.deploy import site_folder
from fedsb.deploy.certs import check_public_key, make_authority
from fedsb.deploy.site_folder import make_site
from fedsb.errors import DeployError, KeyFileError
from fedsb.store.files import write_file

ROOT = Path(__file__).parents[2]
HARDENING = ("read_only", "tmpfs", "cap_drop", "security_opt", "restart")


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_site_has_all_that_its_compose_file_mounts(tmp_path: Path) -> None:
    ca = make_authority(tmp_path / "tls").ca
    folder = tmp_path / "alpha"
    public = make_site("alpha", folder, template(), "fed.example.org:8443", ca)
    assert public == folder / "alpha.pub" and public.read_bytes() == (folder / "identity" / "key.pub").read_bytes()
    check_public_key(public)
    assert load_policy(folder / "policy" / "policy.toml").max_rank is None
    assert (folder / "identity" / "ca.pem").read_bytes() == ca.read_bytes()
    assert stat.S_IMODE((folder / "identity" / "key").stat().st_mode) == 0o600
    settings = dict(line.split("=", 1) for line in (folder / ".env").read_text().splitlines())
    assert settings["FEDSB_SERVER"] == "fed.example.org:8443" and settings["FEDSB_SITE"] == "alpha"
    text = (folder / "compose.yml").read_text()
    for key, value in settings.items():
        assert f"${{{key}}}" in text, key
        text = text.replace(f"${{{key}}}", value)
    assert "${" not in text  # every setting that is used has a value
    mounted = [volume.split(":")[0] for service in yaml.safe_load(text)["services"].values() for volume in service["volumes"]]
    assert all((folder / path).is_dir() for path in mounted)
    said = (folder / "README.md").read_text()
    assert "{" not in said and said.count("(done)") == 2 and "fedsb site admit alpha.pub" in said


def test_made_again_it_keeps_key_and_policy_and_takes_what_was_missing(tmp_path: Path) -> None:
    folder = tmp_path / "alpha"
    make_site("alpha", folder, template())
    assert "(done)" not in (folder / "README.md").read_text()
    (folder / "policy" / "policy.toml").write_text("max_rank = 8\n")
    (folder / ".env").write_text((folder / ".env").read_text().replace("./data", "/srv/data"))
    (folder / "data" / "notes").mkdir()
    before = content(folder)
    make_site("alpha", folder, template(), "server:1")
    make_site("alpha", folder, template(), ca=make_authority(tmp_path / "tls").ca)
    after = content(folder)
    assert after["identity/key"] == before["identity/key"] and after["policy/policy.toml"] == b"max_rank = 8\n"
    assert b"FEDSB_DATA=/srv/data\n" in after[".env"]
    assert b"FEDSB_SERVER=server:1\n" in after[".env"] and after["README.md"].count(b"(done)") == 2


def test_one_that_was_interrupted_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after any of its files: the same command makes the rest."""
    whole = make_site("alpha", tmp_path / "whole", template()).parent
    writes = 0

    def interrupted(*arguments: Any, **more: Any) -> None:
        nonlocal writes
        writes += 1
        if writes > allowed:
            raise KeyboardInterrupt
        write_file(*arguments, **more)

    for allowed in range(5):
        folder = tmp_path / str(allowed)
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            writes = 0
            patched.setattr(site_folder, "write_file", interrupted)
            make_site("alpha", folder, template())
        make_site("alpha", folder, template())
        assert content(folder).keys() == content(whole).keys()


@pytest.mark.parametrize(
    ("name", "server", "said"),
    [("../alpha", "", "is no name of a site"), ("alpha", "server", "write host:port"), ("alpha", "server:0", "write host:port")],
)
def test_wrong_input_writes_nothing(tmp_path: Path, name: str, server: str, said: str) -> None:
    with pytest.raises(DeployError, match=said):
        make_site(name, tmp_path / "alpha", template(), server)
    assert not (tmp_path / "alpha").exists()


def test_a_folder_with_something_else_and_a_file_that_is_no_certificate(tmp_path: Path) -> None:
    make_site("alpha", tmp_path / "alpha", template())
    before = content(tmp_path)
    with pytest.raises(DeployError, match="holds something else than the site beta"):
        make_site("beta", tmp_path / "alpha", template())
    with pytest.raises(KeyFileError, match=r"alpha.pub: is no certificate"):
        make_site("gamma", tmp_path / "gamma", template(), ca=tmp_path / "alpha" / "alpha.pub")
    assert content(tmp_path) == before


def composed(path: Path) -> dict[str, Any]:
    services: dict[str, Any] = yaml.safe_load(path.read_text())["services"]
    return services


def test_a_site_elsewhere_runs_what_a_site_of_the_whole_runs() -> None:
    """Same programs, same walls; only names, addresses and places differ."""
    whole, own = composed(ROOT / "docker-compose.yml"), composed(ROOT / "fedsb" / "deploy" / "site" / "compose.yml")
    for role in ("supernode", "executor", "trainer"):
        there, here = whole[f"alpha-{role}"], own[role]
        assert {key: there[key] for key in HARDENING} == {key: here[key] for key in HARDENING}
        assert there.get("network_mode") == here.get("network_mode") == ("none" if role == "trainer" else None)
        places = {"/site/policy/policy.toml": "/policy/policy.toml", "alpha": "${FEDSB_SITE}"}
        command = [places.get(word, word).replace("gateway:8443", "${FEDSB_SERVER}") for word in there["command"]]
        assert command[: len(here["command"])] == here["command"]  # the whole deals out common data: --index, --sites
        assert there["healthcheck"] == here["healthcheck"]


def test_the_walls_of_the_whole() -> None:
    file = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    services, networks = file["services"], file["networks"]
    assert {name for name, network in networks.items() if not network.get("internal")} == {"outside", "monitoring", "serving"}
    on = {name: set(service.get("networks", ())) for name, service in services.items()}
    assert {name for name in on if {"inside", "outside"} <= on[name]} == {"gateway"}
    assert {name for name, service in services.items() if "ports" in service} == {"gateway", "metrics", "serve"}
    assert services["metrics"]["ports"] == ["${FEDSB_METRICS:-127.0.0.1:9464}:9464"]
    assert on["superlink"] == on["server-executor"] == {"inside"}
    assert services["serve"]["ports"] == ["${FEDSB_SERVE:-127.0.0.1:8001}:8000"] and on["serve"] == {"serving"}
    assert all(volume.endswith(":ro") for volume in services["serve"]["volumes"])
    holders = {
        place: {n for n, s in services.items() if any(v.startswith(f"{place}:") for v in s["volumes"])}
        for place in file["volumes"]
    }
    assert holders["authority"] == {"setup", "fedsb"}
    assert holders["serving"] == {"serve", "fedsb"}
    assert holders["keys"] == {"setup", "fedsb", "gateway", "superlink"}
    assert services["gateway"]["cap_add"] == ["NET_BIND_SERVICE"] and sum("cap_add" in s for s in services.values()) == 1
    assert services["setup"]["network_mode"] == "none"
    for site in ("alpha", "beta", "gamma"):
        assert on[f"{site}-executor"] == {site} and on[f"{site}-supernode"] == {site, "outside"}
        assert services[f"{site}-trainer"]["network_mode"] == services[f"{site}-init"]["network_mode"] == "none"
        assert f"{site}-site:/site:ro" in services[f"{site}-trainer"]["volumes"]  # it cannot change its policy
        assert holders[f"{site}-data"] == {f"{site}-trainer"} and holders[f"{site}-identity"] == {
            f"{site}-init",
            f"{site}-supernode",
        }
    for name, service in services.items():
        assert service["read_only"] and service["cap_drop"] == ["ALL"] and not service["user"].startswith("0"), name


def test_every_setting_is_named_in_the_example() -> None:
    text = "".join((ROOT / name).read_text() for name in ("docker-compose.yml", "docker-compose.gpu.yml"))
    used = dict(re.findall(r"\$\{([A-Z_]+):-([^}]*)\}", (ROOT / "docker-compose.yml").read_text()))
    named = dict(re.findall(r"^([A-Z_]+)=(.*)$", (ROOT / ".env.example").read_text(), re.M))
    assert set(named) == set(re.findall(r"\$\{([A-Z_]+)", text))
    assert {key: named[key] for key in used} == used
