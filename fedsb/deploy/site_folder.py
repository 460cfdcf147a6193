"""The folder of a site that joins from another machine: key, policy, compose file, instructions."""

import os
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

from fedsb.deploy.certs import check_valid, make_node_key
from fedsb.errors import DeployError
from fedsb.sections import SITE_NAME
from fedsb.store.files import read_file, write_file, writing

FOLDERS = ("identity", "policy", "data", "state", "run")
SECRET_FOLDERS = ("identity", "data", "state")
UNPRIVILEGED = 10001  # as the image's own user
IMAGE = f"fedsb:{version('fedsb')}"


def make_site(name: str, folder: Path, policy: str, server: str = "", ca: Path | None = None) -> Path:
    """Write a site's folder; returns its public key's file, which goes to the federation's operator.

    A folder that is this site's already keeps its key and policy; the rest is written anew, so that address and authority
    can be filled in later by the same command.

    Args:
        policy: text of the policy file, where there is none yet.
        server: the server's address as the site reaches it, host:port.
        ca: the certificate of the federation's authority.

    Raises:
        DeployError: no name of a site, or a folder with something else in it.
        KeyFileError: `ca` is no certificate, or has expired.
        DiskError: the folder cannot be written.
    """
    if not SITE_NAME.fullmatch(name):
        raise DeployError(f"{name!r} is no name of a site (a-z, 0-9, dot, dash, underscore); choose another")
    if server:
        check_address(server)
    public = folder / f"{name}.pub"
    if folder.exists() and not folder.is_dir():
        raise DeployError(f"{folder} is a file; choose another --out")
    there = {entry.name for entry in folder.iterdir()} if folder.exists() else set()
    if there - set(FOLDERS) and not public.exists():
        raise DeployError(f"{folder} holds something else than the site {name}; choose another --out")
    authority = _authority(ca) if ca else None
    with writing(folder):
        for each in FOLDERS:
            (folder / each).mkdir(parents=True, exist_ok=True)
        for each in SECRET_FOLDERS:
            (folder / each).chmod(0o700)
    write_file(public, make_node_key(folder / "identity" / "key", name))  # first of all files: it marks the folder as this site's
    if not (folder / "policy" / "policy.toml").exists():
        write_file(folder / "policy" / "policy.toml", policy.encode())
    if authority:
        write_file(folder / "identity" / "ca.pem", authority)
    user, group = (os.getuid(), os.getgid()) if os.getuid() else (UNPRIVILEGED, UNPRIVILEGED)
    settings = {"FEDSB_SITE": name, "FEDSB_SERVER": "", "FEDSB_IMAGE": IMAGE, "FEDSB_DATA": "./data", "FEDSB_POLL_SECONDS": "3"}
    settings |= {"FEDSB_UID": str(user), "FEDSB_GID": str(group)} | _settings(folder / ".env")
    settings |= {"FEDSB_SERVER": server} if server else {}
    write_file(folder / ".env", "".join(f"{key}={value}\n" for key, value in settings.items()).encode())
    write_file(folder / "compose.yml", _template("compose.yml").encode())
    done = " (done)"
    text = _template("README.md").format(
        name=name,
        image=IMAGE,
        ca_there=done if (folder / "identity" / "ca.pem").exists() else "",
        server_there=done if settings["FEDSB_SERVER"] else "",
    )
    write_file(folder / "README.md", text.encode())
    if not os.getuid():  # containers do not run as root, and must read what root writes here
        for path in (folder, *folder.rglob("*")):
            os.chown(path, user, group)
    return public


def _authority(path: Path) -> bytes:
    check_valid(path)
    return read_file(path)


def check_address(text: str, option: str = "--server") -> None:
    """Raise DeployError unless a text is host:port."""
    host, _, port = text.rpartition(":")
    if not host or not (port.isascii() and port.isdigit() and 0 < int(port) < 2**16):
        raise DeployError(f"{option} {text}: is no address; write host:port")


def _settings(path: Path) -> dict[str, str]:
    """What a .env file has been given."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {line.partition("=")[0]: line.partition("=")[2] for line in lines if "=" in line and not line.startswith("#")}


def _template(name: str) -> str:
    return (files("fedsb.deploy") / "site" / name).read_text()
