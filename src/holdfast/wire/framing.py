"""Cuts a byte stream into frame payloads, wherever the network split it.

A frame is a little-endian u32 length and that many bytes. Every byte is copied at most a constant number
of times, however small the pieces it arrives in. Must never look inside a payload.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from holdfast.base.errors import ProtocolViolation
from holdfast.base.limits import FRAME_BYTES

PREFIX_BYTES = 4


class FrameSplitter:
    """Collects bytes and yields whole payloads; keeps at most one unfinished frame."""

    __slots__ = ("_kept", "_limit", "_need")

    def __init__(self, limit: int = FRAME_BYTES):
        self._kept = bytearray()
        self._limit = limit
        self._need = PREFIX_BYTES
        """Bytes that must be there before it is worth looking again."""

    @property
    def unfinished(self) -> int:
        """Bytes of the unfinished frame that are held back."""
        return len(self._kept)

    def feed(self, data: bytes) -> Iterable[memoryview]:
        """Return the payloads that ``data`` completes, in order; iterate to the end.

        Raises:
            ProtocolViolation: while iterating: a length of zero or over the limit, after the frames before it.
        """
        if not self._kept and PREFIX_BYTES < len(data) <= self._limit + PREFIX_BYTES:
            length = int.from_bytes(data[:PREFIX_BYTES], "little")
            if length == len(data) - PREFIX_BYTES:
                return (memoryview(data)[PREFIX_BYTES:],)
        return self._split(data)

    def _split(self, data: bytes) -> Iterator[memoryview]:
        kept = self._kept
        if kept:
            kept += data
            if len(kept) < self._need:
                return
            data = bytes(kept)
            kept.clear()
        view = memoryview(data)
        start, size = 0, len(data)
        need = PREFIX_BYTES
        while size - start >= PREFIX_BYTES:
            length = int.from_bytes(view[start : start + PREFIX_BYTES], "little")
            if not 0 < length <= self._limit:
                raise ProtocolViolation(
                    f"the peer announced a frame of {length} bytes; allowed are 1 to {self._limit}",
                    limit="FRAME_BYTES",
                    threshold=self._limit,
                    actual=length,
                )
            end = start + PREFIX_BYTES + length
            if end > size:
                need = PREFIX_BYTES + length
                break
            yield view[start + PREFIX_BYTES : end]
            start = end
        kept += view[start:]
        self._need = need
