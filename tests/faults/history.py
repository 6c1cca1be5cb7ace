"""What watched workers wrote down: which handoff was in which state at an instant, who held blocks for it, and when they were free."""

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from watched_worker import DECODING, OVER

SOURCE_STATES = ("queued", "offered", "fetching", "computing", "computed")
SINK_STATES = ("ticket", "pulling", "moving", "draining", "decoding")
STATES = tuple([("source", state) for state in SOURCE_STATES] + [("sink", state) for state in SINK_STATES])


@dataclass
class Track:
    """One side of one handoff, in one life of one worker. peer: its name; "" if it never said."""

    instance: str
    life: str
    request: str
    attempt: int
    side: str
    peer: str
    times: list[float] = field(default_factory=list)
    states: list[str] = field(default_factory=list)
    helds: list[int] = field(default_factory=list)

    def at(self, t: float) -> tuple[str, int]:
        """State and blocks held at an instant; (OVER, 0) before its beginning."""
        index = bisect_right(self.times, t) - 1
        return (self.states[index], self.helds[index]) if index >= 0 else (OVER, 0)

    def free_at(self, since: float, *, also_decoding: bool) -> float | None:
        """When, from since on, it first held nothing; a sequence that decodes needs its blocks unless also_decoding. None: never."""
        for t in [since, *(t for t in self.times if t > since)]:
            state, held = self.at(t)
            if not held or (state == DECODING and not also_decoding):
                return t
        return None

    def holds_in(self, start: float, end: float) -> float | None:
        """The first instant in [start, end] at which it held blocks."""
        return next((t for t in [start, *(t for t in self.times if start < t <= end)] if self.at(t)[1]), None)


class History:
    """All tracks of all workers; `read` again for what was written since."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._offsets: dict[str, int] = {}
        self._lives: dict[str, str] = {}  # instance -> newest incarnation
        self.names: dict[str, str] = {}  # incarnation -> instance
        self._tracks: dict[tuple[str, str, int, str], Track] = {}  # by life, request, attempt, side
        self._steps: dict[str, list[float]] = {}  # instance -> when its steps ended
        self._wrote: dict[str, list[float]] = {}  # instance -> when it wrote something

    def read(self) -> None:
        """Take in all lines that are complete."""
        for file in sorted(self._folder.glob("*.jsonl")):
            with file.open("rb") as opened:
                opened.seek(self._offsets.get(file.name, 0))
                text = opened.read()
            complete = text[: text.rfind(b"\n") + 1]
            self._offsets[file.name] = self._offsets.get(file.name, 0) + len(complete)
            for line in complete.splitlines():
                self._take(file.stem, json.loads(line))

    def forget(self) -> None:
        """Drop tracks that are over, and those of the dead."""
        live = {place: track for place, track in self._tracks.items() if self.is_last_life(track)}
        self._tracks = {place: track for place, track in live.items() if track.at(track.times[-1]) != (OVER, 0)}
        self._steps.clear()
        self._wrote.clear()

    def tracks(self, of: Callable[[Track], bool]) -> Iterator[Track]:
        """Those that concern somebody."""
        for track in self._tracks.values():
            if of(track):
                yield track

    def peer(self, track: Track) -> str:
        """Name of the other side's instance."""
        return self.names.get(track.peer, "")

    def is_last_life(self, track: Track) -> bool:
        """Whether that worker has not been started again since."""
        return self._lives[track.instance] == track.life

    def first_sign(self, instance: str, since: float) -> float | None:
        """When that worker wrote anything for the first time since then."""
        times = self._wrote.get(instance, [])
        index = bisect_right(times, since)
        return times[index] if index < len(times) else None

    def num_steps(self, instance: str, start: float, end: float) -> int:
        """Steps that ended in (start, end]."""
        times = self._steps.get(instance, [])
        return bisect_right(times, end) - bisect_right(times, start)

    def counts(self, t: float, of: Callable[[Track], bool]) -> Counter[tuple[str, str]]:
        """Handoffs by side and state at an instant."""
        found = Counter((track.side, track.at(t)[0]) for track in self.tracks(of))
        return Counter({place: count for place, count in found.items() if place[1] != OVER})

    def _take(self, instance: str, line: dict) -> None:
        if "life" in line:
            self._lives[instance] = line["life"]
            self.names[line["life"]] = instance
            return
        self._wrote.setdefault(instance, []).append(line["t"])
        if "step" in line:
            self._steps.setdefault(instance, []).append(line["t"])
            return
        place = (self._lives[instance], line["request"], line["attempt"], line["side"])
        track = self._tracks.get(place)
        if track is None:
            track = self._tracks[place] = Track(instance, *place, peer=line["peer"])
        track.times.append(line["t"])
        track.states.append(line["state"])
        track.helds.append(line["held"])
