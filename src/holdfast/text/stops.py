"""Find stop strings in text that arrives in pieces, holding back only what may become one.

The match that completes first wins; among those that complete at the same character, the longest. Output
ends before it. Must never emit a character of a stop string that is matched later, and never lose text that
turned out to be harmless. State is rebuilt by feeding the same text to a new matcher, split in any way.

Method: Knuth-Morris-Pratt per stop string, so that the cost is linear in the text whatever the strings.
"""

from __future__ import annotations

from collections.abc import Sequence


class _Pattern:
    """One stop string and how much of it the text ends with."""

    __slots__ = ("fallback", "matched", "text")

    def __init__(self, text: str):
        self.text = text
        self.matched = 0
        self.fallback = [0]
        """For each prefix length - 1: the length of its longest proper prefix that is also its suffix; grown
        only as far as the text ever matched, so that long strings cost nothing up front."""

    def _fall_back(self, length: int) -> int:
        fallback, text = self.fallback, self.text
        while len(fallback) < length:
            k = fallback[-1]
            char = text[len(fallback)]
            while k and text[k] != char:
                k = fallback[k - 1]
            fallback.append(k + 1 if text[k] == char else 0)
        return fallback[length - 1]

    def advance(self, text: str, end: int) -> int:
        """Consume ``text[:end]``; return the position after the first complete match, or 0."""
        pattern, length, k, at = self.text, len(self.text), self.matched, 0
        first = pattern[0]
        while at < end:
            if k == 0:
                at = text.find(first, at, end)
                if at < 0:
                    break
            char = text[at]
            while k and pattern[k] != char:
                k = self._fall_back(k)
            if pattern[k] == char:
                k += 1
            at += 1
            if k == length:
                self.matched = k
                return at
        self.matched = k
        return 0


class StopMatcher:
    """Watches one choice's text for its stop strings.

    After a match the matcher is spent: everything later is dropped.
    """

    __slots__ = ("_firsts", "_held", "_include", "_patterns", "match_end", "matched")

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False):
        """Create one.

        Args:
            stops: stop strings; empty ones never match and are ignored.
            include_stop: whether the output ends after the stop string instead of before it.
        """
        # Longest first: of several that complete at the same character, the earliest start is taken.
        self._patterns = [_Pattern(stop) for stop in sorted({s for s in stops if s}, key=lambda s: (-len(s), s))]
        self._firsts = sorted({pattern.text[0] for pattern in self._patterns})
        self._include = include_stop
        self._held = ""
        self.matched: str | None = None
        """The stop string that was found."""
        self.match_end = 0
        """Where it ends: characters into the text of the `feed` that completed it."""

    def feed(self, text: str) -> tuple[str, str | None]:
        """Take the next piece of text.

        Returns:
            The text that is safe to emit now, and the stop string that this piece completed, if any.
        """
        if self.matched is not None:
            return "", None
        if not self._held:  # then no pattern has begun to match
            for char in self._firsts:
                if char in text:
                    break
            else:
                return text, None
        end, found = len(text), None
        for pattern in self._patterns:
            at = pattern.advance(text, end if found is None else end - 1)
            if at:
                end, found = at, pattern
        if found is None:
            return self._release(text), None
        return self._cut(text, end, found.text), found.text

    def _release(self, text: str) -> str:
        whole = self._held + text if self._held else text
        keep = max([pattern.matched for pattern in self._patterns], default=0)
        if not keep:
            self._held = ""
            return whole
        self._held = whole[-keep:]
        return whole[:-keep]

    def _cut(self, text: str, end: int, stop: str) -> str:
        self.matched, self.match_end = stop, end
        whole = self._held + text[:end]
        self._held = ""
        return whole if self._include else whole[: len(whole) - len(stop)]

    def flush(self) -> str:
        """Return the text held back, because no more will come."""
        held, self._held = self._held, ""
        for pattern in self._patterns:
            pattern.matched = 0
        return held
