from array import array

import pytest
from baton_contracts.discovery.v1 import instance_pb2 as discovery
from baton_contracts.router.v1 import router_service_pb2 as pb
from baton_contracts.worker.v1 import worker_service_pb2 as worker_pb
from baton_router.config import RouterConfig
from baton_router.fleet import Fleet, Placed, StepSpeed, Worker
from baton_router.index import BlockIndex
from baton_router.placement import Placer
from baton_runtime.hashing import chain_hashes

BLOCK = 16
CAPABILITIES = {
    discovery.SERVICE_PREFILL: [discovery.CAPABILITY_PREFILL_FOR],
    discovery.SERVICE_DECODE: [discovery.CAPABILITY_DECODE_FROM, discovery.CAPABILITY_WHOLE],
}


class House:
    """A placer over a fleet made by hand; time stands still at 100 s."""

    now = 100.0

    def __init__(self, **settings: object) -> None:
        self.config = RouterConfig(**settings)
        self.fleet, self.index = Fleet(), BlockIndex(10_000)
        self.placer = Placer(self.config, self.fleet, self.index)
        self._ids = iter(range(1, 1000))

    def add(self, name: str, service: discovery.Service, block_tokens: int = BLOCK, num_shards: int = 1, **load: int) -> Worker:
        layout = discovery.KvLayout(block_tokens=block_tokens, num_layers=2, num_kv_heads=4, head_dim=16, dtype="float32")
        layout.num_shards, layout.block_bytes = num_shards, 1024 * block_tokens
        record = discovery.Instance(
            service=service,
            instance_id=name,
            incarnation=f"inc-{name}",
            grpc_address=f"host:{len(self.fleet.workers)}",
            model=discovery.Model(served_name="m", hash_block_tokens=BLOCK, max_model_tokens=4096),
            layout=layout,
            capabilities=CAPABILITIES[service],
        )
        added = self.fleet.add(record, self.index.add_worker(), 50.0)
        added.heard(worker_pb.Beat(), self.now)
        added.reported(worker_pb.WorkerLoad(**load), self.now)
        return added

    def pair(self) -> tuple[Worker, Worker]:
        return self.add("p0", discovery.SERVICE_PREFILL), self.add("d0", discovery.SERVICE_DECODE)

    def ask(self, num_tokens: int = 100, attempt: int = 1, chain: list[bytes] | None = None, **fields: object) -> pb.Answer:
        query = pb.Query(query_id=7, request_id="r", attempt=attempt, model="m", num_tokens=num_tokens, **fields)
        query.block_hashes = b"".join(chain or [])
        return self.placer.place(query, next(self._ids), self.now)


def hashes(num_tokens: int) -> list[bytes]:
    return chain_hashes(bytes(16), array("I", range(num_tokens)), BLOCK)


def test_a_prompt_is_placed_on_a_pair() -> None:
    house = House()
    house.pair()
    placement = house.ask().placement
    assert (placement.prefill.instance_id, placement.decode.instance_id) == ("p0", "d0")
    assert placement.predicted_prefill_us == 99 * 50


def test_a_pair_whose_layouts_cannot_be_matched_is_not_placed() -> None:
    house = House()
    house.add("p0", discovery.SERVICE_PREFILL, block_tokens=3 * BLOCK)
    house.add("d0", discovery.SERVICE_DECODE, block_tokens=2 * BLOCK)
    assert not house.ask().placement.HasField("prefill")
    house.add("p1", discovery.SERVICE_PREFILL, block_tokens=4 * BLOCK, num_shards=2)
    assert house.ask().placement.prefill.instance_id == "p1"


def offer(worker: Worker, *names: str) -> None:
    worker.record.transports.extend(discovery.TransportOffer(name=name) for name in names)
    worker.__post_init__()


@pytest.mark.parametrize(
    ("prefill", "decode", "is_possible"),
    [
        (["shm", "tcp"], ["tcp"], True),
        (["shm"], ["tcp"], False),
        (["native:sglang-1"], ["native:sglang-1"], True),
        (["native:sglang-1"], ["native:sglang-2"], False),
        (["native:sglang-1"], ["shm", "tcp"], False),
    ],
)
def test_a_pair_needs_a_way_of_handing_over_that_both_have(prefill: list[str], decode: list[str], is_possible: bool) -> None:
    house = House()
    p0, d0 = house.pair()
    offer(p0, *prefill)
    offer(d0, *decode)
    assert house.ask(num_tokens=2000).placement.HasField("prefill") is is_possible


