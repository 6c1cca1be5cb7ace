"""Settings of the router."""

from dataclasses import dataclass
from typing import Annotated

import msgspec
from baton_runtime.config import CommonConfig


@dataclass(frozen=True)
class RouterConfig(CommonConfig):
    """What the router can be told, besides what every service can.

    decode_alone_max_tokens: prompt tokens not cached at decode, up to which decode computes them itself instead of a prefill
        instance; 0: whenever there is anything to compute and a prefill instance to do it, that one does.
    max_index_blocks: block hashes kept over all workers; beyond it new ones are not indexed (hits are missed, nothing breaks).
        An entry takes about 150 bytes.
    max_waiting_sequences: a worker with that many sequences waiting gets no new work; all of them so: OVERLOADED.
    default_prefill_us_per_token: prefill speed assumed for an instance that has not reported a step yet.
    default_link_bytes_per_s: speed assumed for moving KV between two instances.
    long_tokens: requests of so many tokens, and all batch requests, are decoded apart from chats where there are two decode instances
        or more.
    fetch_min_tokens: cached tokens that another instance must have beyond those of the one that prefills for a fetch to be proposed
        (and it must be predicted to be sooner than computing them); 0: never.
    """

    decode_alone_max_tokens: Annotated[int, msgspec.Meta(ge=0)] = 0
    max_index_blocks: Annotated[int, msgspec.Meta(ge=1024)] = 4_000_000
    max_waiting_sequences: Annotated[int, msgspec.Meta(ge=1)] = 512
    default_prefill_us_per_token: Annotated[float, msgspec.Meta(gt=0)] = 50.0
    default_link_bytes_per_s: Annotated[float, msgspec.Meta(gt=0)] = 2e9
    long_tokens: Annotated[int, msgspec.Meta(ge=1)] = 8192
    fetch_min_tokens: Annotated[int, msgspec.Meta(ge=0)] = 128
