"""Keeps new work away from a worker that failed lately, without any judgement of its health.

Only `worker` and `transport` faults count (promise P10). What the failure detector has established itself
(silence, a hang, a lost connection) does not count again here: the worker's state says it already. Many
streams that fail in one event count once. Must never call a clock.
"""

from __future__ import annotations

import msgspec

from holdfast.base.errors import CannotConnect, Disconnected, HoldfastError, WorkerDraining


class InhibitionSettings(msgspec.Struct, frozen=True):
    """Times in seconds."""

    duration: float = 5.0
    """After one failure; doubles with every further one (``DYN_RUNTIME_INHIBITED_DURATION_SECS``)."""
    ceiling: float = 60.0
    """Longest inhibition."""


class Inhibition:
    """The recent failures of one worker."""

    __slots__ = ("_settings", "failures", "from_transport", "until")

    def __init__(self, settings: InhibitionSettings):
        self._settings = settings
        self.failures = 0
        """In a row, without a success between them."""
        self.until = float("-inf")
        self.from_transport = False
        """The last one was a fault of the way to it, so that a fresh pong is proof enough that it is over."""

    def report(self, error: HoldfastError, now: float) -> bool:
        """Count a failed attempt; returns whether it counted."""
        if error.fault not in ("worker", "transport") or isinstance(error, _KNOWN_OTHERWISE) or now < self.until:
            return False
        settings = self._settings
        self.until = now + min(settings.ceiling, settings.duration * 2 ** min(self.failures, 16))
        self.failures += 1
        self.from_transport = error.fault == "transport"
        return True

    def succeeded(self) -> None:
        """A stream ended well: the worker is fine."""
        self.failures = 0
        self.until = float("-inf")

    def answered(self) -> None:
        """The first pong after a reconnect or a freeze: the way is free again."""
        if self.from_transport:
            self.until = float("-inf")

    def active(self, now: float) -> bool:
        """Return whether new work should go elsewhere."""
        return now < self.until


_KNOWN_OTHERWISE = (WorkerDraining, Disconnected, CannotConnect)
