import psutil
from baton_contracts.discovery.v1.instance_pb2 import Instance, KvLayout, Model
from baton_contracts.kvtransfer.v1 import kvtransfer_service_pb2 as pb
from baton_handoff.introductions import MAX_SECRETS, Introductions


def record(name: str, incarnation: str, num_layers: int = 2, fingerprint: str = "f", block_tokens: int = 4) -> Instance:
    layout = KvLayout(num_layers=num_layers, block_tokens=block_tokens, num_kv_heads=2, head_dim=1, dtype="float32", num_shards=1)
    layout.block_bytes = num_layers * 2 * block_tokens * 2 * 4
    return Instance(instance_id=name, incarnation=incarnation, layout=layout, model=Model(fingerprint=fingerprint))


def introductions() -> Introductions:
    return Introductions(lambda: record("d", "own"))


def test_every_secret_of_a_pair_stays_valid_and_the_newest_is_tried_first() -> None:
    known = introductions()
    known.add(pb.Introduction(peer=record("p", "x"), pair_secret=b"one"))
    known.add(pb.Introduction(peer=record("p", "x"), pair_secret=b"two"))
    assert known.get("x").secrets == [b"two", b"one"]  # type: ignore[union-attr]
    assert known.knows_secret("x", b"one")
    assert not known.knows_secret("x", b"three")
    assert not known.knows_secret("y", b"one")


def test_number_of_secrets_is_bounded() -> None:
    known = introductions()
    for number in range(20):
        known.add(pb.Introduction(peer=record("p", "x"), pair_secret=bytes([number])))
    assert len(known.get("x").secrets) == MAX_SECRETS  # type: ignore[union-attr]
    assert known.knows_secret("x", bytes([19]))


def test_layouts_are_compared_again_and_both_are_named() -> None:
    known = introductions()
    known.add(pb.Introduction(peer=record("p", "x", num_layers=4), pair_secret=b"s"))
    refusal = known.get("x").refusal  # type: ignore[union-attr]
    assert "layers=2" in refusal
    assert "layers=4" in refusal
    assert not known.knows_secret("x", b"s")


def test_other_block_sizes_are_introduced_and_remembered() -> None:
    known = introductions()
    known.add(pb.Introduction(peer=record("p", "x", block_tokens=16), pair_secret=b"s"))
    assert known.knows_secret("x", b"s")
    layout = known.layout_of("x")
    assert layout is not None
    assert layout.block_tokens == 16


def test_a_layout_that_contradicts_itself_is_refused_and_unknown() -> None:
    known = introductions()
    peer = record("p", "x")
    peer.layout.num_shards, peer.layout.dtype = 1, "int3"
    known.add(pb.Introduction(peer=peer, pair_secret=b"s"))
    assert "dtype" in known.get("x").refusal  # type: ignore[union-attr]
    assert known.layout_of("x") is None
    assert known.layout_of("nobody") is None


def test_refusal_of_kvtransfer_holds_until_it_is_taken_back() -> None:
    known = introductions()
    known.add(pb.Introduction(peer=record("p", "x"), refusal="layouts differ"))
    assert known.get("x").refusal == "layouts differ"  # type: ignore[union-attr]
    known.add(pb.Introduction(peer=record("p", "x"), pair_secret=b"s"))
    assert known.get("x").refusal == ""  # type: ignore[union-attr]


def test_listeners_hear_of_every_introduction() -> None:
    known, heard = introductions(), []
    known.subscribe(heard.append)
    known.add(pb.Introduction(peer=record("p", "x"), pair_secret=b"s"))
    assert heard == ["x"]


def test_what_is_kept_is_the_peers_record_and_not_the_message_it_came_in() -> None:
    """A part of a protobuf message keeps the memory of all of it: a worker grew with every death in the fleet."""
    known, process = introductions(), psutil.Process()
    before = process.memory_info().rss
    for number in range(100):
        message = pb.BooksResponse()
        message.introductions.add(peer=record("p", str(number)), pair_secret=b"s")
        message.introductions.add(peer=record("q" * 1_000_000, "q"))
        known.add(message.introductions[0])
    assert known.get("99") is not None
    assert process.memory_info().rss - before < 40 << 20
