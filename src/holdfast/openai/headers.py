"""What a client says in HTTP headers: a label, deadlines, priority and placement, a trace to join.

A header that is understood and wrong is refused with a sentence, because a deadline that silently does not
hold is worse than an error. The one exception is ``traceparent``: W3C Trace Context (section 4.3) demands that an
invalid one is ignored and a new trace begun. Must never keep credentials (see `keys`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import msgspec

from holdfast.base import limits
from holdfast.base.errors import InvalidRequest
from holdfast.openai.mapping import Steering

RawHeaders = Sequence[tuple[bytes, bytes]]
"""As ASGI gives them: lower-case names."""

LONGEST_TIMEOUT_MS = 24 * 60 * 60 * 1000
"""One day; a longer deadline is most likely a mistake of unit."""

_TRACEPARENT = re.compile(r"^([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?$")
_IDENTIFIER = re.compile(rb"^[!-~]{1,%d}$" % limits.REQUEST_LABEL_CHARS)
_INTEGER = re.compile(rb"^[+-]?[0-9]{1,20}$")


class RequestHeaders(msgspec.Struct):
    """What was found. Times are milliseconds; None: not given. Priorities and pins: as in `Steering`."""

    label: str = ""
    """The client's ``x-request-id``: printable ASCII, cut to `limits.REQUEST_LABEL_CHARS`; possibly repeated."""
    total_ms: int | None = None
    accept_ms: int | None = None
    first_token_ms: int | None = None
    inter_token_ms: int | None = None
    priority: int | None = None
    strict_priority: int | None = None
    worker: str | None = None
    prefill_worker: str | None = None
    dp_rank: int | None = None
    session_id: str | None = None
    policy_class: str | None = None
    traceparent: str = ""
    """Valid by W3C Trace Context, or empty."""
    tracestate: str = ""

    def steer(self, steering: Steering) -> Steering:
        """Return the body's wishes overruled by the headers' ones."""
        if self is NO_HEADERS:
            return steering
        wishes = {name: value for name in _WISHES if (value := getattr(self, name)) is not None}
        return msgspec.structs.replace(steering, **wishes) if wishes else steering


NO_HEADERS = RequestHeaders()
"""What `parse_headers` returns, the same one every time, when a request brings none of them."""


def parse_headers(headers: RawHeaders, *, steering: bool = True) -> RequestHeaders:
    """Read the headers that Holdfast understands; all others are skipped. The first of a repeated header counts;
    a ``tracestate`` may come in parts.

    Args:
        headers: of one HTTP request.
        steering: False skips priority and placement (a fleet that does not trust its clients with them).

    Raises:
        InvalidRequest: a value that is not what the header takes; ``param`` is the header's name.
    """
    if _READERS.keys().isdisjoint([name for name, _ in headers]):
        return NO_HEADERS
    found: RequestHeaders | None = None
    seen: set[bytes] = set()
    for name, value in headers:
        reader = _READERS.get(name)
        if reader is None or (not steering and name in _STEERING):
            continue
        if found is None:
            found = RequestHeaders()
            seen.add(name)
        elif name in seen:
            if name == b"tracestate":
                found.tracestate = _joined(found.tracestate, reader[1](name, value))
            continue
        else:
            seen.add(name)
        field, read = reader
        setattr(found, field, read(name, value))
    return NO_HEADERS if found is None else found


def find_header(headers: RawHeaders, name: bytes) -> bytes | None:
    """Return the first value of a header, by its lower-case name."""
    for key, value in headers:
        if key == name:
            return value
    return None


def request_label(value: bytes) -> str:
    """Return an ``x-request-id`` as it may appear in logs and be sent back: printable ASCII of bounded length."""
    text = value[: limits.REQUEST_LABEL_CHARS * 4].decode("ascii", "replace")
    return "".join(c if " " < c <= "~" else "_" for c in text.strip())[: limits.REQUEST_LABEL_CHARS]


