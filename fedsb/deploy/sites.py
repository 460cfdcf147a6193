"""Who may take part: sites admitted by name, each with its own key."""

import datetime
from pathlib import Path
from typing import Any

from fedsb.deploy.certs import check_public_key
from fedsb.deploy.flower import Flower
from fedsb.deploy.home import Admitted, Home
from fedsb.errors import DeployError
from fedsb.sections import SITE_NAME
from fedsb.store.files import read_file, sha256_of, write_file


def admit(home: Home, key: Path, name: str) -> Admitted:
    """Let the site with this public key take part under a name.

    Raises DeployError for a name that is none or is taken, or a key that is another site's, and KeyFileError.
    """
    if not SITE_NAME.fullmatch(name):
        raise DeployError(f"{name!r} is no name of a site (a-z, 0-9, dot, dash, underscore); choose another")
    check_public_key(key)
    with home.turn():
        return _admit(home, key, name)


def _admit(home: Home, key: Path, name: str) -> Admitted:
    digest, sites = sha256_of(key), home.admitted()
    if name in sites and sites[name].key_sha256 == digest and _known(home, sites[name].node):
        return sites[name]
    if name in sites and sites[name].key_sha256 != digest:
        raise DeployError(f"{name} is a site already, with another key; choose another name")
    owner = next((other for other, site in sites.items() if site.key_sha256 == digest and other != name), None)
    if owner:
        raise DeployError(f"{key}: is the key of {owner} already; one site, one key")
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    admitted = Admitted(node=Flower(home).admit(key, name), key_sha256=digest, since=now)
    home.write_admitted(sites | {name: admitted})
    return admitted


def revoke(home: Home, name: str) -> None:
    """Let a site take part no longer. Raises DeployError if there is no such site."""
    with home.turn():
        sites = home.admitted()
        if name not in sites:
            raise DeployError(f"{name} is no site of this federation; they are {', '.join(sites) or 'none yet'}")
        if _known(home, sites[name].node):
            Flower(home).expel(sites[name].node)
        home.write_admitted({other: site for other, site in sites.items() if other != name})


def _known(home: Home, number: str) -> bool:
    """Whether Flower's server has a node; it has not if its database was lost, or if somebody else expelled it."""
    node = Flower(home).nodes().get(number)
    return node is not None and str(node["status"]) != "unregistered"


def publish(key: Path, folder: Path) -> None:
    """Put a site's public key where its operator finds it. Raises DiskError."""
    write_file(folder / key.name, read_file(key))


def overview(home: Home) -> list[dict[str, Any]]:
    """Every admitted site: name, status (online, offline, registered), when it was last seen, since when it is admitted."""
    nodes = Flower(home).nodes()
    rows = []
    for name, site in sorted(home.admitted().items()):
        node = nodes.get(site.node, {})
        status = str(node.get("status", "unknown"))
        seen = "now" if status == "online" else str(node.get("offline-at", "N/A")).replace("N/A", "never")
        rows.append({"site": name, "status": status, "last_seen": seen, "since": site.since})
    return rows
