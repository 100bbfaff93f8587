"""Error answers carry what clients and proxies act on."""

import json

import msgspec
import pytest

from holdfast.base.errors import CapacityExhausted, HoldfastError, InvalidRequest, PoisonRequest, Unauthenticated
from holdfast.openai.errors import annotation_event, error_event, error_response
from holdfast.openai.responses import ErrorBody

ERRORS: list[HoldfastError] = [
    InvalidRequest("Bad.", param="n"),
    CapacityExhausted("Full.", retry_after=0.2, knob="K", threshold=0.9, actual=float("inf"), odd=object()),
    PoisonRequest("No."),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: e.code)
def test_body_is_the_documented_one(error: HoldfastError) -> None:
    response = error_response(error)
    body = msgspec.json.decode(response.body, type=ErrorBody)
    assert (body.error.code, body.error.param, body.error.type) == (error.code, error.param, error.openai_type)
    assert dict(response.headers)[b"content-length"] == str(len(response.body)).encode()
    event = error_event(error)
    assert event.count(b"\n") == 2
    assert json.loads(event[6:]) == json.loads(response.body)


def test_headers_say_when_and_whether_to_repeat() -> None:
    full = dict(error_response(ERRORS[1], "id-1").headers)
    assert (full[b"retry-after"], full[b"x-request-id"]) == (b"1", b"id-1")
    assert b"x-should-retry" not in full
    poison = dict(error_response(ERRORS[2]).headers)
    assert poison[b"x-should-retry"] == b"false"
    assert b"retry-after" not in poison
    assert dict(error_response(CapacityExhausted("x", retry_after=2.1)).headers)[b"retry-after"] == b"3"
    assert dict(error_response(Unauthenticated("x")).headers)[b"www-authenticate"] == b"Bearer"


def test_annotation_is_an_event_with_a_comment() -> None:
    assert annotation_event("token_ids", [1, 2]) == b"event: token_ids\n: [1,2]\n\n"
