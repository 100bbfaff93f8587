"""Errors on their way over the wire: made to fit a frame, and read without trusting the peer.

Must never let a peer's details raise anything here.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec

from holdfast.base.errors import (
    CannotConnect,
    CapacityExhausted,
    ErrorInfo,
    HoldfastError,
    TransportFault,
    WorkerDraining,
)
from holdfast.base.restored import from_info

MESSAGE_CHARS = 4_096
"""A longer message is cut."""
DETAILS_BYTES = 16 * 1024
"""Details that encode to more are left out."""

_RESERVED = frozenset({"self", "message", "code"})
_encode = msgspec.msgpack.Encoder(enc_hook=repr).encode
_decode = msgspec.msgpack.Decoder(dict[str, Any]).decode


def pack_error(error: HoldfastError) -> ErrorInfo:
    """Return the wire form of an error, within a frame's limits; what msgpack cannot say becomes its `repr`."""
    info = error.info()
    try:
        details = _encode(info.details)
        plain = _decode(details) if len(details) <= DETAILS_BYTES else {"left_out": f"{len(details)} bytes of details"}
    except (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError):
        plain = {"left_out": "details that cannot be encoded"}
    return ErrorInfo(info.code, info.message[:MESSAGE_CHARS], info.fault, info.retry, plain)


def unpack_error(info: ErrorInfo) -> HoldfastError:
    """Restore a peer's error; details that collide with the constructor's own names are dropped."""
    details = {key: value for key, value in info.details.items() if key not in _RESERVED}
    retry_after = details.get("retry_after")
    if retry_after is not None and not _is_seconds(retry_after):
        del details["retry_after"]
    if not isinstance(details.get("param"), str | None):
        del details["param"]
    return from_info(ErrorInfo(info.code, info.message, info.fault, info.retry, details))


def _is_seconds(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def unpack_refusal(info: ErrorInfo) -> HoldfastError:
    """Restore the refusal of a whole connection; it never blames a client's request, whatever the peer says."""
    error = unpack_error(info)
    if isinstance(error, TransportFault | CapacityExhausted | WorkerDraining):
        return error
    return CannotConnect(f"the worker refused the connection: {info.message}", peer_code=info.code)
