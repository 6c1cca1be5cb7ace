import hashlib
from array import array

import pytest
from baton_runtime.errors import InvalidArgument
from baton_runtime.hashing import block_hashes, cache_root, chain_hashes

ROOT = cache_root("0123456789abcdef")
TOKENS = array("I", range(100))


def test_links_are_truncated_sha256_of_parent_and_u32le_tokens() -> None:
    first = hashlib.sha256(ROOT + b"".join(t.to_bytes(4, "little") for t in range(16))).digest()[:16]
    second = hashlib.sha256(first + b"".join(t.to_bytes(4, "little") for t in range(16, 32))).digest()[:16]
    assert chain_hashes(ROOT, TOKENS[:40], 16) == [first, second]


def test_chain_is_stable_across_releases() -> None:
    """These digits are in other processes' caches and indexes: changing them is an incompatible change."""
    assert cache_root("abc", b"tenant").hex() == "0aa45e04f703935c01f108627eb2738b"
    assert chain_hashes(bytes(16), array("I", [1, 2]), 2)[0].hex() == "c3f5aadf8ecfcdf7e6caaeac2626219a"


def test_bytes_and_array_give_the_same_chain() -> None:
    assert chain_hashes(ROOT, TOKENS.tobytes(), 16) == chain_hashes(ROOT, TOKENS, 16)


def test_partial_block_has_no_link() -> None:
    assert len(chain_hashes(ROOT, TOKENS, 16)) == 6
    assert chain_hashes(ROOT, TOKENS[:15], 16) == []
    assert chain_hashes(ROOT, array("I"), 16) == []


def test_continuing_from_a_parent_gives_the_same_links() -> None:
    whole = chain_hashes(ROOT, TOKENS, 16)
    assert chain_hashes(ROOT, TOKENS, 16, parent=whole[2], start=48) == whole[3:]


def test_models_and_tenants_share_nothing() -> None:
    roots = {cache_root("a"), cache_root("b"), cache_root("a", b"x"), cache_root("a", b"y")}
    assert len(roots) == 4
    assert {len(root) for root in roots} == {16}


def test_block_hashes_are_every_nth_link() -> None:
    links = chain_hashes(ROOT, TOKENS, 16)
    assert block_hashes(ROOT, TOKENS, 16, 16) == links
    assert block_hashes(ROOT, TOKENS, 16, 32) == [links[1], links[3], links[5]]
    assert block_hashes(ROOT, TOKENS, 16, 64) == [links[3]]


@pytest.mark.parametrize(
    "arguments",
    [
        {"token_ids": b"abc"},
        {"token_ids": array("Q", [1])},
        {"root": b"short"},
        {"start": 8},
        {"start": 16},
        {"start": -16, "parent": bytes(16)},
        {"start": 16, "parent": b"short"},
        {"hash_block_tokens": 0},
    ],
)
def test_wrong_input_is_refused(arguments: dict[str, object]) -> None:
    given = {"root": ROOT, "token_ids": TOKENS, "hash_block_tokens": 16, **arguments}
    with pytest.raises(InvalidArgument):
        chain_hashes(**given)  # type: ignore[arg-type]


def test_block_that_is_no_multiple_is_refused() -> None:
    with pytest.raises(InvalidArgument):
        block_hashes(ROOT, TOKENS, 16, 24)
