"""Settings of a service: one frozen dataclass, read once in main().

    @dataclass(frozen=True)
    class DecodeConfig(CommonConfig):
        max_tickets: Annotated[int, msgspec.Meta(ge=1)] = 256   # ranges belong to the type

    config = load(DecodeConfig, "decode", file)

Order: defaults, then the TOML file, then environment variables BATON_<SERVICE>_<FIELD>. The file has either one table per
service ([decode], ...) or the service's fields at its top level. A name nobody knows and a value that does not fit stop the
start with a message that says which setting, which value, where it came from and what is allowed.
"""

import argparse
import dataclasses
import difflib
import os
import tomllib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from baton_runtime.errors import ConfigError

__all__ = ["CommonConfig", "ConfigError", "config_file", "effective", "load"]

SERVICES = ("frontend", "router", "prefill", "decode", "kvtransfer")
MASK = "***"
T = TypeVar("T")


@dataclass(frozen=True)
class CommonConfig:
    """What every service can be told.

    instance_id: stable name, unique within the service; empty: "<service>-<first 6 digits of the incarnation>".
    listen: host:port of the gRPC server; port 0: any free one.
    advertise: host or host:port at which others reach it; empty: the bound address (refused if that is a wildcard).
    metrics_listen: host:port of the Prometheus endpoint.
    etcd: comma-separated host:port endpoints of one etcd cluster.
    etcd_namespace: prefix of every key.
    otlp_endpoint: host:port or URL of an OTLP gRPC receiver for traces; empty: no export.
    trace_sample_ratio: share of requests traced when the client did not decide, in [0, 1].
    log_format: "auto" is console on a terminal and json elsewhere.
    log_level: least severe level that is written.
    zone: failure or network zone of the instance; empty: none.
    drain_grace_s: how long SIGTERM (or a call of Drain that names no time) lets running work go on, in seconds.
    tls_ca: PEM file of the CAs whose certificates are believed, for mutual TLS of all gRPC and of etcd; set all three or none.
    tls_certificate: PEM file of this service's certificate.
    tls_key: PEM file of its key, unencrypted.
    """

    instance_id: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9._-]{0,128}$")] = ""
    listen: str = "127.0.0.1:0"
    advertise: str = ""
    metrics_listen: str = "127.0.0.1:0"
    etcd: Annotated[str, msgspec.Meta(min_length=1)] = "127.0.0.1:2379"
    etcd_namespace: Annotated[str, msgspec.Meta(pattern=r"^/\S*[^/\s]$")] = "/baton/v1"
    otlp_endpoint: str = ""
    trace_sample_ratio: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] = 0.01
    log_format: Literal["auto", "json", "console"] = "auto"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    zone: str = ""
    drain_grace_s: Annotated[float, msgspec.Meta(ge=0.0, le=3600.0)] = 30.0
    tls_ca: str = ""
    tls_certificate: str = ""
    tls_key: str = ""


@dataclass(frozen=True, slots=True)
class _Raw:
    """A value as written, and where: "default", "file <path>" or "environment <NAME>"."""

    value: object
    origin: str
    is_text: bool = False


def load(cls: type[T], service: str, file: Path | None = None, environ: Mapping[str, str] = os.environ) -> T:
    """The settings of a service.

    cls: a dataclass; its field annotations say types and ranges (msgspec.Meta, Literal). In the environment a tuple or list
    field is comma-separated, a bool is true/false/1/0. Its __post_init__ may raise ValueError for what spans fields.

    Raises: ConfigError naming `<service>.<field>`; nothing is half-read.
    """
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    raw = _from_file(service, file, fields) | _from_environ(service, environ, fields)
    values = {name: _converted(service, name, raw[name], hints[name]) for name in raw}
    for name, field in fields.items():
        if name in raw:
            continue
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{service}.{name}", f"is required: set it in the file or as {_variable(service, name)}")
        if field.default is not dataclasses.MISSING:
            _converted(service, name, _Raw(field.default, "default"), hints[name])
    try:
        return cls(**values)
    except ConfigError:
        raise
    except ValueError as e:
        raise ConfigError(service, str(e)) from e


