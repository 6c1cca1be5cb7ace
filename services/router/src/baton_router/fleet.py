"""What the router knows of each worker: its record, its load, its speeds, whether it may get work."""

from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from baton_contracts.discovery.v1 import instance_pb2 as discovery
from baton_contracts.worker.v1 import worker_service_pb2 as worker
from baton_runtime.layouts import NATIVE, layout_mismatch, model_mismatch

# docs/handoff.md, section 4.
SUSPECT_AFTER_S = 1.0
STUCK_STEP_MIN_S = 2.0
STUCK_STEP_FACTOR = 4.0
PAIR_BARRED_S = 10.0
# A placement is counted by us until a load comes that must contain it: the Start has been sent, and had this long to arrive.
UNSEEN_S = 0.15
# Over which the rate of interactive prompts at a worker is measured.
RATE_S = 5.0
# What a batch sequence's time counts, an interactive one's being 1: batch work waits for interactive work.
BATCH_WEIGHT = 0.5
# Weight of the newest sample of a speed; about the last 50 steps count.
SMOOTHING = 0.02


@dataclass
class StepSpeed:
    """Step length as overhead_us + us_per_token * tokens, fitted online by exponentially weighted least squares.

    Tokens are prompt tokens computed for prefill, KV tokens attended to for decode.
    """

    us_per_token: float
    overhead_us: float = 0.0
    _weight: float = 0.0
    _x: float = 0.0
    _y: float = 0.0
    _xx: float = 0.0
    _xy: float = 0.0

    def add(self, tokens: int, duration_us: int) -> None:
        """One step of so many tokens."""
        share = max(SMOOTHING, 1.0 / (self._weight + 1.0))
        self._weight += 1.0
        for name, value in (("_x", tokens), ("_y", duration_us), ("_xx", tokens * tokens), ("_xy", tokens * duration_us)):
            setattr(self, name, getattr(self, name) * (1 - share) + value * share)
        variance = self._xx - self._x * self._x
        if variance > 1.0 and (slope := (self._xy - self._x * self._y) / variance) > 0:
            self.us_per_token, self.overhead_us = slope, max(0.0, self._y - slope * self._x)
        elif self._x:  # all steps of one size: no slope to be seen
            self.us_per_token, self.overhead_us = self._y / self._x, 0.0

    def predict_us(self, tokens: int) -> float:
        """Time to compute tokens, in us."""
        return self.overhead_us + self.us_per_token * tokens if tokens else 0.0


@dataclass(frozen=True, slots=True)
class Placed:
    """What a placement brings to a worker. prefill_tokens: to compute there; kv_tokens: to attend to there; weight: of its time;
    is_apart: it is batch work, or long, and decoded apart from chats where there is room."""

    at: float
    prefill_tokens: int
    kv_tokens: int
    weight: float = 1.0
    is_apart: bool = False


