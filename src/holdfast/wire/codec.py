"""Frames to bytes and back.

`CALLER_FRAMES` reads what a caller sends, `WORKER_FRAMES` what a worker sends. A frame whose tag this
version does not know is reported as None when the peer speaks a newer version, and forbidden otherwise.
Must never know about streams or connections.
"""

from __future__ import annotations

import sys
from typing import Any, Generic, TypeVar, get_args

import msgspec

from holdfast.base.errors import PayloadTooLarge, ProtocolViolation
from holdfast.base.limits import FRAME_BYTES
from holdfast.wire.frames import CallerFrame, WorkerFrame
from holdfast.wire.framing import PREFIX_BYTES

if sys.byteorder != "little":  # pragma: no cover - every supported platform is little-endian
    raise ImportError("Holdfast's wire columns are little-endian u32 and this machine is big-endian")

Frame = TypeVar("Frame")

_encoder = msgspec.msgpack.Encoder()
_any_array = msgspec.msgpack.Decoder(list[Any])
_PREFIX = bytes(PREFIX_BYTES)


def encode(frame: CallerFrame | WorkerFrame) -> bytearray:
    """Return the frame as it travels, length prefix included.

    Raises:
        PayloadTooLarge: over `limits.FRAME_BYTES`.
    """
    buffer = bytearray(_PREFIX)
    _encoder.encode_into(frame, buffer, PREFIX_BYTES)
    length = len(buffer) - PREFIX_BYTES
    if length > FRAME_BYTES:
        raise PayloadTooLarge(
            f"a {type(frame).__name__.lower()} frame would have {length} bytes; at most {FRAME_BYTES} travel in one",
            limit="FRAME_BYTES",
            threshold=FRAME_BYTES,
            actual=length,
        )
    buffer[:PREFIX_BYTES] = length.to_bytes(PREFIX_BYTES, "little")
    return buffer


class FrameReader(Generic[Frame]):
    """Reads the frames of one direction."""

    __slots__ = ("_decode", "_tags")

    def __init__(self, union: Any):
        self._decode = msgspec.msgpack.Decoder(union).decode
        self._tags = frozenset(cls.__struct_config__.tag for cls in get_args(union))

    def read(self, payload: bytes | memoryview, state: str, *, lenient: bool) -> Frame | None:
        """Return the frame, or None for an unknown tag of a newer peer.

        Args:
            payload: one frame without its length prefix.
            state: the state of the connection, for the error message.
            lenient: whether the peer speaks a newer version, so that unknown tags are to be ignored.

        Raises:
            ProtocolViolation: not a frame of this direction.
        """
        try:
            frame: Frame = self._decode(payload)
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            if lenient and self._is_unknown(payload):
                return None
            raise ProtocolViolation(
                f"the peer sent {len(payload)} bytes that are no frame of this protocol, in state {state!r}: {error}",
                state=state,
            ) from None
        return frame

    def _is_unknown(self, payload: bytes | memoryview) -> bool:
        try:
            array = _any_array.decode(payload)
        except (msgspec.DecodeError, ValueError, RecursionError, TypeError):
            return False
        return bool(array) and type(array[0]) is int and array[0] not in self._tags


CALLER_FRAMES: FrameReader[CallerFrame] = FrameReader(CallerFrame)
WORKER_FRAMES: FrameReader[WorkerFrame] = FrameReader(WorkerFrame)


def name_of(frame: CallerFrame | WorkerFrame) -> str:
    """Return the frame's name as it appears in messages and state tables."""
    return type(frame).__name__.lower()
