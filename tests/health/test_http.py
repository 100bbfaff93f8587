"""The status server's HTTP: what is a request, what is refused, and how."""

from __future__ import annotations

import json

import pytest

from holdfast.health.http import BODY_BYTES, HEAD_BYTES, Answer, Refused, message, parse, render


def test_a_request_in_any_pieces() -> None:
    whole = b'POST /engine/x?y=1 HTTP/1.1\r\nHost: a\r\nContent-Length: 7\r\n\r\n{"a":1}'
    for cut in range(len(whole)):
        assert parse(whole[:cut], loopback=True) is None
    request = parse(whole, loopback=True)
    assert request is not None
    assert (request.method, request.path, request.headers["host"], request.body) == (
        "POST",
        "/engine/x",
        "a",
        b'{"a":1}',
    )


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET / HTTP/1.1\r\n" + b"x" * HEAD_BYTES, 431),
        (b"GET / HTTP/1.1\r\na: " + b"x" * HEAD_BYTES + b"\r\n\r\n", 431),
        (b"hello\r\n\r\n", 400),
        (b"GET / HTTP/2\r\n\r\n", 400),
        (b"GET http://x/ HTTP/1.1\r\n\r\n", 400),
        (b"BREW / HTTP/1.1\r\n\r\n", 501),
        (b"GET / HTTP/1.1\r\nno colon\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nname : x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\ncontent-length: -1\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\ncontent-length: 1x\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\ncontent-length: %d\r\n\r\n" % (BODY_BYTES + 1), 413),
        (b"POST / HTTP/1.1\r\ncontent-length: " + b"9" * 5000 + b"\r\n\r\n", 413),
        (b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n", 501),
    ],
)
def test_what_is_no_request_is_refused(data: bytes, status: int) -> None:
    with pytest.raises(Refused) as refused:
        parse(data, loopback=True)
    assert refused.value.answer.status == status
    assert json.loads(refused.value.answer.body)["error"]["message"]


def test_answers() -> None:
    assert render(Answer(200, b"{}")).startswith(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n")
    assert render(Answer(200, b"{}")).endswith(
        b"content-length: 2\r\ncache-control: no-store\r\nconnection: close\r\n\r\n{}"
    )
    assert render(Answer(200, b"{}"), with_body=False).endswith(b"\r\n\r\n")
    assert b"418 Status" in render(message(418, "x"))
