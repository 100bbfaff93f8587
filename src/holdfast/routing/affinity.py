"""Which worker the requests of a session went to: bounded, and forgotten some time after the last one.

Must never read a clock or know whether a worker may be used.
"""

from __future__ import annotations

from collections import OrderedDict

MOST_SESSIONS = 65_536
"""Beyond it those that were used longest ago are forgotten."""


class Affinity:
    """Sessions of one process, by model and name.

    Args:
        ttl: seconds after its last request that a session is remembered.
    """

    __slots__ = ("_sessions", "_ttl")

    def __init__(self, ttl: float):
        self._ttl = ttl
        self._sessions: OrderedDict[tuple[str, str], tuple[str, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sessions)

    def find(self, model: str, session: str, now: float) -> str:
        """Return the worker's instance id; empty: none."""
        instance, ends = self._sessions.get((model, session), ("", 0.0))
        return instance if now < ends else ""

    def bind(self, model: str, session: str, instance: str, now: float) -> None:
        """A request of the session goes to a worker."""
        self._sessions[model, session] = (instance, now + self._ttl)
        self._sessions.move_to_end((model, session))
        self._tidy(now)

    def forget(self, instance: str) -> None:
        """A worker is gone for good."""
        for key in [key for key, (bound, _) in self._sessions.items() if bound == instance]:
            del self._sessions[key]

    def _tidy(self, now: float) -> None:
        """All live equally long, so the oldest use ends first."""
        while self._sessions:
            key, (_, ends) = next(iter(self._sessions.items()))
            if now < ends and len(self._sessions) <= MOST_SESSIONS:
                return
            del self._sessions[key]
