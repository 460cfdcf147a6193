"""`fedsb doctor`: what is fine on this machine, and what to do about the rest."""

import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import psutil
import torch
import typer
from packaging.version import Version

from clients.policy import load_policy
from fedsb.cli.up import HOME, HomeOption
from fedsb.deploy.certs import Authority, check_node_key, check_public_key, days_left
from fedsb.deploy.home import Home
from fedsb.errors import FedsbError
from fedsb.models import SHORT_NAMES, device_of, dtype_of, locate
from fedsb.report.units import human_bytes

PACKAGES = {
    "torch": "2.6",
    "transformers": "5.0",
    "peft": "0.21",
    "opacus": "1.6",
    "safetensors": "0.8",
    "flwr": "1.41",
    "reasoning_gym": "0.1.25",
    "gguf": "0.10",
}
RENEW_DAYS = 30
MEMORY_NEEDED = 4e9
DISK_NEEDED = 2e9


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `remedy` is empty if it is fine."""

    what: str
    found: str
    remedy: str = ""


def doctor(
    model: Annotated[str, typer.Option(help="the base model to look for")] = next(iter(SHORT_NAMES)),
    home: HomeOption = HOME,
    site: Annotated[Path | None, typer.Option(help="folder of a site, as `fedsb site init` writes it")] = None,
) -> None:
    """Check Python, packages, accelerator, model, memory, disk and certificates; exit code 1 if something needs doing."""
    findings = [*_python(), *_packages(), *_accelerator(), *_model(model), *_room(), *_certificates(Home(home).tls)]
    findings += _site(site) if site else []
    for finding in findings:
        mark = "ok  " if not finding.remedy else "MEND"
        print(f"{mark} {finding.what:<14} {finding.found}" + (f" → {finding.remedy}" if finding.remedy else ""))
    if any(finding.remedy for finding in findings):
        raise typer.Exit(1)


def _python() -> Iterator[Finding]:
    remedy = "" if sys.version_info >= (3, 11) else "install Python 3.11 or newer and run `make setup` again"
    yield Finding("python", platform.python_version(), remedy)


def _packages() -> Iterator[Finding]:
    for name, least in PACKAGES.items():
        try:
            found = version(name)
            remedy = "" if Version(found) >= Version(least) else f"needs {least} or newer; run `make setup`"
        except PackageNotFoundError:
            found, remedy = "missing", "run `make setup`"
        yield Finding(name, found, remedy)


def _accelerator() -> Iterator[Finding]:
    device = device_of("auto")
    note = f"{torch.get_num_threads()} threads" if device.type == "cpu" else "found"
    yield Finding("device", f"{device.type}, {note}, weights in {str(dtype_of('auto', device)).removeprefix('torch.')}")


def _model(name: str) -> Iterator[Finding]:
    try:
        source = locate(name)
        yield Finding("model", f"{name} in {source.folder}, sha256 {source.sha256[:12]}")
    except FedsbError as error:
        yield Finding("model", "not found", str(error))


def _certificates(files: Authority) -> Iterator[Finding]:
    """Of a federation that has its folder on this machine."""
    for what, path, remedy in (
        ("authority", files.ca, "make a new federation before it ends; sites need its new ca.pem"),
        ("server", files.server, "`fedsb certs --renew` makes a new one"),
    ):
        if path.exists():
            yield _expiry(what, path, remedy)


def _site(folder: Path) -> Iterator[Finding]:
    yield _expiry("ca.pem", folder / "identity" / "ca.pem", "ask the federation's operator for a new one")
    for what, path, check in (
        ("key", folder / "identity" / "key", check_node_key),
        ("public key", folder / "identity" / "key.pub", check_public_key),
        ("policy", folder / "policy" / "policy.toml", load_policy),
    ):
        try:
            check(path)
            yield Finding(what, f"{path}")
        except FedsbError as error:
            yield Finding(what, "not usable", str(error))


def _expiry(what: str, path: Path, remedy: str) -> Finding:
    try:
        days = days_left(path)
        said = f"{path} has expired" if days < 0 else f"{path} is valid for {days} days"
        return Finding(what, said, remedy if days < RENEW_DAYS else "")
    except FedsbError as error:
        return Finding(what, "not usable", str(error))


def _room() -> Iterator[Finding]:
    memory = psutil.virtual_memory().available
    yield Finding("memory", f"{human_bytes(memory)} free", "" if memory > MEMORY_NEEDED else f"free {human_bytes(MEMORY_NEEDED)}")
    disk = shutil.disk_usage(Path.cwd()).free
    yield Finding("disk", f"{human_bytes(disk)} free", "" if disk > DISK_NEEDED else f"free {human_bytes(DISK_NEEDED)}")