def test_nothing_is_fetched_by_an_engine_that_moves_kv_itself() -> None:
    house = House()
    p0, d0 = house.pair()
    p1 = house.add("p1", discovery.SERVICE_PREFILL, waiting_prefill_tokens=100_000)
    for known in (p0, p1, d0):
        offer(known, "native:sglang-1")
    chain = hashes(640)
    house.index.store(p1.bit, chain)
    placement = house.ask(num_tokens=640, chain=chain).placement
    assert placement.prefill.instance_id == "p0"
    assert not placement.HasField("fetch_from")
    assert placement.predicted_fetch_us == 0


def test_without_prefill_instances_decode_does_it_all() -> None:
    house = House()
    house.add("d0", discovery.SERVICE_DECODE)
    answer = house.ask()
    assert answer.placement.decode.instance_id == "d0"
    assert not answer.placement.HasField("prefill")


def test_one_token_has_nothing_to_hand_over_and_goes_to_decode_alone() -> None:
    house = House()
    house.pair()
    assert not house.ask(num_tokens=1).placement.HasField("prefill")


def test_a_prompt_decode_has_cached_is_not_prefilled_elsewhere() -> None:
    house = House()
    _, decode = house.pair()
    house.index.store(decode.bit, hashes(64))
    answer = house.ask(num_tokens=65, chain=hashes(65))
    assert not answer.placement.HasField("prefill")
    assert answer.placement.decode.cached_tokens == 64


def test_the_decode_instance_with_the_prefix_wins() -> None:
    house = House()
    house.pair()
    better = house.add("d1", discovery.SERVICE_DECODE)
    house.index.store(better.bit, hashes(64))
    assert house.ask(num_tokens=100, chain=hashes(100)).placement.decode.instance_id == "d1"


def test_hits_of_a_worker_with_larger_blocks_are_counted_in_its_blocks() -> None:
    house = House()
    house.pair()
    large = house.add("d1", discovery.SERVICE_DECODE, block_tokens=4 * BLOCK)
    house.index.store(large.bit, hashes(192)[3::4][:2])
    placement = house.ask(num_tokens=200, chain=hashes(200)).placement
    assert (placement.decode.instance_id, placement.decode.cached_tokens) == ("d1", 128)


def test_queries_in_a_row_spread_over_equal_workers() -> None:
    house = House()
    for name in ("p0", "p1"):
        house.add(name, discovery.SERVICE_PREFILL)
    for name in ("d0", "d1"):
        house.add(name, discovery.SERVICE_DECODE)
    placed = [house.ask().placement for _ in range(4)]
    assert sorted(p.prefill.instance_id for p in placed) == ["p0", "p0", "p1", "p1"]
    assert sorted(p.decode.instance_id for p in placed) == ["d0", "d0", "d1", "d1"]


def test_a_long_prefill_queue_sends_the_prompt_to_the_other_instance() -> None:
    house = House()
    house.pair()
    house.fleet.workers["inc-p0"].load.waiting_prefill_tokens = 100_000
    house.add("p1", discovery.SERVICE_PREFILL)
    assert house.ask().placement.prefill.instance_id == "p1"


@pytest.mark.parametrize("how", ["silent", "draining", "stuck", "fenced", "excluded"])
def test_a_worker_in_trouble_gets_no_new_work(how: str) -> None:
    house = House()
    _, decode = house.pair()
    other = house.add("d1", discovery.SERVICE_DECODE)
    other.load.running_sequences = 50
    excluded = []
    if how == "silent":
        decode.heard_at = house.now - 1.1
    elif how == "draining":
        decode.record.draining = True
    elif how == "stuck":
        decode.beat = worker_pb.Beat(step=9, running_step_age_us=2_100_000, predicted_step_us=100_000)
    elif how == "fenced":
        house.fleet.fence(["inc-d0"], house.now)
    else:
        excluded = ["inc-d0"]
    assert house.ask(excluded_incarnations=excluded).placement.decode.instance_id == "d1"


