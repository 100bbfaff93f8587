"""When requests are sent: at their time stamps (perhaps faster), at a random rate, or as soon as another one is over.

Must never send anything itself.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator

import msgspec

from holdfast.base.errors import InvalidRequest
from holdfast.replay.trace import TraceRequest

MOST_IN_FLIGHT = 8192
"""Requests under way at most, whatever the trace says; a request that waits for this shows as sent late."""


class Arrivals(msgspec.Struct, frozen=True):
    """How a trace is paced.

    With ``rate`` (requests a second, Poisson) or ``concurrency`` alone the time stamps do not matter;
    ``concurrency`` beside ``speedup`` or ``rate`` only limits how many requests are under way.
    """

    speedup: float | None = None
    """Divides the trace's time; 2 sends twice as fast."""
    rate: float | None = None
    concurrency: int | None = None

    def __post_init__(self) -> None:
        if self.speedup is not None and self.rate is not None:
            raise InvalidRequest("Requests come either at the trace's times (speed-up) or at a rate, not both.")
        for name, value in (("speed-up", self.speedup), ("rate", self.rate), ("concurrency", self.concurrency)):
            if value is not None and not 0 < value < float("inf"):
                raise InvalidRequest(f"The {name} must be positive, not {value:g}.")

    @property
    def closed(self) -> bool:
        """Whether each request waits only for another one to end."""
        return self.concurrency is not None and self.speedup is None and self.rate is None

    @property
    def seats(self) -> int:
        """How many requests may be under way."""
        return min(self.concurrency or MOST_IN_FLIGHT, MOST_IN_FLIGHT)

    @property
    def described(self) -> str:
        """In words, for a report."""
        limit = "" if self.concurrency is None else f"at most {self.concurrency} at once"
        if self.closed:
            return f"{self.concurrency} at once"
        pace = f"{self.rate:g} requests a second, Poisson" if self.rate else f"time stamps at {self.speedup or 1:g}x"
        return f"{pace}, {limit}" if limit else pace


def due_times(
    requests: Iterable[TraceRequest], arrivals: Arrivals, rng: random.Random
) -> Iterator[tuple[float, TraceRequest]]:
    """Yield each request with the seconds since the start at which it is due; 0.0 for all when closed."""
    due = 0.0
    first: float | None = None
    for request in requests:
        if arrivals.rate is not None:
            due += rng.expovariate(arrivals.rate)
        elif not arrivals.closed:
            first = request.timestamp if first is None else first
            due = (request.timestamp - first) / 1e3 / (arrivals.speedup or 1.0)
        yield due, request