@dataclass
class Worker:
    """One life of a prefill or decode instance.

    decode_speed: of all workers of its kind together; one alone sees too few sizes of its own batch to tell what a KV token costs.
    """

    record: discovery.Instance
    bit: int
    speed: StepSpeed
    decode_speed: StepSpeed = field(default_factory=lambda: StepSpeed(0.0))
    load: worker.WorkerLoad = field(default_factory=worker.WorkerLoad)
    decode_step_us: float = 0.0
    heard_at: float = float("-inf")  # last message of its feed, our monotonic clock
    beat: worker.Beat = field(default_factory=worker.Beat)
    fenced_at: float = float("-inf")  # a frontend's report; its own feed newer than that lifts it
    _placed: dict[int, Placed] = field(default_factory=dict)  # by placement, until it is over
    _unseen: OrderedDict[int, Placed] = field(default_factory=OrderedDict)  # of them those its load does not show yet
    _prompts: deque[float] = field(default_factory=deque)  # when interactive prompts were placed here to be computed, last RATE_S
    # Sums over them, kept as they come and go: there may be tens of thousands, and every query asks for the sums several times.
    _num_batch: int = 0
    num_apart: int = 0  # sequences that are decoded here apart from chats, as far as this router placed them
    apart_tokens: int = 0  # their KV tokens
    _unseen_prefill_tokens: int = 0
    _unseen_kv_tokens: int = 0
    kv_kind: bytes = field(init=False)  # equal bytes: the same model and layout

    def __post_init__(self) -> None:
        kind = discovery.Instance(model=self.record.model, layout=self.record.layout)
        kind.model.served_name = kind.model.path = ""
        kind.transports.extend(discovery.TransportOffer(name=name) for name in sorted(self.offered))
        self.kv_kind = kind.SerializeToString(deterministic=True)

    @property
    def incarnation(self) -> str:
        """The life this is."""
        return self.record.incarnation

    @property
    def offered(self) -> set[str]:
        """Names of the ways in which it hands KV over."""
        return {offer.name for offer in self.record.transports}

    @property
    def moves_kv_itself(self) -> bool:
        """Whether its engine does: then nobody can fetch from it, nor it from anybody."""
        return any(name.startswith(NATIVE) for name in self.offered)

    @property
    def predicted_step_us(self) -> float:
        """What a decode step over the KV it has, or is about to have, takes: the time between two tokens. 0: no KV, or no step was seen."""
        return self.decode_speed.predict_us(self.kv_tokens)

    def can(self, capability: discovery.Capability) -> bool:
        """Whether it accepts that kind of work."""
        return capability in self.record.capabilities

    def is_open(self, now: float) -> bool:
        """Whether it may get new work: heard of lately, steps moving, not draining, not fenced by a frontend since."""
        age_s, predicted_s = self.beat.running_step_age_us / 1e6, self.beat.predicted_step_us / 1e6
        is_stuck = age_s > max(STUCK_STEP_MIN_S, STUCK_STEP_FACTOR * predicted_s)
        is_heard = now - self.heard_at <= SUSPECT_AFTER_S and self.heard_at > self.fenced_at
        return is_heard and not is_stuck and not self.record.draining and not self.load.draining

    def heard(self, beat: worker.Beat, now: float) -> None:
        """A message of its feed came."""
        self.beat = beat
        self.heard_at = now

    def reported(self, load: worker.WorkerLoad, now: float) -> None:
        """Its load came."""
        self.load = load
        for sample in load.samples:
            if sample.prefill_tokens:
                self.speed.add(sample.prefill_tokens, sample.duration_us)
            elif sample.decode_sequences:
                self.decode_step_us += (sample.duration_us - self.decode_step_us) * (SMOOTHING if self.decode_step_us else 1.0)
                self.decode_speed.add(sample.kv_tokens, sample.duration_us)
        while self._unseen and now - next(iter(self._unseen.values())).at > UNSEEN_S:
            self._seen(next(iter(self._unseen)))

    def placed(self, placement: int, work: Placed) -> None:
        """Work was given to it; its load does not show it yet."""
        self._placed[placement] = self._unseen[placement] = work
        self._num_batch += work.weight != 1.0
        self._unseen_prefill_tokens += work.prefill_tokens
        self._unseen_kv_tokens += work.kv_tokens
        if work.is_apart:
            self.num_apart += work.kv_tokens > 0
            self.apart_tokens += work.kv_tokens
        if work.prefill_tokens and work.weight == 1.0:
            self._prompts.append(work.at)

    def ended(self, placement: int) -> None:
        """That work is over or elsewhere."""
        self._seen(placement)
        work = self._placed.pop(placement, None)
        if work is None:
            return
        self._num_batch -= work.weight != 1.0
        if work.is_apart:
            self.num_apart -= work.kv_tokens > 0
            self.apart_tokens -= work.kv_tokens

    def _seen(self, placement: int) -> None:
        """Its load shows this work now, or it is over."""
        work = self._unseen.pop(placement, None)
        if work is not None:
            self._unseen_prefill_tokens -= work.prefill_tokens
            self._unseen_kv_tokens -= work.kv_tokens

    @property
    def num_sequences(self) -> int:
        """Sequences it has or is about to have."""
        return int(self.load.running_sequences + self.load.waiting_sequences) + len(self._unseen)

    @property
    def num_waiting(self) -> int:
        """Sequences that do not run yet."""
        return int(self.load.waiting_sequences) + len(self._unseen)

    @property
    def weight(self) -> float:
        """Weights of its sequences together. Those another router has placed count as interactive."""
        # Between the end of the wait and the first step a handoff is in no count of the worker's, but it is still placed here.
        return max(self.num_sequences, len(self._placed)) - (1.0 - BATCH_WEIGHT) * self._num_batch

    @property
    def kv_tokens(self) -> int:
        """KV tokens a decode step attends to, or is about to, those of long sequences that are still computed elsewhere included."""
        seen = int(self.load.active_kv_tokens) + self._unseen_kv_tokens
        return max(seen, self.apart_tokens)

    def prompts_per_s(self, now: float) -> float:
        """Interactive prompts it was lately given to compute."""
        while self._prompts and now - self._prompts[0] > RATE_S:
            self._prompts.popleft()
        return len(self._prompts) / RATE_S

    def queue_us(self) -> float:
        """Predicted wait for a new prompt."""
        return self.speed.predict_us(int(self.load.waiting_prefill_tokens) + self._unseen_prefill_tokens)


