"""Instance records as they lie in the store: key and protobuf JSON."""

import re

from baton_contracts.discovery.v1.instance_pb2 import Instance, Service
from google.protobuf import json_format

from baton_runtime.errors import InvalidArgument
from baton_runtime.views import InstanceKey

_PREFIX = "SERVICE_"
_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")
_INCARNATION = re.compile(r"[0-9a-f]{16}")


def service_name(service: int) -> str:
    """SERVICE_DECODE -> "decode". Raises: InvalidArgument for UNSPECIFIED and unknown values."""
    if service not in Service.values() or not service:
        raise InvalidArgument("service", f"{service} is not a service")
    return Service.Name(service).removeprefix(_PREFIX).lower()


def instances_prefix(namespace: str) -> bytes:
    """The prefix all instance records share."""
    return f"{namespace.rstrip('/')}/instances/".encode()


def record_key(namespace: str, instance: Instance) -> bytes:
    """Where a record lies: <namespace>/instances/<service>/<instance_id>. Raises: InvalidArgument if it cannot have a place."""
    if not _NAME.fullmatch(instance.instance_id):
        raise InvalidArgument("instance_id", f"{instance.instance_id!r} is not 1 to 128 of A-Z a-z 0-9 . _ -")
    if not _INCARNATION.fullmatch(instance.incarnation):
        raise InvalidArgument("incarnation", f"{instance.incarnation!r} is not 16 lower-case hex digits")
    return instances_prefix(namespace) + f"{service_name(instance.service)}/{instance.instance_id}".encode()


def parse_key(namespace: str, key: bytes) -> InstanceKey:
    """The name a key stands for. Raises: InvalidArgument if it is none of ours."""
    service, _, instance_id = key.removeprefix(instances_prefix(namespace)).decode(errors="replace").partition("/")
    enum_name = f"{_PREFIX}{service.upper()}"
    if enum_name not in Service.keys() or not _NAME.fullmatch(instance_id):  # noqa: SIM118  # protobuf enums are no dicts
        raise InvalidArgument("key", f"{key!r} is not <namespace>/instances/<service>/<instance_id>")
    return (int(Service.Value(enum_name)), instance_id)


def encode_record(instance: Instance) -> bytes:
    """Protobuf JSON with the proto's own field names, for people with etcdctl; readers accept both spellings."""
    return json_format.MessageToJson(instance, preserving_proto_field_name=True, indent=None).encode()


def decode_record(key: InstanceKey, value: bytes) -> Instance:
    """A record as read; fields this version does not know are ignored.

    Raises: InvalidArgument if it does not parse, or says it is somebody else than its key does.
    """
    try:
        instance = json_format.Parse(value, Instance(), ignore_unknown_fields=True)
    except (json_format.ParseError, UnicodeDecodeError) as e:
        raise InvalidArgument("record", f"does not parse: {e}") from e
    if (instance.service, instance.instance_id) != key or not _INCARNATION.fullmatch(instance.incarnation):
        raise InvalidArgument("record", f"of {key} names {instance.service}/{instance.instance_id!r}/{instance.incarnation!r}")
    return instance