def config_file(service: str, argv: Sequence[str] | None = None, version: str = "") -> Path | None:
    """Parse the command line every service has, `baton-<service> [--config FILE] [--version]`; exits 2 on anything else."""
    parser = argparse.ArgumentParser(prog=f"baton-{service}", description=f"Baton's {service} service.")
    parser.add_argument("--config", type=Path, metavar="FILE", help=f"TOML file; every field is also {_variable(service, '<FIELD>')}")
    if version:
        parser.add_argument("--version", action="version", version=f"baton-{service} {version}")
    found: Path | None = parser.parse_args(argv).config
    return found


def effective(config: object) -> dict[str, object]:
    """Every field and its value, for the log; fields named *secret* or *key* are masked unless empty."""
    return {
        f.name: MASK if _is_secret(f.name) and getattr(config, f.name) else _loggable(getattr(config, f.name))
        for f in dataclasses.fields(config)  # type: ignore[arg-type]
    }


def _from_file(service: str, file: Path | None, fields: Mapping[str, Any]) -> dict[str, _Raw]:
    if file is None:
        return {}
    try:
        document = tomllib.loads(file.read_text())
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(service, f"cannot read {file}: {e}") from e
    except tomllib.TOMLDecodeError as e:
        raise ConfigError(service, f"{file} is not TOML: {e}") from e
    tables = [name for name in document if name in SERVICES and isinstance(document[name], dict) and name not in fields]
    if tables:
        if stray := [name for name in document if name not in tables]:
            raise ConfigError(f"{service}.{stray[0]}", f"stands outside of a service's table in {file}, which has {tables}")
        document = document.get(service, {})
    for name in document:
        if name not in fields:
            raise ConfigError(f"{service}.{name}", f"is not a setting (file {file}){_hint(name, fields)}")
    return {name: _Raw(value, f"file {file}") for name, value in document.items()}


def _from_environ(service: str, environ: Mapping[str, str], fields: Mapping[str, Any]) -> dict[str, _Raw]:
    prefix = _variable(service, "")
    found = {}
    for variable, text in environ.items():
        if not variable.startswith(prefix):
            continue
        name = variable.removeprefix(prefix).lower()
        if name not in fields or variable != _variable(service, name):
            raise ConfigError(f"{service}.{name}", f"is not a setting (environment {variable}){_hint(name, fields)}")
        found[name] = _Raw(text, f"environment {variable}", is_text=True)
    return found


def _converted(service: str, name: str, raw: _Raw, hint: Any) -> Any:
    value = raw.value
    if raw.is_text and isinstance(value, str) and _is_sequence(hint):
        value = [part.strip() for part in value.split(",") if part.strip()]
    try:
        return msgspec.convert(value, hint, strict=not raw.is_text, dec_hook=_dec_hook)
    except (msgspec.ValidationError, ValueError) as e:
        shown = MASK if _is_secret(name) else repr(raw.value)
        message = str(e)
        raise ConfigError(f"{service}.{name}", f"{shown} (from {raw.origin}) is refused: {message[:1].lower()}{message[1:]}") from e


def _dec_hook(wanted: type, value: object) -> object:
    if wanted is Path and isinstance(value, str | Path):
        return Path(value)
    raise ValueError(f"expected {wanted.__name__}, got {type(value).__name__}")


def _is_sequence(hint: Any) -> bool:
    if typing.get_origin(hint) is Annotated:
        hint = typing.get_args(hint)[0]
    return typing.get_origin(hint) in (tuple, list, set, frozenset)


def _is_secret(name: str) -> bool:
    return "secret" in name or "key" in name


def _loggable(value: object) -> object:
    return str(value) if isinstance(value, Path) else value


def _variable(service: str, name: str) -> str:
    return f"BATON_{service.upper()}_{name.upper()}"


def _hint(name: str, fields: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, fields, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(sorted(fields))}"
