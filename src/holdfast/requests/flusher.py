"""One flush per stream and read: collects what a read of a worker's connection touched.

A read may bring many frames; every touched stream is delivered once afterwards, and every touched response
is written once, whatever number of its choices moved. Must never let one stream's fault reach another.
"""

from __future__ import annotations

import logging
from typing import Protocol

log = logging.getLogger(__name__)


class Deliverable(Protocol):
    """Something that has collected tokens."""

    def deliver(self) -> None:
        """Hand on what has been collected."""


class Writable(Protocol):
    """Something that has collected bytes."""

    def push(self) -> None:
        """Write what has been collected."""


class Flusher:
    """Call `flush` after each read (`Link.on_read_done`)."""

    __slots__ = ("streams", "writers")

    def __init__(self) -> None:
        self.streams: list[Deliverable] = []
        """Appended to by attempts when their stream becomes dirty."""
        self.writers: list[Writable] = []
        """Appended to by responses when they get their first bytes."""

    def flush(self) -> None:
        """Deliver every touched stream, then write every touched response."""
        if self.streams:
            streams, self.streams = self.streams, []
            for stream in streams:
                try:
                    stream.deliver()
                except Exception:
                    log.exception("a stream could not be delivered; the others go on")
        if self.writers:
            writers, self.writers = self.writers, []
            for writer in writers:
                try:
                    writer.push()
                except Exception:
                    log.exception("a response could not be written; the others go on")
