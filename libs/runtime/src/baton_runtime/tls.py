"""Mutual TLS of every gRPC listener and channel of a process, or none: the only place that makes them. docs/security.md says why so.

    tls.use(tls.files_of("router", config.tls_ca, config.tls_certificate, config.tls_key))   # once, before anything listens or connects
    port = tls.add_port(server, "127.0.0.1:0")
    channel = tls.channel(address, options, "router")

The files are looked at anew whenever a connection is accepted or a channel is made, so that new ones are taken without a restart.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from prometheus_client import CollectorRegistry, Gauge

from baton_runtime.errors import ConfigError
from baton_runtime.log import get_logger

# Every certificate of a service carries the DNS names "<service>.baton.internal" and this one, which says no more than "some service".
ANY_SERVICE = "baton.internal"
WARN_BEFORE_S = 14 * 86400.0
WARN_EVERY_S = 86400.0

log = get_logger(__name__)


@dataclass(frozen=True)
class TlsFiles:
    """Three PEM files: the CAs that are believed (one or more), our certificate (and its chain), and its key."""

    ca: Path
    certificate: Path
    key: Path


def files_of(service: str, ca: str, certificate: str, key: str) -> TlsFiles | None:
    """The files, or None if all are empty. Raises: ConfigError naming the field that is missing if only some are."""
    given = {"tls_ca": ca, "tls_certificate": certificate, "tls_key": key}
    if not any(given.values()):
        return None
    for name, path in given.items():
        if not path:
            there = ", ".join(other for other, value in given.items() if value)
            raise ConfigError(f"{service}.{name}", f"is required with {there}: TLS is set by all three or none")
    return TlsFiles(Path(ca), Path(certificate), Path(key))


@dataclass(frozen=True)
class Material:
    """What the files held: PEM, found to belong together; expires_at in seconds since the epoch."""

    ca: bytes = field(repr=False)
    certificate: bytes = field(repr=False)
    key: bytes = field(repr=False)
    expires_at: float


def read(files: TlsFiles) -> Material:
    """Raises: ConfigError naming the field (without its service) if a file cannot be read or does not fit the others."""
    # Not at the top: a process without TLS needs neither the time nor the memory of it.
    from cryptography.hazmat.primitives.serialization import load_pem_private_key
    from cryptography.x509 import load_pem_x509_certificates

    found = {}
    for name in ("ca", "certificate", "key"):
        path: Path = getattr(files, name)
        try:
            found[name] = path.read_bytes()
            if name == "key":
                key = load_pem_private_key(found[name], None)
            else:
                chain = load_pem_x509_certificates(found[name])
        except OSError as e:
            raise ConfigError(f"tls_{name}", f"cannot read {path}: {e.strerror}") from e
        except (ValueError, TypeError) as e:  # TypeError: a key that asks for a password
            raise ConfigError(f"tls_{name}", f"{path} is not unencrypted PEM of the kind wanted here") from e
    if chain[0].public_key() != key.public_key():
        raise ConfigError("tls_key", f"{files.key} is not the key of {files.certificate}")
    return Material(found["ca"], found["certificate"], found["key"], chain[0].not_valid_after_utc.timestamp())


class Identity:
    """The files of one process, read again when they change; a set that does not fit is not taken: the last good one stays.

    Safe to use from gRPC's threads. Raises: ConfigError if the first set does not fit.
    """

    def __init__(self, files: TlsFiles, clock: Callable[[], float] = time.time) -> None:
        self._files = files
        self._clock = clock
        self._lock = threading.Lock()
        self._seen: object = self._stamp()
        self._refused: object = None
        self._material = read(files)
        self._warned_at = float("-inf")
        self._warn_if_old()

    def material(self) -> Material:
        """What the files hold now."""
        with self._lock:
            stamp = self._stamp()
            if stamp != self._seen:
                self._take(stamp)
            self._warn_if_old()
            return self._material

    def expires_in_s(self) -> float:
        """Seconds until our certificate expires; negative: since it has."""
        return self.material().expires_at - self._clock()

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """For one channel: what the files hold now, for all of its life."""
        m = self.material()
        return grpc.ssl_channel_credentials(m.ca, m.key, m.certificate)

    def server_credentials(self) -> grpc.ServerCredentials:
        """For one listener: asks for the files at each connection, and refuses clients whose certificate our CAs did not sign."""
        served = self.material()

        def configuration(m: Material) -> grpc.ServerCertificateConfiguration:
            return grpc.ssl_server_certificate_configuration([(m.key, m.certificate)], m.ca)

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            nonlocal served
            m = self.material()
            if m is served:
                return None  # as before
            served = m
            return configuration(m)

        return grpc.dynamic_ssl_server_credentials(
            configuration(served),
            fetch,  # type: ignore[arg-type]  # the stubs do not know that None means "as before"
            require_client_authentication=True,
        )

    def _take(self, stamp: object) -> None:
        try:
            self._material = read(self._files)
        except ConfigError as e:
            if stamp != self._refused:  # said once; asked again at the next connection, for the set may be half-written
                self._refused = stamp
                log.warning("certificate_refused", why=e.message)
            return
        self._seen, self._refused, self._warned_at = stamp, None, float("-inf")
        log.info(
            "certificate_taken", certificate=str(self._files.certificate), expires_in_s=round(self._material.expires_at - self._clock())
        )

    def _warn_if_old(self) -> None:
        now = self._clock()
        left_s = self._material.expires_at - now
        if left_s < WARN_BEFORE_S and now - self._warned_at >= WARN_EVERY_S:
            self._warned_at = now
            log.warning("certificate_expires_soon", certificate=str(self._files.certificate), expires_in_s=round(left_s))

    def _stamp(self) -> object:
        found: list[tuple[int, int, int] | None] = []
        for path in (self._files.ca, self._files.certificate, self._files.key):
            try:
                status = path.stat()
            except OSError:
                found.append(None)
            else:
                found.append((status.st_ino, status.st_size, status.st_mtime_ns))
        return tuple(found)


# A process has one identity. Handed down instead, it would pass through thirty constructors, and the one that forgot it would be a
# listener without TLS.
_identity: Identity | None = None


def use(files: TlsFiles | None) -> None:
    """From now on every listener and channel of this process uses these files; None: plain. Raises: ConfigError (see `read`)."""
    global _identity
    _identity = None if files is None else Identity(files)


def identity() -> Identity | None:
    """What this process shows its peers; None: TLS is off."""
    return _identity


def add_expiry_metric(registry: CollectorRegistry) -> None:
    """`baton_certificate_expiry_seconds`, if TLS is on."""
    if _identity is not None:
        gauge = Gauge("baton_certificate_expiry_seconds", "Seconds until this process's TLS certificate expires.", registry=registry)
        gauge.set_function(_identity.expires_in_s)


def channel(address: str, options: list[tuple[str, object]], name: str = "") -> grpc.aio.Channel:
    """A channel to host:port. name: the DNS name that the peer's certificate must carry; empty: the host that is dialed."""
    if _identity is None:
        return grpc.aio.insecure_channel(address, options=options)
    if name:
        options = [*options, ("grpc.ssl_target_name_override", name)]
    return grpc.aio.secure_channel(address, _identity.channel_credentials(), options=options)


def add_port(server: grpc.aio.Server, listen: str) -> int:
    """Bind. Returns the port. Raises: RuntimeError if that cannot be."""
    if _identity is None:
        return int(server.add_insecure_port(listen))
    return int(server.add_secure_port(listen, _identity.server_credentials()))
