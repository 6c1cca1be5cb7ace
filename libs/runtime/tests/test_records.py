import pytest
from baton_contracts.discovery.v1.instance_pb2 import Instance, Service, TransportOffer
from baton_runtime.errors import InvalidArgument
from baton_runtime.records import decode_record, encode_record, parse_key, record_key

RECORD = Instance(
    service=Service.SERVICE_DECODE,
    instance_id="decode-0",
    incarnation="0123456789abcdef",
    transports=[TransportOffer(name="shm", parameters=b"\x00\xff")],
)
KEY = (Service.SERVICE_DECODE, "decode-0")


def test_record_lies_under_its_service_and_name() -> None:
    assert record_key("/baton/v1", RECORD) == b"/baton/v1/instances/decode/decode-0"
    assert parse_key("/baton/v1", record_key("/baton/v1", RECORD)) == KEY


def test_record_survives_the_round_trip() -> None:
    assert decode_record(KEY, encode_record(RECORD)) == RECORD


def test_fields_and_enum_values_of_a_newer_version_are_ignored() -> None:
    newer = encode_record(RECORD).replace(b"{", b'{"hat": {"size": 1}, "capabilities": ["CAPABILITY_HAT"], ', 1)
    assert decode_record(KEY, newer).instance_id == "decode-0"


@pytest.mark.parametrize("value", [b"", b"{", b"[]", b"\xff", b"{}", encode_record(RECORD).replace(b"decode-0", b"decode-1")])
def test_record_that_cannot_be_trusted_is_refused(value: bytes) -> None:
    with pytest.raises(InvalidArgument):
        decode_record(KEY, value)


@pytest.mark.parametrize(
    "change", [{"service": 0}, {"service": 99}, {"instance_id": ""}, {"instance_id": "a/b"}, {"incarnation": "x"}, {"incarnation": ""}]
)
def test_record_without_a_place_is_refused(change: dict[str, object]) -> None:
    wrong = Instance()
    wrong.CopyFrom(RECORD)
    for name, value in change.items():
        setattr(wrong, name, value)
    with pytest.raises(InvalidArgument):
        record_key("/baton/v1", wrong)


@pytest.mark.parametrize("key", [b"/baton/v1/instances/hat/x", b"/baton/v1/instances/decode/", b"/baton/v1/instances/decode", b"/other"])
def test_foreign_key_is_refused(key: bytes) -> None:
    with pytest.raises(InvalidArgument):
        parse_key("/baton/v1", key)
