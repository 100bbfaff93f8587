"""How fast a model's workers finish what they have: the measured rate behind ``Retry-After``.

Must never decide who is turned away.
"""

from __future__ import annotations

import math

MEMORY = 10.0
"""Seconds after which an event counts for 1/e of what it counted at first."""
UNKNOWN = 5.0
"""Seconds that are told while nothing has been measured yet."""
LEAST, MOST = 1.0, 60.0
"""Bounds of what is told, in seconds."""


class DrainMeter:
    """Streams that ended per second, by model, as an exponentially decaying average."""

    def __init__(self) -> None:
        self._counts: dict[str, tuple[float, float, float]] = {}
        """Model: (decayed number of events, at, since)."""

    def ended(self, model: str, now: float) -> None:
        """A worker has finished one stream of a model; ``now`` in seconds of any clock that does not jump."""
        count, at, since = self._counts.get(model, (0.0, now, now))
        self._counts[model] = (count * _fade(now - at) + 1.0, now, since)

    def rate(self, model: str, now: float) -> float:
        """Return streams per second; 0 when nothing has been measured.

        The decayed count is divided by the decayed length of the time that was watched, so that the rate is right
        from the beginning: n events in t seconds give about n/t.
        """
        count, at, since = self._counts.get(model, (0.0, now, now))
        if not count:
            return 0.0
        watched = MEMORY * (1.0 - _fade(max(now - since, 1.0)))
        return count * _fade(now - at) / watched

    def retry_after(self, model: str, ahead: int, now: float) -> float:
        """Return the seconds until there should be room, between `LEAST` and `MOST`.

        Args:
            model: whose workers are meant.
            ahead: requests that will get room first.
            now: seconds.
        """
        rate = self.rate(model, now)
        if rate <= 0.0:
            return UNKNOWN
        return min(MOST, max(LEAST, (ahead + 1) / rate))


def _fade(seconds: float) -> float:
    return math.exp(-seconds / MEMORY)
