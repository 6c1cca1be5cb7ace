"""Where a request should run: a pair, or decode alone. Plain decisions in predicted time, no I/O.

predicted time to first token = queue + fetch + uncached tokens x measured prefill speed + exposed transfer + decode's step. Only
the last chunk's bytes are exposed (the rest moves while prefill computes), but every byte has a price, so that a decode
instance that has the prefix wins over one that has not. Where another instance has more of the prefix than the one that prefills,
fetching the difference is taken instead of computing it if that is sooner (libs/handoff, fetch_policy.py, has the same rule).

What a request does to others counts as what happens to itself: its KV makes every step of its neighbours longer, its prefill keeps the
prompts behind it waiting. Batch requests and long ones are decoded apart from chats, on a share of the instances (`_share`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from baton_contracts.discovery.v1 import instance_pb2 as discovery
from baton_contracts.router.v1 import router_service_pb2 as pb
from baton_contracts.worker.v1 import worker_service_pb2 as worker

from baton_router.config import RouterConfig
from baton_router.fleet import BATCH_WEIGHT, Fleet, Placed, Worker
from baton_router.index import BlockIndex

HASH_BYTES = 16
RETRY_AFTER_MS = 500
# Question, answer and confirm of a fetch, beside its bytes; as in fetch_policy.py.
FETCH_OVERHEAD_US = 5000.0
# Output tokens over which the pace of a decode instance counts, beside the time to the first token.
PACE_TOKENS = 128
# Without a chat for so long, long requests may have every instance.
CHATS_GONE_S = 30.0
# Longest step a worker plans (design.md, table of times), in us.
MAX_STEP_US = 250_000.0


@dataclass(frozen=True, slots=True)
class Fetch:
    """Leading tokens that the prefilling instance would fetch up to, from where, and how long it would take."""

    source: Worker
    end_tokens: int
    fetch_us: float


@dataclass(frozen=True, slots=True)
class Option:
    """One way to run a request; times in us."""

    decode: Worker
    prefill: Worker | None
    queue_us: float
    prefill_us: float
    transfer_us: float
    decode_us: float
    decode_cached_tokens: int
    prefill_cached_tokens: int
    fetch: Fetch | None = None
    cost_us: float = 0.0  # beyond the time to the first token: later tokens, and what others lose
    weight: float = 1.0  # of the request's own time

    @property
    def fetch_us(self) -> float:
        """Predicted time of the fetch; 0 if there is none."""
        return self.fetch.fetch_us if self.fetch is not None else 0.0

    @property
    def total_us(self) -> float:
        """Predicted time to the first token."""
        return self.queue_us + self.fetch_us + self.prefill_us + self.transfer_us + self.decode_us

    @property
    def price_us(self) -> float:
        """What the choice is made by: everybody's time, each by its weight."""
        return self.weight * self.total_us + self.cost_us

    @property
    def not_computed_tokens(self) -> int:
        """Leading tokens the prefilling instance does not compute."""
        return self.fetch.end_tokens if self.fetch is not None else self.prefill_cached_tokens


