"""One flush per stream and read: collects what a read of a worker's connection touched.

A read may bring many frames; every touched stream is delivered once afterwards, and every touched response
is written once, whatever number of its choices moved. Must never let one stream's fault reach another.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Protocol

from holdfast.requests import express
from holdfast.telemetry.rhythm import NS_PER_TICK

if TYPE_CHECKING:
    from holdfast.requests.express import Track

log = logging.getLogger(__name__)


NOTHING: list[int] = []
"""The tokens of a stream for which none wait; never filled."""


class Deliverable(Protocol):
    """Something that has collected tokens."""

    def deliver(self) -> None:
        """Hand on what has been collected."""


class Writable(Protocol):
    """Something that has collected bytes."""

    def push(self) -> None:
        """Write what has been collected."""


class Flusher:
    """Call `flush` after each read (`Link.on_read_done`).

    Args:
        clock: a stopwatch in nanoseconds, for telemetry alone; None: the running loop's time, which uvloop
            rounds to milliseconds.
    """

    __slots__ = ("clock", "delivering", "streams", "take", "tick", "touched", "writers", "writes")

    def __init__(self, clock: Callable[[], int] | None = None) -> None:
        self.clock = clock or _loop_ns
        self.tick = 0
        """When the present read came, for everything that it touched (`telemetry.rhythm`)."""
        self.streams: list[Deliverable] = []
        """Appended to by attempts when their stream becomes dirty."""
        self.writers: list[Writable] = []
        """Appended to by responses when they get their first bytes."""
        self.writes: list[tuple[Callable[[bytes], object], bytes]] = []
        """Appended to in the middle of a delivery: writes that are ready. All of them in a row are cheaper than each
        among other work, because the kernel's part and ours throw each other out of the processor's caches."""
        self.delivering = False
        """Streams are being delivered; `writers` have their turn afterwards."""
        self.touched: list[Track] = []
        """Tracks whose streams became dirty by the short way; emptied, not replaced."""
        self.take = partial(express.native.take, self.touched) if express.native is not None else None
        """What takes an `Items` frame by the short way (`wire.caller_stream.Take`); None: there is none."""

    def flush(self) -> None:
        """Deliver every touched stream, then write every touched response."""
        if self.streams or self.touched:
            self.look()
            streams, self.streams = self.streams, []
            if self.touched:
                streams += self._deliver_tracks()
            self.deliver(streams)
        if self.writers:
            writers, self.writers = self.writers, []
            for writer in writers:
                try:
                    writer.push()
                except Exception:
                    log.exception("a response could not be written; the others go on")

    def _deliver_tracks(self) -> list[Deliverable]:
        """Deliver what came by the short way; return the streams that could not take it to the end."""
        slow: list[Deliverable]
        slow, torn, unwritten = express.native.deliver(self.touched, self.tick, NOTHING)
        self.writes += unwritten
        for stream in torn:
            stream.tear()
        return slow

    def deliver(self, streams: Iterable[Deliverable]) -> None:
        """Deliver these streams, then write what is ready; hot path."""
        self.delivering = True
        for stream in streams:
            try:
                stream.deliver()
            except Exception:
                log.exception("a stream could not be delivered; the others go on")
        self.delivering = False
        writes = self.writes[:]
        self.writes.clear()  # and not replaced: those who write keep its method
        for write, data in writes:
            try:
                write(data)
            except Exception:
                log.exception("an event could not be written; the others go on")

    def look(self) -> None:
        """Read the clock: something will be delivered now."""
        self.tick = self.clock() // NS_PER_TICK


def _loop_ns() -> int:
    return int(asyncio.get_running_loop().time() * 1e9)
