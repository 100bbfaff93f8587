"""What is held for callers who route by themselves: a share of a worker, until it shows in the worker's own reports.

A caller that names its request holds its share until it says `free`; one that only reserves holds it for the moment
until the worker reports the request itself. Nothing is held for ever: leases expire, and end with their worker.

Must never choose a worker.
"""

from __future__ import annotations

import asyncio

from holdfast.base.errors import CapacityExhausted
from holdfast.base.limits import ACTIVE_REQUESTS
from holdfast.routing.claims import Claim

SETTLE_SECONDS = 0.1
"""After this the worker has the request: its next report includes it."""
RESERVE_SECONDS = 1.0
"""After this some report has come that includes it."""


class _Held:
    __slots__ = ("claim", "expiry", "instance", "settling")

    def __init__(self, claim: Claim, instance: str):
        self.claim, self.instance = claim, instance
        self.settling: asyncio.TimerHandle | None = None
        self.expiry: asyncio.TimerHandle | None = None


class Reservations:
    """See the module.

    Args:
        expiry: seconds after which a lease that nobody frees ends.
    """

    def __init__(self, expiry: float):
        self._expiry = expiry
        self._held: dict[str, _Held] = {}
        self._anonymous = 0
        self.expired = 0
        """Leases that nobody freed."""

    def __len__(self) -> int:
        return len(self._held)

    def check_room(self) -> None:
        """Raise CapacityExhausted when no more can be held."""
        if len(self._held) >= ACTIVE_REQUESTS:
            raise CapacityExhausted(
                f"This router holds {len(self._held)} leases, which is its limit; free those that are over.",
                retry_after=2.0,
                layer="router",
                knob="ACTIVE_REQUESTS",
                threshold=ACTIVE_REQUESTS,
                measured=len(self._held),
            )

    def hold(self, claim: Claim, instance: str, request_id: str) -> None:
        """Hold a claim: under that id until it is freed (an older one of it is freed now), without one for a moment.

        Args:
            claim: taken for the chosen worker.
            instance: of the worker.
            request_id: the caller's; empty: none.
        """
        if not request_id:
            self._anonymous += 1
        key = request_id or f"\0{self._anonymous}"
        self.free(key)
        held = self._held[key] = _Held(claim, instance)
        loop = asyncio.get_running_loop()
        held.settling = loop.call_later(SETTLE_SECONDS, claim.sent_elsewhere)
        held.expiry = loop.call_later(self._expiry if request_id else RESERVE_SECONDS, self._expire, key)

    def computed(self, request_id: str) -> bool:
        """The prompt is computed; returns whether there is such a lease."""
        held = self._held.get(request_id)
        if held is not None:
            held.claim.computed()
        return held is not None

    def free(self, request_id: str) -> bool:
        """It is over; returns whether there was such a lease."""
        held = self._held.pop(request_id, None)
        if held is None:
            return False
        for timer in (held.settling, held.expiry):
            if timer is not None:
                timer.cancel()
        held.claim.release()
        return True

    def forget(self, instance: str) -> None:
        """A worker is gone."""
        for key in [key for key, held in self._held.items() if held.instance == instance]:
            self.free(key)

    def close(self) -> None:
        """Give everything back."""
        for key in list(self._held):
            self.free(key)

    def _expire(self, key: str) -> None:
        if self.free(key) and not key.startswith("\0"):
            self.expired += 1
