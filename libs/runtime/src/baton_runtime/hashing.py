"""The block hash chain: same digits, same tokens before and in the block, same model and tenant.

link(0) = H(root + tokens of block 0), link(k) = H(link(k-1) + tokens of block k), H = first 16 bytes of SHA-256, tokens as
unsigned 32-bit little-endian. A chain has one link per `hash_block_tokens` full tokens; an engine whose blocks are n times
as long uses every n-th link. Sequences share KV only under one root, which depends on the model and on the tenant's secret.
"""

import hashlib
import hmac
import sys
from array import array

from baton_runtime.errors import InvalidArgument

HASH_BYTES = 16
_TOKEN_BYTES = 4


def cache_root(model_fingerprint: str, tenant_secret: bytes = b"") -> bytes:
    """Root of every chain of one model and one tenant, 16 bytes. Tenants with different secrets never share a block."""
    return hmac.new(tenant_secret, b"baton.cache_root.v1\0" + model_fingerprint.encode(), hashlib.sha256).digest()[:HASH_BYTES]


def chain_hashes(
    root: bytes, token_ids: "array[int] | bytes", hash_block_tokens: int, *, parent: bytes | None = None, start: int = 0
) -> list[bytes]:
    """Links of the full blocks of token_ids[start:], 16 bytes each, in order; a partial last block has none.

    token_ids: array('I'), or bytes holding a u32 little-endian column. start: index of the first token to hash, a multiple of
    hash_block_tokens; above 0 it needs parent, the link of the block before it (a chain is continued without hashing its head).

    Raises: InvalidArgument for a column that is not u32, a wrong start, or a missing or wrong-sized parent or root.
    """
    column = _u32_column(token_ids)
    previous = _first_parent(root, hash_block_tokens, parent, start)
    width = hash_block_tokens * _TOKEN_BYTES
    links = []
    for begin in range(start * _TOKEN_BYTES, len(column) - width + 1, width):
        digest = hashlib.sha256(previous)
        digest.update(column[begin : begin + width])
        previous = digest.digest()[:HASH_BYTES]
        links.append(previous)
    return links


def block_hashes(root: bytes, token_ids: "array[int] | bytes", hash_block_tokens: int, block_tokens: int) -> list[bytes]:
    """Hashes of an engine's full blocks: every (block_tokens / hash_block_tokens)-th link of the chain.

    Raises: InvalidArgument if block_tokens is not a multiple of hash_block_tokens, and as `chain_hashes`.
    """
    if block_tokens < 1 or block_tokens % max(1, hash_block_tokens):
        raise InvalidArgument("block_tokens", f"{block_tokens} is not a multiple of hash_block_tokens={hash_block_tokens}")
    every = block_tokens // max(1, hash_block_tokens)
    return chain_hashes(root, token_ids, hash_block_tokens)[every - 1 :: every]


def _u32_column(token_ids: "array[int] | bytes") -> memoryview:
    if isinstance(token_ids, array):
        if token_ids.itemsize != _TOKEN_BYTES or token_ids.typecode not in "IiLl":
            raise InvalidArgument("token_ids", f"array type {token_ids.typecode!r} is not a 32-bit integer")
        if sys.byteorder == "big":
            token_ids = array(token_ids.typecode, token_ids)
            token_ids.byteswap()
    elif len(token_ids) % _TOKEN_BYTES:
        raise InvalidArgument("token_ids", f"{len(token_ids)} bytes are not a whole number of u32 values")
    return memoryview(token_ids).cast("B")


def _first_parent(root: bytes, hash_block_tokens: int, parent: bytes | None, start: int) -> bytes:
    if hash_block_tokens < 1:
        raise InvalidArgument("hash_block_tokens", f"{hash_block_tokens} is below 1")
    if start < 0 or start % hash_block_tokens:
        raise InvalidArgument("start", f"{start} is not a multiple of hash_block_tokens={hash_block_tokens}")
    if start > 0 and parent is None:
        raise InvalidArgument("parent", f"start={start} needs the link of the block before it")
    first = root if parent is None else parent
    if len(first) != HASH_BYTES:
        raise InvalidArgument("root" if parent is None else "parent", f"{len(first)} bytes instead of {HASH_BYTES}")
    return first
