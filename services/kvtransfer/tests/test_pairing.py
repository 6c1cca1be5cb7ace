"""Who may form a pair, and what a refusal says."""

import pytest
from baton_kvtransfer.pairing import is_pair, refusal
from baton_kvtransfer.testing import worker_record

P, D = worker_record("prefill-0", "p1"), worker_record("decode-0", "d1")


def changed(record, **changes):
    made = type(record)()
    made.CopyFrom(record)
    for path, value in changes.items():
        *parents, name = path.split("__")
        target = made
        for parent in parents:
            target = getattr(target, parent)
        setattr(target, name, value)
    return made


def test_prefill_and_decode_of_one_model_are_a_pair_both_ways_round():
    assert is_pair(P, D)
    assert is_pair(D, P)
    assert refusal(P, D) == ""


def test_two_of_a_kind_are_a_pair_because_they_may_fetch_from_each_other():
    assert is_pair(P, worker_record("prefill-1", "p2"))
    assert is_pair(D, worker_record("decode-1", "d2"))


def test_two_lives_of_one_instance_are_no_pair():
    twin = changed(D, incarnation="d2")
    twin.capabilities.extend(P.capabilities)
    assert not is_pair(D, twin)


def test_other_models_are_no_pair():
    assert not is_pair(P, changed(D, model__fingerprint="0" * 16, model__served_name="other"))


def test_same_name_over_other_weights_is_refused_naming_both():
    other = changed(D, model__fingerprint="0" * 16)
    assert is_pair(P, other)
    assert f"fingerprint {'f' * 16} against {'0' * 16}" in refusal(P, other)


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("block_tokens", 24, "block_tokens 16 against 24 (set block_tokens of one to a multiple of the other's)"),
        ("dtype", "bfloat16", "dtype float32 against bfloat16"),
        ("num_layers", 3, "num_layers 2 against 3"),
        ("num_kv_heads", 4, "num_kv_heads 2 against 4"),
        ("head_dim", 16, "head_dim 8 against 16"),
        ("num_shards", 4, "num_shards 4 does not divide num_kv_heads 2"),
        ("block_bytes", 1, "block_bytes 4096 against 1"),
    ],
)
def test_other_layout_is_refused_naming_both(field, value, text):
    why = refusal(P, changed(D, **{f"layout__{field}": value}))
    assert text in why
    assert "prefill-0 has layers=2 block_tokens=16 kv_heads=2 head_dim=8 dtype=float32 shards=1, decode-0 has layers=" in why


def test_blocks_that_can_be_cut_anew_are_no_reason_to_refuse():
    assert refusal(P, changed(D, layout__block_tokens=64, layout__block_bytes=4 * 4096)) == ""
    assert refusal(P, changed(D, layout__num_shards=2)) == ""
    assert refusal(P, changed(D, layout__block_tokens=4, layout__block_bytes=1024, layout__num_shards=2)) == ""


def test_a_token_of_another_size_is_refused():
    assert "bytes per token differ" in refusal(P, changed(D, layout__block_tokens=32))


def test_other_hash_granularity_is_refused_with_the_fix():
    why = refusal(P, changed(D, model__hash_block_tokens=64))
    assert "hash_block_tokens 16 against 64 (set it on both to one value that divides both block sizes)" in why


def test_all_differences_are_named_at_once():
    why = refusal(P, changed(D, model__vocab_size=7, layout__dtype="float16", layout__block_bytes=2048))
    assert "vocab_size 100 against 7; dtype float32 against float16" in why


def test_no_common_transport_is_refused_naming_both():
    assert refusal(worker_record("prefill-0", "p1", ("nixl",)), D).endswith("transports nixl against shm, tcp")
    assert refusal(worker_record("prefill-0", "p1", ()), D).endswith("transports none against shm, tcp")
