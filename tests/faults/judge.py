"""Law 2, judged after a strike by what the watched workers wrote down."""

from dataclasses import dataclass, field

from fault_kinds import Cell, is_worker
from history import History, Track

LAW_2_S = 5.0
# A woken process lets go within one step of waking (law 2), of at most 250 ms; and 50 ms, as in law 6.
WAKE_S = 0.25 + 0.05
# On a machine that is short of processors a step takes longer: the one it was stopped in, and one that began before the loop had its turn.
WAKE_STEPS = 2
EARLIER_S = 1e-6
# Half of what a silent peer is given: two processes that stand still for so long one after the other fence each other rightly.
STARVED_S = 1.0


@dataclass
class Result:
    """What came of one strike. Times in seconds from the strike; states: handoffs concerned at that instant, by side and state."""

    cell: str
    transport: str
    fault: str
    victims: list[str]
    target: str = ""  # side and state the strike waited for
    is_target_hit: bool = False
    states: dict[str, int] = field(default_factory=dict)
    num_held: int = 0  # of them, sides that held blocks and live on
    free_s: float | None = None  # until the last of those was free; None: there was none, or nobody had to let go
    worst: str = ""  # who that was, in which state, from when on it held blocks
    woken_free_s: float | None = None  # from the waking of a stopped one until it held nothing it had held before
    fences: int = 0
    requests: dict[str, int] = field(default_factory=dict)
    max_stranded_bytes: float = 0.0
    stranded_s: float = 0.0  # longest time for which there were any
    max_mismatch_bytes: float = 0.0
    settled_s: float = 0.0  # from the end of the load
    starved_s: float = 0.0  # longest time within 2 s for which a process's threads wanted a processor and had none
    problems: list[str] = field(default_factory=list)

    @property
    def is_void(self) -> bool:
        """A law seems broken, but a process had no processor for so long that healthy ones take each other for dead."""
        return bool(self.problems) and self.starved_s > STARVED_S


def judge_blocks(history: History, cell: Cell, result: Result, t0: float, t_mended: float) -> None:
    """Law 2: what was held for somebody who is out of reach is free within 5 s on every live side."""
    if cell.fault.is_short:
        return
    is_frontend = any(victim.startswith("frontend") for victim in cell.victims)
    for track in history.tracks(lambda track: _must_let_go(history, cell, track)):
        held_at = track.holds_in(t0, min(t_mended, t0 + LAW_2_S))
        if held_at is None:
            continue
        also_decoding = is_frontend or (cell.fault.is_partition and cell.victims == (track.instance,))
        since = held_at
        if track.at(held_at)[0] == "decoding" and not also_decoding:
            continue
        result.num_held += 1
        free_at = track.free_at(since, also_decoding=also_decoding)
        took = None if free_at is None else round(free_at - t0, 3)
        state, held = track.at(since)
        what = f"{track.instance} held {held} blocks ({track.side} {state}, {track.request}) from {since - t0:.3f} s on"
        if took is None or took > LAW_2_S:
            result.problems.append(f"{what} for {took} s after the strike")
        if took is not None and took >= (result.free_s or 0.0):
            result.free_s, result.worst = took, what
    if cell.fault.is_stop:
        _judge_woken(history, cell, result, t0, t_mended)


def _must_let_go(history: History, cell: Cell, track: Track) -> bool:
    """Whether a live side has lost its other side, or its frontend, for good."""
    one, other = track.instance, history.peer(track)
    if not history.is_last_life(track) or (one in cell.victims and not cell.fault.is_partition):
        return False  # dead, or judged when it wakes
    lost = [victim for victim in cell.victims if victim.startswith("frontend")]
    if lost:
        return (cell.fault.is_kill or cell.fault.is_partition) and (len(cell.victims) == 1 or one in cell.victims)
    return cell.severs(one, other) and all(is_worker(victim) for victim in cell.victims)


def _judge_woken(history: History, cell: Cell, result: Result, t0: float, t_continued: float) -> None:
    """A woken worker was given up by everybody: what it held for handoffs is free within one step, counted from its first sign of
    life: a busy machine may let it wait for a processor. What its streams decode has the time that a broken Attach has."""
    for victim in filter(is_worker, cell.victims):
        t_woken = history.first_sign(victim, t_continued) or t_continued
        for track in history.tracks(lambda track, victim=victim: track.instance == victim):
            if track.at(t_woken - EARLIER_S)[1]:
                _judge_track_woken(history, result, track, t0, t_woken)


def _judge_track_woken(history: History, result: Result, track: Track, t0: float, t_woken: float) -> None:
    state, held = track.at(t_woken - EARLIER_S)
    free_at = track.free_at(t_woken, also_decoding=True)
    took = None if free_at is None else round(free_at - t_woken, 3)
    if state == "decoding":
        is_in_time = free_at is not None and free_at - t0 <= LAW_2_S
    else:
        is_in_time = took is not None and (took <= WAKE_S or history.num_steps(track.instance, t_woken, t_woken + took) <= WAKE_STEPS)
        if took is not None:
            result.woken_free_s = max(result.woken_free_s or 0.0, took)
    if not is_in_time:
        result.problems.append(f"{track.instance} still held {held} blocks ({track.side} {state}, {track.request}) {took} s after waking")