def test_a_fenced_worker_is_used_again_once_its_own_feed_speaks() -> None:
    house = House()
    house.pair()
    house.fleet.fence(["inc-d0"], house.now)
    assert house.ask().refusal.reason == "NO_INSTANCE"
    house.fleet.workers["inc-d0"].heard(worker_pb.Beat(), house.now + 0.1)
    assert house.ask().placement.decode.instance_id == "d0"


def test_a_pair_without_a_path_is_barred_for_ten_seconds_and_only_that_pair() -> None:
    house = House()
    house.pair()
    house.add("p1", discovery.SERVICE_PREFILL).load.waiting_prefill_tokens = 10_000
    house.fleet.bar("inc-p0", "inc-d0", house.now - 9.9)
    assert house.ask().placement.prefill.instance_id == "p1"
    house.fleet.bar("inc-p0", "inc-d0", house.now - 10.1)
    assert house.ask().placement.prefill.instance_id == "p0"


def test_a_resume_takes_whatever_is_soonest() -> None:
    house = House()
    _, decode = house.pair()
    house.fleet.workers["inc-p0"].load.waiting_prefill_tokens = 100_000
    house.index.store(decode.bit, hashes(64))
    assert house.ask(num_tokens=100, chain=hashes(100), attempt=1).placement.HasField("prefill")
    assert not house.ask(num_tokens=100, chain=hashes(100), attempt=2).placement.HasField("prefill")


@pytest.mark.parametrize(
    ("num_tokens", "model", "reason", "retry_after_ms"),
    [(100, "other", "MODEL_UNKNOWN", 0), (5000, "m", "TOO_LONG", 0), (100, "m", "OVERLOADED", 500)],
)
def test_what_cannot_be_placed_is_refused_with_its_reason(num_tokens: int, model: str, reason: str, retry_after_ms: int) -> None:
    house = House(max_waiting_sequences=5)
    for added in house.pair():
        added.load.waiting_sequences = 5
    query = pb.Query(query_id=7, model=model, num_tokens=num_tokens, attempt=1)
    refusal = house.placer.place(query, 1, house.now).refusal
    assert (refusal.reason, refusal.retry_after_ms) == (reason, retry_after_ms)


def test_an_ended_placement_no_longer_counts() -> None:
    house = House()
    prefill, decode = house.pair()
    house.placer.place(pb.Query(query_id=7, model="m", num_tokens=100, attempt=1), 42, house.now)
    assert (prefill.queue_us(), decode.num_sequences) == (99 * 50, 1)
    house.placer.ended(42)
    assert (prefill.queue_us(), decode.num_sequences) == (0, 0)


def decode_steps(worker: Worker, us_per_kv_token: float) -> None:
    """It has reported steps of several sizes, of 5 ms beside what KV costs."""
    for kv_tokens in (1000, 8000, 2000, 32000) * 20:
        worker.decode_speed.add(kv_tokens, round(5_000 + us_per_kv_token * kv_tokens))


def two_decodes() -> tuple[House, Worker, Worker]:
    """One with many chats, one with a few long sequences; a KV token costs 0.1 us of a step."""
    house = House()
    house.add("p0", discovery.SERVICE_PREFILL)
    chats = house.add("d0", discovery.SERVICE_DECODE, running_sequences=20, active_kv_tokens=6_000)
    long = house.add("d1", discovery.SERVICE_DECODE, running_sequences=2, active_kv_tokens=32_000)
    decode_steps(chats, 0.1)
    return house, chats, long


def test_a_long_prompt_is_decoded_where_it_slows_the_fewest_down() -> None:
    house, _, _ = two_decodes()
    assert house.ask(num_tokens=4000).placement.decode.instance_id == "d1"


def test_a_chat_is_decoded_where_steps_are_short_though_more_sequences_run_there() -> None:
    house, _, _ = two_decodes()
    assert house.ask(num_tokens=100).placement.decode.instance_id == "d0"


def fleet_with_chats() -> House:
    """Four decode instances with three chats each."""
    house = House()
    house.add("p0", discovery.SERVICE_PREFILL)
    for index in range(4):
        house.add(f"d{index}", discovery.SERVICE_DECODE, running_sequences=3, active_kv_tokens=300)
    decode_steps(house.fleet.workers["inc-d0"], 0.1)
    house.placer.ended(ask_chat(house))
    return house