class Placer:
    """Chooses; keeps nothing but what it placed lately (so that two queries in a row do not pile up on one worker)."""

    def __init__(self, config: RouterConfig, fleet: Fleet, index: BlockIndex) -> None:
        self._config = config
        self._fleet = fleet
        self._index = index
        self._chat_at = float("-inf")  # when the last request that is not to be apart was placed

    def place(self, query: pb.Query, placement_id: int, now: float) -> pb.Answer:
        """Answer one query. placement_id names it for `ended`."""
        serving = self._fleet.serving(query.model)
        if not serving:
            return _refused(query, "MODEL_UNKNOWN", f"no worker serves model {query.model!r}")
        if all(query.num_tokens > w.record.model.max_model_tokens for w in serving):
            longest = max(w.record.model.max_model_tokens for w in serving)
            return _refused(query, "TOO_LONG", f"{query.num_tokens} tokens; the model takes {longest}")
        usable = [w for w in serving if w.is_open(now) and w.incarnation not in query.excluded_incarnations]
        roomy = [w for w in usable if w.num_waiting < self._config.max_waiting_sequences]
        options = self._options(query, usable, roomy, now)
        if not options:
            return self._nothing(query, usable, roomy)
        best = self._best(query, options)
        weight, is_apart = _weight(query), self._is_apart(query)
        if not is_apart:
            self._chat_at = now
        best.decode.placed(placement_id, Placed(now, 0 if best.prefill else query.num_tokens, query.num_tokens, weight, is_apart))
        if best.prefill:
            best.prefill.placed(placement_id, Placed(now, query.num_tokens - 1 - best.not_computed_tokens, 0, weight, is_apart))
        return pb.Answer(query_id=query.query_id, placement=_placement(best))

    def ended(self, placement_id: int) -> None:
        """A placed request is over, or has left: take back what was added to its workers' load."""
        for known in self._fleet.workers.values():
            known.ended(placement_id)

    def _options(self, query: pb.Query, usable: Sequence[Worker], workers: Sequence[Worker], now: float) -> list[Option]:
        """workers: of the usable ones those that may get the request; the others may still be fetched from."""
        cached = self._cached_tokens(query, usable)
        holders = sorted(usable, key=lambda w: cached[w.incarnation], reverse=True)
        alone = self._share(query, [w for w in workers if w.can(discovery.CAPABILITY_WHOLE)], now)
        sinks = self._share(query, [w for w in workers if w.can(discovery.CAPABILITY_DECODE_FROM)], now)
        sources = [w for w in workers if w.can(discovery.CAPABILITY_PREFILL_FOR)]
        options = [self._alone(query, w, cached, holders, now) for w in alone]
        if query.num_tokens > 1:  # one token: there is no KV to hand over
            options += [
                self._pair(query, source, sink, cached, holders, now)
                for source in sources
                for sink in sinks
                if self._fleet.can_exchange(source, sink) and not self._fleet.is_barred(source.incarnation, sink.incarnation, now)
            ]
        return options

    def _is_apart(self, query: pb.Query) -> bool:
        """Whether chats should not be decoded beside it."""
        return query.priority == worker.PRIORITY_BATCH or query.num_tokens >= self._config.long_tokens

    def _share(self, query: pb.Query, workers: list[Worker], now: float) -> list[Worker]:
        """Of those that may decode it: all for a chat, which sees by the price where long sequences are; for what is to be apart
        its share of the instances, by the KV both kinds have, but not all of them while there are chats. First those that have most of it,
        then those with the fewest others."""
        if len(workers) < 2 or not self._is_apart(query) or now - self._chat_at > CHATS_GONE_S:
            return workers
        apart_tokens = query.num_tokens + sum(w.apart_tokens for w in workers)
        all_tokens = max(apart_tokens, query.num_tokens + sum(w.kv_tokens for w in workers))
        num_apart = 1 + sum(w.num_apart for w in workers)
        size = max(1, min(round(len(workers) * apart_tokens / all_tokens), num_apart, len(workers) - 1))
        return sorted(workers, key=lambda w: (-w.apart_tokens, w.weight, w.bit))[:size]

    def _cached_tokens(self, query: pb.Query, workers: Sequence[Worker]) -> dict[str, int]:
        """Leading tokens of the query each worker has cached, by incarnation, at most all but the last one."""
        raw = query.block_hashes
        chain = [raw[i : i + HASH_BYTES] for i in range(0, len(raw), HASH_BYTES)]
        by_stride: dict[tuple[int, int], int] = {}  # (links per engine block, tokens per engine block) -> mask
        for w in workers:
            key = (max(1, w.record.layout.block_tokens // max(1, w.record.model.hash_block_tokens)), w.record.layout.block_tokens)
            by_stride[key] = by_stride.get(key, 0) | 1 << w.bit
        tokens_of_bit: dict[int, int] = {}
        for (stride, block_tokens), mask in by_stride.items():
            found = self._index.match(chain[stride - 1 :: stride], mask)
            tokens_of_bit |= {bit: min(links * block_tokens, query.num_tokens - 1) for bit, links in found.items()}
        return {w.incarnation: tokens_of_bit.get(w.bit, 0) for w in workers}

    def _fetch(self, w: Worker, num_tokens: int, cached: dict[str, int], holders: Sequence[Worker]) -> Fetch | None:
        """What w should fetch of num_tokens to prefill: from who has most of it, if that is sooner than computing it."""
        own = cached[w.incarnation]
        if w.moves_kv_itself:
            return None
        for holder in holders:
            end = min(cached[holder.incarnation], num_tokens)
            if not 0 < self._config.fetch_min_tokens <= end - own:
                return None  # nor has any further one
            if holder is w or not self._fleet.can_exchange(holder, w):
                continue
            layout = w.record.layout
            fetch_us = FETCH_OVERHEAD_US + self._move_us((end - own) * layout.block_bytes / max(1, layout.block_tokens))
            saved_us = w.speed.predict_us(num_tokens - own) - w.speed.predict_us(num_tokens - end)
            return Fetch(holder, end, fetch_us) if fetch_us < saved_us else None
        return None

    def _move_us(self, num_bytes: float) -> float:
        return num_bytes / self._config.default_link_bytes_per_s * 1e6

    def _alone(self, query: pb.Query, w: Worker, cached: dict[str, int], holders: Sequence[Worker], now: float) -> Option:
        have = cached[w.incarnation]
        fetch = self._fetch(w, query.num_tokens, cached, holders)
        prefill_us = w.speed.predict_us(query.num_tokens - (fetch.end_tokens if fetch else have))
        # Whoever decodes there stands still, or nearly so, while the prompt is computed.
        cost_us = self._pace_us(query, w) + w.weight * prefill_us + _waiting_us(w, prefill_us, now)
        return Option(w, None, w.queue_us(), prefill_us, 0.0, _decode_us(w), have, have, fetch, cost_us, _weight(query))

    def _pair(self, query: pb.Query, source: Worker, sink: Worker, cached: dict[str, int], holders: Sequence[Worker], now: float) -> Option:
        at_source, at_sink = cached[source.incarnation], cached[sink.incarnation]
        layout = source.record.layout
        transfer_us = self._move_us((query.num_tokens - 1 - at_sink) * layout.block_bytes / max(1, layout.block_tokens))
        best_at = cached[holders[0].incarnation]
        # What the sink has is pinned there from the beginning: better than as much elsewhere.
        fetch = self._fetch(source, query.num_tokens - 1, cached, [sink] if at_sink >= best_at else holders)
        prefill_us = source.speed.predict_us(query.num_tokens - 1 - (fetch.end_tokens if fetch else at_source))
        cost_us = self._pace_us(query, sink) + _waiting_us(source, prefill_us, now)
        return Option(
            sink, source, source.queue_us(), prefill_us, transfer_us, _decode_us(sink), at_sink, at_source, fetch, cost_us, _weight(query)
        )

    def _pace_us(self, query: pb.Query, w: Worker) -> float:
        """What KV costs at w, over PACE_TOKENS steps: w's to the new sequence, the new sequence's to those that are there.

        What is decoded apart counts only its like: of its share of the instances chats stay away from then on.
        """
        token_us, weight = w.decode_speed.us_per_token, _weight(query)
        others = weight * w.num_apart if self._is_apart(query) else w.weight
        return PACE_TOKENS * token_us * (weight * (w.kv_tokens + query.num_tokens) + others * query.num_tokens)

    def _best(self, query: pb.Query, options: list[Option]) -> Option:
        """New requests keep decode free of prefill unless next to nothing is to be computed; a resume takes what is soonest."""
        pairs = [o for o in options if o.prefill]
        alone = [o for o in options if not o.prefill]
        if pairs and query.attempt <= 1:
            limit = self._config.decode_alone_max_tokens
            alone = [o for o in alone if query.num_tokens - 1 - o.decode_cached_tokens <= limit]
        return min(pairs + alone, key=lambda o: (o.price_us, o.decode.num_sequences, o.prefill.num_sequences if o.prefill else 0))

    def _nothing(self, query: pb.Query, usable: Sequence[Worker], roomy: Sequence[Worker]) -> pb.Answer:
        if len(roomy) < len(usable):
            text = f"every worker has {self._config.max_waiting_sequences} sequences waiting"
            return _refused(query, "OVERLOADED", text, RETRY_AFTER_MS)
        return _refused(query, "NO_INSTANCE", f"no worker of model {query.model!r} is ready", RETRY_AFTER_MS)


def _weight(query: pb.Query) -> float:
    return BATCH_WEIGHT if query.priority == worker.PRIORITY_BATCH else 1.0


def _decode_us(w: Worker) -> float:
    """A new sequence's first step."""
    return w.decode_step_us


def _waiting_us(w: Worker, prefill_us: float, now: float) -> float:
    """What prompts lose that come to w while this one is computed: each waits for the running step, half of it on average."""
    step_us = min(prefill_us, w.beat.predicted_step_us or MAX_STEP_US)
    return w.prompts_per_s(now) * prefill_us / 1e6 * step_us / 2


def _target(w: Worker, cached_tokens: int) -> pb.Target:
    return pb.Target(
        instance_id=w.record.instance_id, incarnation=w.incarnation, address=w.record.grpc_address, cached_tokens=cached_tokens
    )


def _placement(option: Option) -> pb.Placement:
    fetch = option.fetch
    is_hint = fetch is not None and (option.prefill is None or fetch.source is not option.decode)
    return pb.Placement(
        decode=_target(option.decode, option.decode_cached_tokens),
        prefill=_target(option.prefill, option.prefill_cached_tokens) if option.prefill else None,
        predicted_queue_us=int(option.queue_us),
        predicted_prefill_us=int(option.prefill_us),
        predicted_transfer_us=int(option.transfer_us),
        predicted_fetch_us=int(option.fetch_us),
        fetch_from=_target(fetch.source, fetch.end_tokens) if fetch is not None and is_hint else None,
    )


def _refused(query: pb.Query, reason: str, message: str, retry_after_ms: int = 0) -> pb.Answer:
    return pb.Answer(query_id=query.query_id, refusal=pb.Refusal(reason=reason, message=message, retry_after_ms=retry_after_ms))
