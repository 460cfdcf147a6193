"""Keys and certificates of a federation: an authority of its own, the server's certificate, and a key for each site.

TLS proves the server to the sites; a site proves itself by signing with its key, which the server's operator admits by name.
All keys are on elliptic curves (P-256 for TLS, P-384 for sites, as Flower asks); no key leaves the folder it was made in.
"""

import datetime
import ipaddress
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedsb.errors import KeyFileError
from fedsb.store.files import read_file, write_file

CA_DAYS, SERVER_DAYS = 3650, 397
EARLY = datetime.timedelta(days=1)  # certificates begin to be valid a day ago: a site's clock may be slow
SECRET_MODE = 0o600
LOOPBACK = ("localhost", "127.0.0.1")
REMEDY = "`fedsb certs --renew` makes a new one for the server; an authority that has expired means a new federation"


@dataclass(frozen=True)
class Authority:
    """The files of a federation's TLS: the authority's certificate goes to every site, its key stays with the operator.

    Keys lie in folders of their own beside `folder`: `authority/`, and `keys/` for the server's, so that each is seen only where
    it is needed.
    """

    folder: Path

    @property
    def ca(self) -> Path:
        """The authority's certificate: what a site needs to know the server by."""
        return self.folder / "ca.pem"

    @property
    def ca_key(self) -> Path:
        """The authority's key; needed only to renew the server's certificate."""
        return self.folder.parent / "authority" / "ca-key.pem"

    @property
    def server(self) -> Path:
        """The server's certificate."""
        return self.folder / "server.pem"

    @property
    def server_key(self) -> Path:
        """The server's key."""
        return self.folder.parent / "keys" / "server-key.pem"


def make_authority(folder: Path, hosts: Sequence[str] = ()) -> Authority:
    """Make an authority and a server certificate for `hosts` (names or addresses) and the loopback, where there are none.

    A server certificate that lacks one of `hosts`, or that does not go with its key (a renewal was interrupted), is made anew.
    Raises DiskError, and KeyFileError if what is there cannot be read.
    """
    files = Authority(folder)
    if not files.ca.exists():
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "FedSB federation")])
        certificate = (
            _builder(name, name, key.public_key(), CA_DAYS)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        _write_secret(files.ca_key, _pem(key))
        write_file(files.ca, certificate.public_bytes(serialization.Encoding.PEM))
    if not files.server.exists():
        renew_server(files, hosts)
    elif set(hosts) - set(hosts_of(files)) or not _belong_together(files):
        renew_server(files, [*hosts_of(files), *hosts])
    return files


def renew_server(files: Authority, hosts: Sequence[str] = ()) -> None:
    """Make a new key and certificate for the server, signed by the authority that sites know already.

    `hosts`: names and addresses; empty keeps those of the certificate that is there.
    """
    authority = load_certificate(files.ca)
    signer = _load_key(files.ca_key)
    wanted = list(dict.fromkeys([*LOOPBACK, *(hosts or (hosts_of(files) if files.server.exists() else ()))]))
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, wanted[2] if len(wanted) > 2 else wanted[0])])
    certificate = (
        _builder(subject, authority.subject, key.public_key(), SERVER_DAYS)
        .add_extension(x509.SubjectAlternativeName([_general_name(host) for host in wanted]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .sign(signer, hashes.SHA256())
    )
    _write_secret(files.server_key, _pem(key))
    write_file(files.server, certificate.public_bytes(serialization.Encoding.PEM))


def make_node_key(path: Path, name: str) -> bytes:
    """Make a site's key pair at `path` and `path`.pub, in OpenSSH's format, where there is none; returns the public one.

    `name`: the site's, which becomes the key's comment. Raises DiskError, and KeyFileError if what is there is no such key.
    """
    if path.exists():
        key = _load_node_key(path)
    else:
        key = ec.generate_private_key(ec.SECP384R1())
        secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
        _write_secret(path, secret)
    public = (
        key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH) + f" {name}\n".encode()
    )
    if not path.with_name(path.name + ".pub").exists():
        write_file(path.with_name(path.name + ".pub"), public)
    return public


def check_public_key(path: Path) -> None:
    """Raise KeyFileError unless `path` is a site's public key, as `make_node_key` writes it."""
    data = read_file(path)
    try:
        key = serialization.load_ssh_public_key(data)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise KeyFileError(f"{path}: is no site's public key (ecdsa, OpenSSH format); ask the site for its key.pub")


def hosts_of(files: Authority) -> list[str]:
    """The names and addresses that the server's certificate is for."""
    names = load_certificate(files.server).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(name.value) for name in names]


def check_node_key(path: Path) -> None:
    """Raise KeyFileError unless `path` is a site's secret key, and StoreError if it is missing."""
    _load_node_key(path)


def load_certificate(path: Path) -> x509.Certificate:
    """Read a certificate. Raises KeyFileError."""
    try:
        return x509.load_pem_x509_certificate(read_file(path))
    except ValueError:
        raise KeyFileError(f"{path}: is no certificate in PEM format; restore it from your backup") from None


def days_left(path: Path) -> int:
    """Whole days until a certificate expires; negative if it has."""
    left = load_certificate(path).not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    return left.days


def check_valid(path: Path) -> None:
    """Raise KeyFileError if a certificate has expired."""
    if days_left(path) < 0:
        expiry = load_certificate(path).not_valid_after_utc.date()
        raise KeyFileError(f"{path}: expired on {expiry}; {REMEDY}")


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - EARLY)
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _belong_together(files: Authority) -> bool:
    return files.server_key.exists() and _load_key(files.server_key).public_key() == load_certificate(files.server).public_key()


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def _load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    remedy = "is no key as `fedsb certs` makes them; restore it from your backup"
    return _key_of(path, serialization.load_pem_private_key, remedy)


def _load_node_key(path: Path) -> ec.EllipticCurvePrivateKey:
    remedy = "is no site's key; restore it from your backup, or delete it and be admitted with a new one"
    return _key_of(path, serialization.load_ssh_private_key, remedy)


def _key_of(path: Path, load: Callable[[bytes, None], object], remedy: str) -> ec.EllipticCurvePrivateKey:
    try:
        key = load(read_file(path), None)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise KeyFileError(f"{path}: {remedy}")
    return key


def _write_secret(path: Path, data: bytes) -> None:
    write_file(path, data, SECRET_MODE)
