"""When a stream's tokens came: one number per delivery, counted into buckets a thousand tokens at a time.

A delivery costs one append of a clock reading that all streams of the same read share; everything else happens in
`fold`, off the token path. Times are ticks of a tenth of a millisecond.

Must never allocate per token, and never keep more than what came since the last fold.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from operator import sub

from holdfast.telemetry.series import TICKS_PER_SECOND

NS_PER_TICK = 10**9 // TICKS_PER_SECOND
LONGEST_KEPT = 3
"""Longest gaps that are remembered, with the token that they came before."""


_NO_GAPS: Counter[int] = Counter()
"""Never filled."""


class Rhythm:
    """Of one stream. Hot path: ``rhythm.ticks.append(tick)``, and `burst` when a delivery has more than one token."""

    __slots__ = ("_bursts", "_folded", "first", "last", "longest", "reported", "ticks", "tokens")

    def __init__(self) -> None:
        self.ticks: list[int] = []
        """One per delivery since the last fold; the last one stays, as what the next gap counts from."""
        self.first = 0
        """Tick of the first delivery; 0: none yet."""
        self.last = 0
        """Tick of the last delivery that was folded."""
        self.tokens = 0
        """Tokens that were folded."""
        self.reported = 0
        """Tokens that whoever counts has counted."""
        self.longest: list[tuple[int, int]] = []
        """(gap in ticks, output index of the token after it), longest first."""
        self._bursts: list[tuple[int, int]] = []
        self._folded = 0

    def burst(self, tokens: int) -> None:
        """The delivery just appended has this many tokens instead of one."""
        self._bursts.append((len(self.ticks) - 1, tokens))

    def fold(self) -> Counter[int]:
        """Return how many tokens had which gap since the last fold, by ticks.

        A token's gap is the time since the delivery before it, divided among the tokens of its own delivery; the
        first delivery's first token has none.
        """
        ticks = self.ticks
        fresh = len(ticks) - self._folded
        if fresh <= 0:
            return _NO_GAPS
        if fresh == 1 and not self._folded and not self._bursts:  # the first token alone: there is no gap yet
            self.first = self.last = ticks[0]
            self.tokens += 1
            self._folded = 1
            return _NO_GAPS
        tokens = fresh + sum(n - 1 for _, n in self._bursts)
        if not self._folded:
            self.first = ticks[0]
        gaps = list(map(sub, ticks[1:], ticks))
        counts = Counter(gaps)
        self._spread(counts, gaps)
        if gaps:
            self._remember(gaps)
        self.tokens += tokens
        self.last = ticks[-1]
        del ticks[:-1]
        self._bursts.clear()
        self._folded = 1
        return counts

    def _spread(self, counts: Counter[int], gaps: Sequence[int]) -> None:
        for position, tokens in self._bursts:
            if position == 0:  # only the very first delivery stands there: its other tokens came at once
                counts[0] += tokens - 1
                continue
            gap = gaps[position - 1]
            counts[gap] -= 1
            counts[gap // tokens] += tokens

    def _remember(self, gaps: Sequence[int]) -> None:
        longest = max(gaps)
        if len(self.longest) < LONGEST_KEPT or longest > self.longest[-1][0]:
            position = gaps.index(longest) + 1
            index = self.tokens + position - (1 if self._folded else 0)
            index += sum(n - 1 for at, n in self._bursts if at < position)
            self.longest = sorted([*self.longest, (longest, index)], reverse=True)[:LONGEST_KEPT]