def valid_traceparent(value: bytes) -> str:
    """Return a valid W3C ``traceparent``, or an empty string.

    Version ff, an all-zero trace or parent id, upper-case digits, and trailing parts in version 00 are invalid.
    """
    if len(value) > 512:
        return ""
    text = value.decode("latin-1").strip()
    found = _TRACEPARENT.match(text)
    if found is None:
        return ""
    version, trace, parent, _, rest = found.groups()
    if version == "ff" or (version == "00" and rest) or not int(trace, 16) or not int(parent, 16):
        return ""
    return text


def _label(_name: bytes, value: bytes) -> str:
    return request_label(value)


def _trace(_name: bytes, value: bytes) -> str:
    return valid_traceparent(value)


def _state(_name: bytes, value: bytes) -> str:
    """Return a ``tracestate`` of the length that W3C asks to pass on; a longer one is dropped."""
    return value.decode("latin-1").strip() if len(value) <= limits.TRACESTATE_CHARS and value.isascii() else ""


def _joined(state: str, more: object) -> str:
    """Return two parts of a ``tracestate`` as one (W3C Trace Context, 3.3.1); what would be too long is dropped."""
    both = f"{state},{more}" if state and more else state or str(more)
    return both if len(both) <= limits.TRACESTATE_CHARS else state


def _shown(value: bytes) -> str:
    return f"'{request_label(value)[:40]}'"


def _integer(least: int, most: int, what: str) -> Callable[[bytes, bytes], int]:
    def read(name: bytes, value: bytes) -> int:
        stripped = value.strip()
        number = int(stripped) if _INTEGER.match(stripped) else None
        if number is None or not least <= number <= most:
            header = name.decode("ascii")
            raise InvalidRequest(
                f"Header '{header}' must be {what}: an integer from {least} to {most}, not {_shown(value)}.",
                param=header,
            )
        return number

    return read


def _identifier(name: bytes, value: bytes) -> str:
    stripped = value.strip()
    if not _IDENTIFIER.match(stripped):
        header = name.decode("ascii")
        raise InvalidRequest(
            f"Header '{header}' must be 1 to {limits.REQUEST_LABEL_CHARS} printable ASCII characters without spaces.",
            param=header,
        )
    return stripped.decode("ascii")


def _instance(name: bytes, value: bytes) -> str:
    """Return an instance id; decimal numbers (as Dynamo writes them) become hexadecimal.

    What already has 16 characters is taken as hexadecimal.
    """
    text = _identifier(name, value)
    return f"{int(text):016x}" if text.isdecimal() and len(text) != 16 else text


_MILLISECONDS = _integer(1, LONGEST_TIMEOUT_MS, "a time in milliseconds")
_RANK = _integer(0, 2**16, "a data-parallel rank")
_STEERING: dict[bytes, tuple[str, Callable[[bytes, bytes], object]]] = {
    b"x-dynamo-request-priority": ("priority", _integer(-(2**31), 2**31 - 1, "a priority (higher goes first)")),
    b"x-dynamo-request-strict-priority": ("strict_priority", _integer(0, 2**32 - 1, "a strict priority")),
    b"x-worker-instance-id": ("worker", _instance),
    b"x-prefill-instance-id": ("prefill_worker", _instance),
    b"x-dp-rank": ("dp_rank", _RANK),
    b"x-data-parallel-rank": ("dp_rank", _RANK),
    b"x-dynamo-session-id": ("session_id", _identifier),
    b"x-dynamo-meta-policy-class": ("policy_class", _identifier),
}
_WISHES = tuple(dict.fromkeys(name for name, _ in _STEERING.values()))
_READERS: dict[bytes, tuple[str, Callable[[bytes, bytes], object]]] = {
    b"x-request-id": ("label", _label),
    b"x-holdfast-timeout-ms": ("total_ms", _MILLISECONDS),
    b"x-holdfast-accept-timeout-ms": ("accept_ms", _MILLISECONDS),
    b"x-holdfast-first-token-timeout-ms": ("first_token_ms", _MILLISECONDS),
    b"x-holdfast-inter-token-timeout-ms": ("inter_token_ms", _MILLISECONDS),
    b"traceparent": ("traceparent", _trace),
    b"tracestate": ("tracestate", _state),
    **_STEERING,
}
