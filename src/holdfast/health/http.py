"""The little of HTTP/1.1 that the status server speaks: one request per connection, no transfer codings.

Bytes in, a request or a refusal out; must never touch a socket.
"""

from __future__ import annotations

import msgspec

HEAD_BYTES = 8 * 1024
BODY_BYTES = 64 * 1024
JSON = "application/json"
_REASONS = {
    200: "OK",
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    413: "Content Too Large",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    501: "Not Implemented",
    503: "Service Unavailable",
    504: "Gateway Timeout",
}
_END = b"\r\n\r\n"
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"})


class HttpRequest(msgspec.Struct, frozen=True):
    """One request, its body complete. Header names are lower case."""

    method: str
    path: str
    """Without the query."""
    headers: dict[str, str]
    body: bytes = b""
    loopback: bool = True
    """Whether it comes from this machine to an address that only this machine can reach."""


class Answer(msgspec.Struct, frozen=True):
    """One answer."""

    status: int
    body: bytes
    content_type: str = JSON
    headers: tuple[tuple[str, str], ...] = ()


class Refused(Exception):
    """What came cannot be answered in earnest; ``answer`` says why."""

    def __init__(self, answer: Answer):
        super().__init__(answer.status)
        self.answer = answer


def message(status: int, text: str, *, code: str = "") -> Answer:
    """Return an answer that says what is wrong, in the form of the API's errors."""
    error = {"message": text, "type": "invalid_request_error" if status < 500 else "internal_error", "code": code}
    return Answer(status, msgspec.json.encode({"error": {**error, "code": code or str(status)}}))


def parse(data: bytes | bytearray, *, loopback: bool) -> HttpRequest | None:
    """Return the request in ``data``, or None while it is incomplete.

    Raises:
        Refused: it is no request that will ever be answered.
    """
    end = data.find(_END)
    if end > HEAD_BYTES or (end < 0 and len(data) > HEAD_BYTES):
        raise Refused(message(431, f"The request head is over {HEAD_BYTES} bytes."))
    if end < 0:
        return None
    first, *lines = bytes(data[:end]).decode("latin-1").split("\r\n")
    words = first.split(" ")
    if len(words) != 3 or not words[2].startswith("HTTP/1.") or not words[1].startswith("/"):
        raise Refused(message(400, "This is not an HTTP/1.1 request."))
    if words[0] not in _METHODS:
        raise Refused(message(501, "There is no such method here."))
    headers = _headers(lines)
    length = _length(headers)
    body = bytes(data[end + len(_END) : end + len(_END) + length])
    if len(body) < length:
        return None
    return HttpRequest(words[0], words[1].partition("?")[0], headers, body, loopback)


def _headers(lines: list[str]) -> dict[str, str]:
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        key = name.lower()
        if not colon or not name or name != name.strip():
            raise Refused(message(400, "A header line is malformed."))
        if key in ("content-length", "host", "authorization") and key in headers:
            raise Refused(message(400, f"The header {key} is there twice."))
        headers[key] = value.strip()
    return headers


def _length(headers: dict[str, str]) -> int:
    if "transfer-encoding" in headers:
        raise Refused(message(501, "Transfer codings are not supported; send content-length."))
    text = headers.get("content-length", "0")
    if not (text.isascii() and text.isdigit()):
        raise Refused(message(400, "content-length is not a number."))
    if len(text) > 9 or int(text) > BODY_BYTES:
        raise Refused(message(413, f"The body is over {BODY_BYTES} bytes."))
    return int(text)


def render(answer: Answer, *, with_body: bool = True) -> bytes:
    """Return an answer's bytes; the connection ends with it."""
    lines = [
        f"HTTP/1.1 {answer.status} {_REASONS.get(answer.status, 'Status')}",
        f"content-type: {answer.content_type}",
        f"content-length: {len(answer.body)}",
        "cache-control: no-store",
        "connection: close",
        *(f"{name}: {value}" for name, value in answer.headers),
    ]
    return "\r\n".join(lines).encode("latin-1") + _END + (answer.body if with_body else b"")
