"""Keys and certificates: what OpenSSL and Flower accept, what is secret, what is told about what is wrong."""

import datetime
import ssl
import stat
import subprocess
from pathlib import Path

import pytest
from cryptography import x509

from fedsb.deploy import certs
from fedsb.errors import KeyFileError


@pytest.fixture
def files(tmp_path: Path) -> certs.Authority:
    return certs.make_authority(tmp_path / "tls", ["fed.example.org", "10.1.2.3"])


def test_openssl_trusts_the_server_by_the_authority_and_its_names(files: certs.Authority) -> None:
    for check in (["-verify_hostname", "fed.example.org"], ["-verify_ip", "10.1.2.3"], ["-verify_ip", "127.0.0.1"]):
        command = ["openssl", "verify", "-CAfile", str(files.ca), "-purpose", "sslserver", *check, str(files.server)]
        assert subprocess.run(command, capture_output=True, text=True, check=False).returncode == 0, check
    command = ["openssl", "verify", "-CAfile", str(files.ca), "-verify_hostname", "else.where", str(files.server)]
    assert subprocess.run(command, capture_output=True, check=False).returncode != 0
    ssl.create_default_context(cafile=str(files.ca))
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(files.server, files.server_key)


def test_secrets_are_readable_by_their_owner_alone(files: certs.Authority, tmp_path: Path) -> None:
    certs.make_node_key(tmp_path / "site" / "key", "alpha")
    for secret in (files.ca_key, files.server_key, tmp_path / "site" / "key"):
        assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert stat.S_IMODE(files.ca.stat().st_mode) == 0o644


def test_making_again_changes_nothing_and_renewing_only_the_server(files: certs.Authority) -> None:
    everything = (files.ca, files.ca_key, files.server, files.server_key)
    before = {path: path.read_bytes() for path in everything}
    certs.make_authority(files.folder, ["fed.example.org"])
    assert {path: path.read_bytes() for path in everything} == before
    certs.renew_server(files)
    assert files.ca.read_bytes() == before[files.ca] and files.ca_key.read_bytes() == before[files.ca_key]
    assert files.server.read_bytes() != before[files.server]
    names = certs.load_certificate(files.server).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert {str(name.value) for name in names} == {"localhost", "127.0.0.1", "fed.example.org", "10.1.2.3"}


def test_a_certificate_is_valid_for_a_slow_clock_and_says_when_it_expires(
    files: certs.Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = certs.load_certificate(files.server)
    now = datetime.datetime.now(datetime.UTC)
    assert certificate.not_valid_before_utc < now - datetime.timedelta(hours=23)
    assert certs.days_left(files.server) == certs.SERVER_DAYS - 1
    certs.check_valid(files.server)
    monkeypatch.setattr(certs, "SERVER_DAYS", -1)
    monkeypatch.setattr(certs, "EARLY", datetime.timedelta(days=3))
    certs.renew_server(files)
    with pytest.raises(KeyFileError, match=r"server.pem: expired on .*; `fedsb certs --renew` makes a new one"):
        certs.check_valid(files.server)


def test_a_node_key_is_what_ssh_keygen_makes(tmp_path: Path) -> None:
    certs.make_node_key(tmp_path / "alpha" / "key", "alpha")
    public = tmp_path / "alpha" / "key.pub"
    certs.check_public_key(public)
    assert public.read_text().startswith("ecdsa-sha2-nistp384 ") and public.read_text().endswith(" alpha\n")
    assert (tmp_path / "alpha" / "key").read_text().startswith("-----BEGIN OPENSSH PRIVATE KEY-----")
    before = public.read_bytes()
    certs.make_node_key(tmp_path / "alpha" / "key", "alpha")
    assert public.read_bytes() == before


def test_files_that_are_no_keys_are_named(files: certs.Authority, tmp_path: Path) -> None:
    certs.make_node_key(tmp_path / "key", "alpha")
    for wrong in (tmp_path / "key", files.ca):
        with pytest.raises(KeyFileError, match="is no site's public key"):
            certs.check_public_key(wrong)
    with pytest.raises(KeyFileError, match=r"key.pub: is no certificate"):
        certs.load_certificate(tmp_path / "key.pub")
    files.ca_key.write_text("x")
    with pytest.raises(KeyFileError, match="is no key as `fedsb certs` makes them"):
        certs.renew_server(files)


def test_a_name_that_is_missing_is_added_and_an_interrupted_renewal_is_finished(files: certs.Authority, tmp_path: Path) -> None:
    certs.make_authority(files.folder, ["gateway"])
    assert set(certs.hosts_of(files)) == {"localhost", "127.0.0.1", "fed.example.org", "10.1.2.3", "gateway"}
    other = certs.make_authority(tmp_path / "other" / "tls")
    files.server_key.write_bytes(other.server_key.read_bytes())  # as if the new key had been written, and not its certificate
    certs.make_authority(files.folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.server, files.server_key)  # refuses a pair that does not match
    assert "gateway" in certs.hosts_of(files)


def test_a_public_key_that_was_lost_is_made_from_the_secret_one(tmp_path: Path) -> None:
    public = certs.make_node_key(tmp_path / "key", "alpha")
    (tmp_path / "key.pub").unlink()
    assert certs.make_node_key(tmp_path / "key", "alpha") == public == (tmp_path / "key.pub").read_bytes()
    (tmp_path / "key").write_text("x")
    with pytest.raises(KeyFileError, match="key: is no site's key"):
        certs.make_node_key(tmp_path / "key", "alpha")


def test_the_authority_s_key_is_not_where_tls_is_served_from(files: certs.Authority) -> None:
    assert {path.name for path in files.folder.iterdir()} == {"ca.pem", "server.pem"}  # nothing secret
    assert files.ca_key.parent != files.server_key.parent
