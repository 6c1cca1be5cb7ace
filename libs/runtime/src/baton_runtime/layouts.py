"""Whose KV can become whose: which models are the same, which layouts can be turned into each other while blocks are copied.

Asked in four places, which must agree: the router's placement, kvtransfer's introduction, the source's side of a link, and the code
that moves the bytes. Also how a layout is spelled in logs and refusals.
"""

from typing import Protocol

from baton_contracts.discovery.v1.instance_pb2 import Model

# What two models must have in common, and what to do if they have not.
_MODEL_FIELDS = {
    "fingerprint": " (serve the same weights, or another served_name)",
    "hash_block_tokens": " (set it on both to one value that divides both block sizes)",
    "max_model_tokens": "",
    "vocab_size": "",
}
# Both sides must hold the same values; only how they are cut into blocks and shards may differ.
_EQUAL_FIELDS = ("num_layers", "num_kv_heads", "head_dim", "dtype")
# Cut at multiples of each other, so that every piece of the finer side lies in one piece of the coarser one.
_DIVIDING_FIELDS = ("block_tokens", "num_shards")


# Begins the name of an offer of an engine that moves KV itself: nothing can be pulled, and so nothing fetched, over it.
NATIVE = "native:"


class Layout(Protocol):
    """baton.discovery.v1.KvLayout, or the engine's BlockLayout."""

    @property
    def block_tokens(self) -> int:
        """Tokens per block."""

    @property
    def num_layers(self) -> int:
        """Layers."""

    @property
    def num_kv_heads(self) -> int:
        """KV heads of all shards together."""

    @property
    def head_dim(self) -> int:
        """Values per head."""

    @property
    def dtype(self) -> str:
        """Element type."""

    @property
    def num_shards(self) -> int:
        """Shards the heads are split over."""

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""


def model_mismatch(a: Model, b: Model) -> list[str]:
    """What keeps workers of these models from exchanging KV, one text per field with both values; empty if nothing does."""
    return [
        f"{name} {getattr(a, name)} against {getattr(b, name)}{fix}"
        for name, fix in _MODEL_FIELDS.items()
        if getattr(a, name) != getattr(b, name)
    ]


def layout_text(layout: Layout) -> str:
    """The layout as tags, logs and refusals spell it."""
    return (
        f"layers={layout.num_layers} block_tokens={layout.block_tokens} kv_heads={layout.num_kv_heads} "
        f"head_dim={layout.head_dim} dtype={layout.dtype} shards={layout.num_shards}"
    )


def layout_mismatch(a: Layout, b: Layout) -> str:
    """Why blocks of one cannot be turned into blocks of the other, and what would help; "" if they can. Symmetric in meaning."""
    if missing := [name for name in (*_EQUAL_FIELDS, *_DIVIDING_FIELDS) if not (getattr(a, name) and getattr(b, name))]:
        return f"{', '.join(missing)} not given"
    different = [name for name in _EQUAL_FIELDS if getattr(a, name) != getattr(b, name)]
    undivided = [name for name in _DIVIDING_FIELDS if not _divides(getattr(a, name), getattr(b, name))]
    fixes = ["serve the same model in the same element type on both"] if different else []
    fixes += [f"set {name} of one to a multiple of the other's" for name in undivided]
    if fixes:
        return f"{_pairs(different + undivided, a, b)} ({'; '.join(fixes)})"
    if uneven := next((layout for layout in (a, b) if layout.num_kv_heads % layout.num_shards), None):
        return f"num_shards {uneven.num_shards} does not divide num_kv_heads {uneven.num_kv_heads}"
    if a.block_bytes * b.block_tokens != b.block_bytes * a.block_tokens:
        return f"{_pairs(['block_bytes'], a, b)}: with these block_tokens the bytes per token differ"
    return ""


def _divides(a: int, b: int) -> bool:
    return a % b == 0 or b % a == 0


def _pairs(names: list[str], a: Layout, b: Layout) -> str:
    return ", ".join(f"{name} {getattr(a, name)} against {getattr(b, name)}" for name in names)
