"""The seam between a replay and what it drives: a real endpoint (`client`), or engines on a virtual clock.

Must never know how a request is paced, or what is made of the events.
"""

from __future__ import annotations

from typing import Literal, Protocol

import msgspec

from holdfast.replay.trace import TraceRequest

Outcome = Literal["ok", "rejected", "failed", "timeout", "unfinished"]
"""``rejected``: turned away before any work (429, 503); ``failed``: anything else that is not a whole answer;
``unfinished``: still under way when the replay was stopped."""


class Job(msgspec.Struct, frozen=True):
    """One request to send."""

    index: int
    """Counts from 0 over the replay."""
    request: TraceRequest


class Events(Protocol):
    """Where a driver tells what happens to one job, as it happens; plain calls, because there are millions.

    Times are taken at the call.
    """

    def worker(self, name: str) -> None:
        """Say which worker answers."""

    def tokens(self, count: int = 1) -> None:
        """Say that so many output tokens arrived."""

    def usage(self, prompt: int, completion: int, cached: int) -> None:
        """Say what was counted, in tokens; ``cached`` of the prompt came from a prefix cache."""

    def ended(self, outcome: Outcome, reason: str = "") -> None:
        """Say how it ended; ``reason`` is an error code. The first call counts."""


class Driver(Protocol):
    """Something that serves jobs."""

    async def submit(self, job: Job, events: Events) -> None:
        """Send one job and return when it is over, having told everything to ``events``.

        A job that returns without an end is ``ok``; one that raises HoldfastError has failed with its code. Many
        are under way at once.
        """
