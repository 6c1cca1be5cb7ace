"""Settings of the handoff: sizes may be set by operators, times are the protocol's and are only changed by tests."""

from dataclasses import dataclass, replace

from baton_handoff.transports.base import MAX_OPERATION_BYTES


@dataclass(frozen=True, slots=True)
class Times:
    """docs/handoff.md, section 4; seconds."""

    beat_s: float = 0.2  # sent at least this often; the other side expects 250 ms
    suspect_s: float = 1.0
    fenced_s: float = 2.0
    reopen_s: float = 0.2
    first_link_s: float = 2.0
    hello_s: float = 2.0
    introduction_s: float = 1.0  # how long a ticket waits for the introduction of its pair
    retry_min_s: float = 0.02
    retry_max_s: float = 0.25
    tombstone_s: float = 60.0
    batch_ageing_s: float = 10.0  # a batch request counts as younger by so much
    stall_s: float = 2.0  # own loop stood still
    stranded_s: float = 5.0
    link_idle_s: float = 60.0
    tick_s: float = 0.05
    sums_s: float = 0.5  # the books hear the sums at least this often; they expect 1 s


@dataclass(frozen=True, slots=True)
class HandoffConfig:
    """Bounds of one worker's handoffs.

    look_ahead_tokens: tokens begun and not computed at which prefill stops offering (about two chunks).
    max_readers, max_readers_per_sink: handoffs of a source that are announced and not confirmed at a time, in all and per sink. Below
        max_readers, so that a sink that hangs leaves places to others; above max_pulls_per_peer, so that a sink has the next ones at
        hand while its Confirm is on its way.
    peer_share: part of the pool that one decode instance's unconfirmed blocks may take while others are linked too.
    fetch_min_tokens: fewer missing tokens are computed, never fetched; 0: nothing is ever fetched.
    fetch_min_limit_s: a fetch gets the time it would take to compute what it is for, but at least so long.
    fetch_pin_share: part of the pool that may be pinned for other workers' fetches, of which max_readers are served at a time.
    max_fetches, max_fetch_pulls: fetches of ours under way, and their operations that run at once (beside max_pulls).
    is_native: the engine moves KV itself (`for_native_engine`).
    """

    look_ahead_tokens: int = 8192
    max_queued: int = 1024
    max_tickets: int = 1024
    max_pulls: int = 4
    max_pulls_per_peer: int = 2
    max_readers: int = 8
    max_readers_per_sink: int = 4
    operation_bytes: int = MAX_OPERATION_BYTES
    peer_share: float = 0.5
    fetch_min_tokens: int = 128
    fetch_min_limit_s: float = 0.1
    fetch_pin_share: float = 0.5
    max_fetches: int = 16
    max_fetch_pulls: int = 2
    max_unsent_messages: int = 16384
    is_native: bool = False
    times: Times = Times()

    def for_native_engine(self) -> "HandoffConfig":
        """The same for an engine that moves KV itself: it bounds its own transfers, each waits for the prompt to be computed, and nobody
        reads its blocks."""
        no_bound = 1 << 30
        return replace(
            self,
            is_native=True,
            fetch_min_tokens=0,
            max_pulls=no_bound,
            max_pulls_per_peer=no_bound,
            max_readers=no_bound,
            max_readers_per_sink=no_bound,
        )
