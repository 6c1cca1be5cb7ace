"""Stop strings: ends the text before the first one, and holds back what may become one."""

from collections.abc import Sequence


class StopMatcher:
    """Looks for stop strings in a text that arrives in pieces.

    The result does not depend on how the text was cut: the stop string that is complete first ends the text; of two that
    are complete at the same character, the one that began earlier.
    """

    __slots__ = ("_first_characters", "_held", "_longest", "_stops", "matched")

    def __init__(self, stops: Sequence[str]) -> None:
        """stops: at least one, none empty."""
        assert stops
        assert all(stops)
        self._stops = tuple(stops)
        self._longest = max(map(len, stops))
        self._first_characters = frozenset(stop[0] for stop in stops)
        self._held = ""
        self.matched: str | None = None  # the stop string that ended the text

    def push(self, text: str) -> str:
        """Take the next piece; returns what can be shown for sure. After a match: nothing, ever."""
        if self.matched is not None:
            return ""
        if not self._held and self._first_characters.isdisjoint(text):
            return text
        text = self._held + text
        end = self._find(text)
        if end is not None:
            self._held = ""
            return text[:end]
        keep = self._possible_start(text)
        self._held = text[keep:]
        return text[:keep]

    def finish(self) -> str:
        """The text is over: what was held back turned out to be no stop string."""
        held, self._held = self._held, ""
        return held

    def _find(self, text: str) -> int | None:
        """Where the text ends if a stop string is complete in it; sets matched."""
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if not found:
            return None
        _, start, self.matched = min(found)
        return start

    def _possible_start(self, text: str) -> int:
        """First index from which on text is a true prefix of a stop string; len(text) if there is none."""
        for index in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[index] in self._first_characters:
                tail = text[index:]
                if any(stop.startswith(tail) for stop in self._stops):
                    return index
        return len(text)
