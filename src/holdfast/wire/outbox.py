"""Encoded frames that wait for whoever does the I/O. Must never do I/O itself."""

from __future__ import annotations

from collections.abc import Callable

from holdfast.wire.codec import encode
from holdfast.wire.frames import CallerFrame, WorkerFrame


class Outbox:
    """Frames to be written, in order. ``on_fill`` is called when the first one comes in."""

    __slots__ = ("_pieces", "on_fill")

    def __init__(self) -> None:
        self._pieces: list[bytearray] = []
        self.on_fill: Callable[[], None] | None = None

    def __bool__(self) -> bool:
        return bool(self._pieces)

    def put(self, frame: CallerFrame | WorkerFrame) -> None:
        """Append a frame. Raises PayloadTooLarge when it is over the frame limit; nothing is appended then."""
        self.put_encoded([encode(frame)])

    def put_encoded(self, pieces: list[bytearray]) -> None:
        """Append frames that `codec.encode` or `columns.encode_items` made."""
        first = not self._pieces
        self._pieces += pieces
        if first and self.on_fill is not None:
            self.on_fill()

    def take(self) -> bytes | bytearray:
        """Return all that waits as one piece and forget it."""
        pieces = self._pieces
        if not pieces:
            return b""
        self._pieces = []
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def clear(self) -> None:
        """Forget all that waits."""
        self._pieces.clear()