class Fleet:
    """All known workers by incarnation, and pairs that cannot reach each other."""

    def __init__(self) -> None:
        self.workers: dict[str, Worker] = {}
        self._barred: dict[tuple[str, str], float] = {}
        self._matches: dict[tuple[bytes, bytes], bool] = {}  # by kv_kind: as many as there are kinds of workers, squared
        self._decode_speeds: dict[bytes, StepSpeed] = {}  # by kv_kind

    def add(self, record: discovery.Instance, bit: int, prefill_us_per_token: float) -> Worker:
        """A new life. prefill_us_per_token: its speed until it has reported a step."""
        made = self.workers[record.incarnation] = Worker(record, bit, StepSpeed(prefill_us_per_token))
        made.decode_speed = self._decode_speeds.setdefault(made.kv_kind, made.decode_speed)
        return made

    def serving(self, model: str) -> list[Worker]:
        """Workers of that model, whatever their state."""
        return [w for w in self.workers.values() if w.record.model.served_name == model]

    def num_open(self, now: float) -> int:
        """Workers that may get new work."""
        return sum(w.is_open(now) for w in self.workers.values())

    def bar(self, prefill: str, decode: str, now: float) -> None:
        """These two cannot reach each other: no pair of them for a while."""
        self._barred = {pair: until for pair, until in self._barred.items() if until > now}
        self._barred[prefill, decode] = now + PAIR_BARRED_S

    def is_barred(self, prefill: str, decode: str, now: float) -> bool:
        """Whether that pair was reported lately."""
        return self._barred.get((prefill, decode), float("-inf")) > now

    def can_exchange(self, prefill: Worker, decode: Worker) -> bool:
        """Whether KV of the one can become KV of the other, and there is a way; kvtransfer refuses the pair if not, but only after it was
        placed."""
        if prefill.kv_kind == decode.kv_kind:
            return True
        kinds = (prefill.kv_kind, decode.kv_kind)
        if kinds not in self._matches:
            a, b = prefill.record, decode.record
            is_alike = not model_mismatch(a.model, b.model) and not layout_mismatch(a.layout, b.layout)
            self._matches[kinds] = is_alike and (prefill.offered == decode.offered or bool(prefill.offered & decode.offered))
        return self._matches[kinds]

    def fence(self, incarnations: Iterable[str], now: float) -> None:
        """A frontend lost these: no new work until their own feed is heard again."""
        for incarnation in incarnations:
            if found := self.workers.get(incarnation):
                found.fenced_at = now