def ask_chat(house: House) -> int:
    """Place a chat; the number of its placement."""
    house.placer.place(pb.Query(query_id=1, model="m", num_tokens=100, attempt=1), 999, house.now)
    return 999


@pytest.mark.parametrize("fields", [{"priority": worker_pb.PRIORITY_BATCH}, {"priority": worker_pb.PRIORITY_INTERACTIVE}])
def test_long_jobs_spread_over_all_decodes_but_one_and_leave_that_to_the_chats(fields: dict) -> None:
    house = fleet_with_chats()
    house.config = house.placer._config = RouterConfig(long_tokens=2048)
    jobs = [house.ask(num_tokens=4000, **fields).placement.decode.instance_id for _ in range(9)]
    assert sorted(jobs.count(name) for name in {*jobs}) == [3, 3, 3]
    (left,) = {"d0", "d1", "d2", "d3"} - {*jobs}
    chats = {house.ask(num_tokens=100).placement.decode.instance_id for _ in range(9)}
    assert chats == {left}


def test_chats_stay_away_from_a_decode_whose_jobs_are_still_prefilled() -> None:
    house = fleet_with_chats()
    job = house.ask(num_tokens=4000, priority=worker_pb.PRIORITY_BATCH).placement.decode.instance_id
    for w in house.fleet.workers.values():
        w.reported(worker_pb.WorkerLoad(running_sequences=3, active_kv_tokens=300), house.now + 1)
    assert job not in {house.ask(num_tokens=100).placement.decode.instance_id for _ in range(9)}


def test_long_jobs_have_every_decode_once_the_chats_are_gone() -> None:
    house = fleet_with_chats()
    house.now += 31.0
    for w in house.fleet.workers.values():
        w.heard(worker_pb.Beat(), house.now)
    jobs = {house.ask(num_tokens=4000, priority=worker_pb.PRIORITY_BATCH).placement.decode.instance_id for _ in range(8)}
    assert len(jobs) == 4


def test_one_long_job_takes_no_more_than_one_decode() -> None:
    house = fleet_with_chats()
    house.ask(num_tokens=4000, priority=worker_pb.PRIORITY_BATCH)
    assert len({house.ask(num_tokens=100).placement.decode.instance_id for _ in range(9)}) == 3


def test_chats_with_more_kv_than_the_jobs_keep_more_of_the_decodes() -> None:
    house = fleet_with_chats()
    for name in ("d0", "d1", "d2", "d3"):
        house.fleet.workers[f"inc-{name}"].load.active_kv_tokens = 8000
    jobs = {house.ask(num_tokens=1000, priority=worker_pb.PRIORITY_BATCH).placement.decode.instance_id for _ in range(8)}
    assert len(jobs) == 1


def test_what_a_kv_token_costs_is_learned_from_all_workers_of_a_kind() -> None:
    house = House()
    one, other = house.add("d0", discovery.SERVICE_DECODE), house.add("d1", discovery.SERVICE_DECODE)
    decode_steps(one, 0.1)
    assert other.decode_speed.us_per_token == pytest.approx(0.1, rel=0.02)


def two_prefills(queue_tokens: int) -> House:
    """Prompts of chats come to p1 twice a second; p0 has a queue."""
    house = House()
    house.add("d0", discovery.SERVICE_DECODE)
    house.add("p0", discovery.SERVICE_PREFILL, waiting_prefill_tokens=queue_tokens)
    chats = house.add("p1", discovery.SERVICE_PREFILL)
    for index in range(10):
        chats.placed(1000 + index, Placed(house.now - 0.4 * index - 0.2, 100, 0))
    chats.reported(worker_pb.WorkerLoad(), house.now)
    return house


def test_a_batch_prompt_rather_waits_than_keeps_the_prompts_of_chats_waiting() -> None:
    house = two_prefills(queue_tokens=500)
    house.fleet.workers["inc-p1"].beat.predicted_step_us = 100_000
    assert house.ask(num_tokens=4000, priority=worker_pb.PRIORITY_BATCH).placement.prefill.instance_id == "p0"
    assert house.ask(num_tokens=100, priority=worker_pb.PRIORITY_INTERACTIVE).placement.prefill.instance_id == "p1"


