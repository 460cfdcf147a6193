"""`fedsb certs` and `fedsb init`: a federation's certificates, and its folder where the processes are started elsewhere."""

from pathlib import Path
from typing import Annotated

import typer
from cryptography.hazmat.primitives import hashes

from fedsb.cli.up import HOME, HomeOption
from fedsb.deploy import certs as made
from fedsb.deploy.home import Home
from fedsb.deploy.site_folder import check_address
from fedsb.errors import DeployError
from fedsb.store.files import read_file, write_file, writing

Hosts = Annotated[
    list[str] | None, typer.Option("--host", help="a name or address by which sites reach the server; may be repeated")
]


def certs(
    home: HomeOption = HOME,
    host: Hosts = None,
    renew: Annotated[bool, typer.Option("--renew", help="make a new key and certificate for the server now")] = False,
) -> None:
    """Make a federation's authority and server certificate where there are none, renew the server's, and show both."""
    files = made.make_authority(Home(home).tls.folder, host or ())
    if renew:
        made.renew_server(files)
        print("renewed; restart what serves with it: `docker compose restart gateway superlink`, or `fedsb down` and `fedsb up`")
    for what, path in (("authority", files.ca), ("server", files.server)):
        certificate = made.load_certificate(path)
        print(f"{what:<10} {path}  expires {certificate.not_valid_after_utc:%Y-%m-%d} ({made.days_left(path)} days)")
    print(f"{'server of':<10} {', '.join(made.hosts_of(files))}")
    fingerprint = made.load_certificate(files.ca).fingerprint(hashes.SHA256()).hex(":").upper()
    print(f"sites need {files.ca}; its SHA-256 fingerprint, for them to compare: {fingerprint}")


def init(
    superlink: Annotated[str, typer.Option(help="address of the SuperLink, host:port, as this command's machine reaches it")],
    home: HomeOption = HOME,
    host: Hosts = None,
    publish: Annotated[Path | None, typer.Option(help="a folder to copy ca.pem to, for sites")] = None,
) -> None:
    """Make a folder for a federation whose processes are started elsewhere, as by docker-compose.yml. Run again, it keeps all."""
    check_address(superlink, "--superlink")
    place = Home(home)
    if (home / "topology.json").exists():
        raise DeployError(f"{home}: is a federation of `fedsb up`; choose another --home")
    with writing(home):
        home.mkdir(parents=True, exist_ok=True)
        place.runs.mkdir(exist_ok=True)
    files = made.make_authority(place.tls.folder, host or ())
    made.check_valid(files.ca)
    made.check_valid(files.server)
    place.write_connection(superlink)
    if publish is not None:
        write_file(publish / "ca.pem", read_file(files.ca))
    print(f"{home} is the folder of a federation at {superlink}, whose server goes by {', '.join(made.hosts_of(files))}")
