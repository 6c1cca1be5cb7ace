"""Certificates for mutual TLS between the services and with etcd: a CA, and for each service a folder with its three files.

    DIR/ca/       ca.pem, key.pem       the CA; its key belongs on no machine that runs a service
    DIR/<name>/   ca.pem, certificate.pem, key.pem

A service's certificate carries the DNS names <service>.baton.internal and baton.internal, which its peers check whatever address they
dial, and the hosts. etcd's carries the hosts, which its clients check; the command line's (`cli`) can only be shown by a client.
"""

import datetime
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
from baton_runtime.tls import ANY_SERVICE, TlsFiles
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

SERVICES = ("frontend", "router", "prefill", "decode", "kvtransfer")
NAMES = (*SERVICES, "etcd", "cli")
LOOPBACK = ("localhost", "127.0.0.1", "::1")
CA_DAYS = 3650
# Clocks of hosts differ: a certificate made now must be good on one that is behind.
_BACKDATED = datetime.timedelta(hours=1)


@dataclass(frozen=True)
class Authority:
    """A CA that can sign, and the bundle of all that are to be believed; its own certificate comes first there."""

    bundle: tuple[x509.Certificate, ...]
    key: ec.EllipticCurvePrivateKey

    @property
    def pem(self) -> bytes:
        """The bundle."""
        return b"".join(c.public_bytes(Encoding.PEM) for c in self.bundle)


def files_in(folder: Path, name: str) -> TlsFiles:
    """The three files of a service (or etcd, or cli) as `make` lays them out."""
    return TlsFiles(folder / name / "ca.pem", folder / name / "certificate.pem", folder / name / "key.pem")


def make(folder: Path, ca: Path | None = None, names: Sequence[str] = NAMES, hosts: Sequence[str] = LOOPBACK, days: int = 90) -> None:
    """A CA in folder/ca (or the one in the folder ca) and certificates of names. Raises: ClickException if anything is there already."""
    for there in [folder / "ca"] * (ca is None) + [folder / name for name in names]:
        if there.exists():
            raise click.ClickException(f"{there} exists; nothing was written. New certificates from the same CA: --renew")
    if ca is None:
        authority = _new_authority()
        _write(folder / "ca", "key.pem", _key_pem(authority.key))
        _write(folder / "ca", "ca.pem", authority.pem)
    else:
        authority = load(ca)
    for name in names:
        _issue(folder / name, name, authority, hosts, days)


def renew(folder: Path, ca: Path | None = None, names: Sequence[str] = NAMES, hosts: Sequence[str] = (), days: int = 90) -> None:
    """New certificates and keys for those that are there, each file replaced as a whole. hosts: empty: those they have."""
    authority = load(ca or folder / "ca")
    for name in _there(folder, names):
        _issue(folder / name, name, authority, hosts or _hosts_of(folder, name), days)


def new_ca(folder: Path, names: Sequence[str] = NAMES) -> None:
    """A new CA that is believed beside the old ones; certificates stay until `renew`."""
    old = load(folder / "ca")
    new = _new_authority()
    _replace_bundle(folder, Authority((*new.bundle, *old.bundle), new.key), names)


def drop_old_ca(folder: Path, names: Sequence[str] = NAMES) -> None:
    """Believe the newest CA alone. Raises: ClickException if a certificate is still from an older one."""
    authority = load(folder / "ca")
    newest = authority.bundle[0]
    for name in _there(folder, names):
        certificate = x509.load_pem_x509_certificate(files_in(folder, name).certificate.read_bytes())
        try:
            certificate.verify_directly_issued_by(newest)
        except Exception as error:  # whatever does not fit: the signature, the issuer's name, the kind of key
            raise click.ClickException(f"the certificate of {name} is from an older CA: --renew first") from error
    _replace_bundle(folder, Authority((newest,), authority.key), names)


def load(folder: Path) -> Authority:
    """The CA in a folder. Raises: ClickException."""
    try:
        bundle = x509.load_pem_x509_certificates((folder / "ca.pem").read_bytes())
        key = load_pem_private_key((folder / "key.pem").read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise click.ClickException(f"no CA in {folder} (ca.pem, key.pem without a password): {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or bundle[0].public_key() != key.public_key():
        raise click.ClickException(f"{folder}: key.pem is not the EC key of the first certificate in ca.pem")
    return Authority(tuple(bundle), key)


def _there(folder: Path, names: Sequence[str]) -> list[str]:
    found = [name for name in names if (folder / name).is_dir()]
    if not found:
        raise click.ClickException(f"{folder} has no certificates of {', '.join(names)}")
    return found


def _replace_bundle(folder: Path, authority: Authority, names: Sequence[str]) -> None:
    _write(folder / "ca", "key.pem", _key_pem(authority.key))
    for name in ["ca", *_there(folder, names)]:
        _write(folder / name, "ca.pem", authority.pem)


def _new_authority() -> Authority:
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.UTC)
    # The serial in the name: of two CAs in a bundle it must be clear which has signed.
    serial = x509.random_serial_number()
    name = _name(f"Baton CA {serial:040x}"[:32])
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)  # signs certificates and revocation lists
    certificate = (
        _builder(name, name, key, now, CA_DAYS, serial)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return Authority((certificate,), key)


def _issue(folder: Path, name: str, authority: Authority, hosts: Sequence[str], days: int) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    issuer = authority.bundle[0]
    names: list[x509.GeneralName] = [x509.DNSName(f"{name}.{ANY_SERVICE}")]
    names += [x509.DNSName(ANY_SERVICE)] * (name in SERVICES)
    names += [_host(host) for host in hosts] * (name != "cli")
    # etcd's own gateway dials etcd with the server's certificate: both usages.
    usages = [ExtendedKeyUsageOID.CLIENT_AUTH] + [ExtendedKeyUsageOID.SERVER_AUTH] * (name != "cli")
    certificate = (
        _builder(_name(name), issuer.subject, key, datetime.datetime.now(datetime.UTC), days, x509.random_serial_number())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()), critical=False)
        .sign(authority.key, hashes.SHA256())
    )
    # Whoever looks in between finds a key that is not the certificate's, and stays with what it has.
    _write(folder, "key.pem", _key_pem(key))
    _write(folder, "certificate.pem", certificate.public_bytes(Encoding.PEM))
    _write(folder, "ca.pem", authority.pem)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, now: datetime.datetime, days: int, serial: int
) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key.public_key()).serial_number(serial)
    return builder.not_valid_before(now - _BACKDATED).not_valid_after(now + datetime.timedelta(days=days))


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _hosts_of(folder: Path, name: str) -> list[str]:
    """The hosts in the certificate that is there."""
    certificate = x509.load_pem_x509_certificate(files_in(folder, name).certificate.read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    dns = [n for n in names.get_values_for_type(x509.DNSName) if n != ANY_SERVICE and not n.endswith(f".{ANY_SERVICE}")]
    return dns + [str(address) for address in names.get_values_for_type(x509.IPAddress)]


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _write(folder: Path, name: str, content: bytes) -> None:
    """Replace a file as a whole; readable for its owner alone, from the first byte on."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    new = folder / f"{name}.new"
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
    new.replace(folder / name)