def test_a_batch_prompt_does_not_wait_for_ever() -> None:
    house = two_prefills(queue_tokens=1_000_000)
    assert house.ask(num_tokens=4000, priority=worker_pb.PRIORITY_BATCH).placement.prefill.instance_id == "p1"


def test_a_placement_is_not_counted_beside_the_load_that_shows_it() -> None:
    house = House()
    prefill, _ = house.pair()
    house.ask(num_tokens=100)
    prefill.reported(worker_pb.WorkerLoad(waiting_prefill_tokens=99), house.now + 0.05)
    assert prefill.queue_us() == 2 * 99 * 50  # the Start may still have been on its way when this was sent
    prefill.reported(worker_pb.WorkerLoad(waiting_prefill_tokens=99), house.now + 0.2)
    assert prefill.queue_us() == 99 * 50


def test_batch_sequences_of_ours_weigh_less_until_they_are_over() -> None:
    house = House()
    _, decode = house.pair()
    house.placer.place(pb.Query(query_id=7, model="m", num_tokens=100, attempt=1, priority=worker_pb.PRIORITY_BATCH), 42, house.now)
    decode.reported(worker_pb.WorkerLoad(running_sequences=3), house.now + 1)
    assert decode.weight == pytest.approx(2.5)
    house.placer.ended(42)
    decode.reported(worker_pb.WorkerLoad(running_sequences=2), house.now + 2)
    assert decode.weight == 2


def test_speed_is_fitted_from_steps() -> None:
    speed = StepSpeed(50.0)
    for tokens in (64, 512, 128, 2048, 1024, 256) * 20:
        speed.add(tokens, 5_000 + 15 * tokens)
    assert speed.predict_us(1000) == pytest.approx(20_000, rel=0.02)
    assert speed.predict_us(0) == 0


def test_only_workers_that_may_get_work_count_as_open() -> None:
    house = House()
    prefill, _ = house.pair()
    assert house.fleet.num_open(house.now) == 2
    prefill.heard_at = house.now - 1.1
    assert house.fleet.num_open(house.now) == 1


def test_resume_without_prefill_fetches_the_surviving_prefix_from_another_decode() -> None:
    """The holder is too busy to go on itself: its cache still serves."""
    house = House()
    holder = house.add("d0", discovery.SERVICE_DECODE, waiting_prefill_tokens=100_000)
    house.add("d1", discovery.SERVICE_DECODE)
    house.index.store(holder.bit, hashes(960))
    placement = house.ask(num_tokens=1000, attempt=2, chain=hashes(1000)).placement
    assert placement.decode.instance_id == "d1"
    assert (placement.fetch_from.instance_id, placement.fetch_from.cached_tokens) == ("d0", 960)
    assert placement.predicted_prefill_us == 40 * 50
    assert placement.predicted_fetch_us == 5000 + 960 * 1024 / 2e9 * 1e6 // 1


def test_prefill_is_told_who_has_more_of_the_prefix_than_itself_and_decode() -> None:
    house = House()
    house.pair()
    other = house.add("p1", discovery.SERVICE_PREFILL, waiting_prefill_tokens=100_000)
    house.index.store(other.bit, hashes(960))
    placement = house.ask(num_tokens=1000, chain=hashes(1000)).placement
    assert (placement.prefill.instance_id, placement.fetch_from.instance_id) == ("p0", "p1")
    assert placement.predicted_prefill_us == 39 * 50


def test_what_decode_of_the_pair_has_is_counted_and_needs_no_hint() -> None:
    house = House()
    _, decode = house.pair()
    house.index.store(decode.bit, hashes(960))
    placement = house.ask(num_tokens=2000, chain=hashes(2000)).placement
    assert placement.prefill.instance_id == "p0"
    assert not placement.HasField("fetch_from")
    assert placement.predicted_fetch_us > 0
    assert placement.predicted_prefill_us == (1999 - 960) * 50


