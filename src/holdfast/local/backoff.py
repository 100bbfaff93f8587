"""When a crashed child is started again, and when that is given up.

The first restart comes at once, further ones wait exponentially longer; more than ``intensity`` crashes
within ``window`` seconds mean that restarting does not help. A child that stayed up for ``stable`` seconds
starts with a clean sheet.

Must never sleep or start anything itself.
"""

from __future__ import annotations

import msgspec

EXIT_CONFIGURATION = 78
"""Exit code (EX_CONFIG of sysexits.h) of a process whose settings can never work: it is not restarted."""


class RestartPolicy(msgspec.Struct, frozen=True):
    """Times in seconds."""

    first_delay: float = 0.0
    next_delay: float = 0.25
    factor: float = 2.0
    longest_delay: float = 10.0
    intensity: int = 5
    window: float = 30.0
    stable: float = 30.0


class RestartBudget:
    """Counts the crashes of one slot."""

    def __init__(self, policy: RestartPolicy):
        self._policy = policy
        self._crashes: list[float] = []
        self._streak = 0

    def crashed(self, now: float, uptime: float) -> float | None:
        """Return how long to wait before the next start, or None to give up.

        Args:
            now: the loop's time of the crash.
            uptime: how long the child had been running.
        """
        policy = self._policy
        if uptime >= policy.stable:
            self._streak = 0
        self._crashes = [t for t in self._crashes if t > now - policy.window]
        self._crashes.append(now)
        if len(self._crashes) > policy.intensity:
            return None
        self._streak += 1
        if self._streak == 1:
            return policy.first_delay
        return min(policy.longest_delay, policy.next_delay * policy.factor ** (self._streak - 2))
