"""Rules of the contracts that no linter knows."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from baton_contracts.discovery.v1 import instance_pb2
from baton_contracts.instance.v1 import instance_service_pb2
from baton_contracts.kvtransfer.v1 import kvtransfer_service_pb2
from baton_contracts.router.v1 import router_service_pb2
from baton_contracts.worker.v1 import handoff_service_pb2, worker_service_pb2
from google.protobuf.descriptor import FileDescriptor

FILES = [
    m.DESCRIPTOR
    for m in (instance_pb2, instance_service_pb2, kvtransfer_service_pb2, router_service_pb2, handoff_service_pb2, worker_service_pb2)
]
PAIR_MESSAGES_ABOUT_THE_LINK = {"hello", "welcome"}


def enums(file: FileDescriptor) -> Iterator[tuple[str, str]]:
    for enum in file.enum_types_by_name.values():
        yield enum.name, enum.values_by_number[0].name


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_zero_of_every_enum_is_unspecified(file: FileDescriptor) -> None:
    assert [zero for _, zero in enums(file) if not zero.endswith("_UNSPECIFIED")] == []


@pytest.mark.parametrize("message", ["PairRequest", "PairResponse"])
def test_every_message_between_a_pair_names_its_handoff(message: str) -> None:
    """Anything older than the highest attempt seen must be recognisable, whatever it is."""
    oneof = handoff_service_pb2.DESCRIPTOR.message_types_by_name[message].oneofs_by_name["message"]
    unnamed = {field.name for field in oneof.fields if "handoff" not in field.message_type.fields_by_name}
    assert unnamed == PAIR_MESSAGES_ABOUT_THE_LINK & {field.name for field in oneof.fields}


def test_kv_bytes_travel_in_no_message() -> None:
    """Blocks are pulled by the transports; gRPC carries only their ids and hashes."""
    for message in handoff_service_pb2.DESCRIPTOR.message_types_by_name.values():
        columns = {f.name for f in message.fields if f.type == f.TYPE_BYTES}
        assert columns <= {"pair_secret", "source_block_ids", "block_hashes", "tag"}


def test_every_field_has_a_comment() -> None:
    for proto in (Path(__file__).parents[1] / "baton").rglob("*.proto"):
        lines = proto.read_text().splitlines()
        bare = [
            f"{proto.name}:{number + 1}"
            for number, line in enumerate(lines)
            if line.rstrip().endswith(";")
            and " = " in line
            and not line.startswith(("syntax", "import"))
            and "_UNSPECIFIED" not in line
            and not line.strip().startswith("HANDOFF_OUTCOME")
            and not line.strip().startswith("PRIORITY")
            and not line.strip().startswith("SERVICE_")
            and not lines[number - 1].strip().startswith("//")
        ]
        assert bare == []