@pytest.mark.parametrize(
    ("num_cached", "settings"),
    [(64, {}), (960, {"fetch_min_tokens": 0}), (960, {"default_link_bytes_per_s": 1e6})],
    ids=["too few", "switched off", "slow link"],
)
def test_fetch_that_is_not_worth_it_is_not_proposed(num_cached: int, settings: dict) -> None:
    house = House(**settings)
    holder = house.add("d0", discovery.SERVICE_DECODE, waiting_prefill_tokens=100_000)
    house.add("d1", discovery.SERVICE_DECODE)
    house.index.store(holder.bit, hashes(num_cached))
    placement = house.ask(num_tokens=1000, attempt=2, chain=hashes(1000)).placement
    assert placement.decode.instance_id == "d1"
    assert not placement.HasField("fetch_from")
    assert (placement.predicted_fetch_us, placement.predicted_prefill_us) == (0, 1000 * 50)


def test_excluded_and_fenced_instances_are_not_fetched_from() -> None:
    house = House()
    holder = house.add("d0", discovery.SERVICE_DECODE, waiting_prefill_tokens=100_000)
    house.add("d1", discovery.SERVICE_DECODE)
    house.index.store(holder.bit, hashes(960))
    asked = {"num_tokens": 1000, "attempt": 2, "chain": hashes(1000)}
    assert not house.ask(**asked, excluded_incarnations=["inc-d0"]).placement.HasField("fetch_from")
    house.fleet.fence(["inc-d0"], house.now)
    assert not house.ask(**asked).placement.HasField("fetch_from")


@pytest.mark.parametrize(("factor", "is_possible"), [(2, True), (3, False)])
def test_blocks_of_another_size_are_fetched_if_one_is_a_multiple_of_the_other(factor: int, is_possible: bool) -> None:
    house = House()
    holder = house.add("d0", discovery.SERVICE_DECODE, block_tokens=factor * BLOCK, waiting_prefill_tokens=100_000)
    house.add("d1", discovery.SERVICE_DECODE, block_tokens=BLOCK if is_possible else 2 * BLOCK)
    house.index.store(holder.bit, hashes(960)[factor - 1 :: factor])
    assert house.ask(num_tokens=1000, attempt=2, chain=hashes(1000)).placement.HasField("fetch_from") == is_possible


def test_work_given_to_a_worker_counts_as_its_queue_until_it_ends_or_its_load_must_show_it() -> None:
    house = House()
    prefill, _ = house.pair()
    for placement_id in (1, 2, 3):
        prefill.placed(placement_id, Placed(house.now, 100, 0))
    assert prefill.queue_us() == 300 * 50
    prefill.ended(2)
    prefill.ended(2)
    assert prefill.queue_us() == 200 * 50
    prefill.placed(4, Placed(house.now + 1, 100, 0))
    prefill.reported(worker_pb.WorkerLoad(), house.now + 1)
    assert prefill.queue_us() == 100 * 50


def test_sums_over_placements_are_those_of_the_placements_left() -> None:
    house = House()
    _, decode = house.pair()
    for placement_id in range(6):
        is_batch = placement_id % 2 == 1
        decode.placed(placement_id, Placed(house.now, 0, 100, 0.5 if is_batch else 1.0, is_apart=is_batch))
    for placement_id in (0, 1, 1):
        decode.ended(placement_id)
    assert (decode.num_apart, decode.apart_tokens, decode.kv_tokens, decode.weight) == (2, 200, 400, 3.0)
    decode.reported(worker_pb.WorkerLoad(running_sequences=4, active_kv_tokens=420), house.now + 1)
    assert (decode.num_apart, decode.apart_tokens, decode.kv_tokens, decode.weight) == (2, 200, 420, 3.0)
    for placement_id in range(6):
        decode.ended(placement_id)
    assert (decode.num_apart, decode.apart_tokens, decode.kv_tokens, decode.weight) == (0, 0, 420, 4.0)


def test_chats_keep_their_weight_beside_jobs_that_no_load_shows() -> None:
    """A handoff that waits for its blocks is in no count of the worker's for a while."""
    house = House()
    _, decode = house.pair()
    for placement_id in range(8):
        decode.placed(placement_id, Placed(house.now, 0, 16_000, 0.5, is_apart=True))
    decode.placed(8, Placed(house.now, 0, 100))
    decode.placed(9, Placed(house.now, 0, 100))
    decode.reported(worker_pb.WorkerLoad(running_sequences=2), house.now + 1)
    assert decode.weight == 2 + 8 * 0.5
