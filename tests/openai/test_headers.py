"""Headers: what is read, what is refused with a sentence, what is ignored."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.base import limits
from holdfast.base.errors import InvalidRequest
from holdfast.openai.headers import find_header, parse_headers, request_label, valid_traceparent
from holdfast.openai.mapping import Steering
from holdfast.routing.route import route_of

TRACE = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_everything_that_is_understood() -> None:
    found = parse_headers(
        [
            (b"host", b"x"), (b"x-request-id", b" a b\x00\xff "), (b"x-holdfast-timeout-ms", b"1000"),
            (b"x-holdfast-accept-timeout-ms", b" 1 "), (b"x-holdfast-first-token-timeout-ms", b"86400000"),
            (b"x-holdfast-inter-token-timeout-ms", b"2"), (b"x-dynamo-request-priority", b"-3"),
            (b"x-dynamo-request-strict-priority", b"4"), (b"x-worker-instance-id", b"255"),
            (b"x-prefill-instance-id", b"00000000000000aa"), (b"x-data-parallel-rank", b"1"),
            (b"x-dynamo-session-id", b"s-1"), (b"traceparent", TRACE), (b"tracestate", b"a=b"),
        ]
    )  # fmt: skip
    assert found.label == "a_b__"
    assert (found.total_ms, found.accept_ms, found.first_token_ms, found.inter_token_ms) == (1000, 1, 86_400_000, 2)
    assert (found.traceparent, found.tracestate) == (TRACE.decode(), "a=b")
    assert found.steer(Steering(priority=9, expected_output_tokens=5)) == Steering(
        -3, 4, "00000000000000ff", "00000000000000aa", 1, 5, "s-1"
    )


def test_nothing_is_needed() -> None:
    found = parse_headers([(b"host", b"x"), (b"authorization", b"Bearer k")])
    assert (found.label, found.total_ms, found.traceparent) == ("", None, "")
    steering = Steering(priority=1)
    assert found.steer(steering) is steering


def test_the_first_of_a_repeated_header_counts() -> None:
    assert parse_headers([(b"x-request-id", b"a"), (b"x-request-id", b"b")]).label == "a"


def test_steering_can_be_switched_off() -> None:
    headers = [(b"x-dynamo-request-priority", b"no number"), (b"x-worker-instance-id", b"1")]
    assert parse_headers(headers, steering=False).steer(Steering()) == Steering()


@pytest.mark.parametrize(
    "name",
    ["x-holdfast-timeout-ms", "x-holdfast-accept-timeout-ms", "x-holdfast-first-token-timeout-ms",
     "x-holdfast-inter-token-timeout-ms"],
)  # fmt: skip
@pytest.mark.parametrize("value", [b"", b"0", b"-1", b"1.5", b"10s", b"86400001", b"1" * 5000, b"\xff", b"NaN", b"1_0"])
def test_wrong_deadlines_are_refused(name: str, value: bytes) -> None:
    with pytest.raises(InvalidRequest, match="an integer from 1 to 86400000") as caught:
        parse_headers([(name.encode(), value)])
    assert caught.value.param == name
    assert len(caught.value.message) < 250


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x-dynamo-request-priority", b"high"),
        ("x-dynamo-request-priority", b"2147483648"),
        ("x-dynamo-request-strict-priority", b"-1"),
        ("x-dp-rank", b"-1"),
        ("x-worker-instance-id", b""),
        ("x-worker-instance-id", b"a b"),
        ("x-dynamo-session-id", b"x" * 129),
        ("x-dynamo-session-id", b"\xc3\xa9"),
    ],
)
def test_wrong_steering_is_refused(name: str, value: bytes) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_headers([(name.encode(), value)])
    assert caught.value.param == name


@given(st.binary(max_size=2000))
def test_labels_are_short_printable_ascii(value: bytes) -> None:
    label = request_label(value)
    assert len(label) <= limits.REQUEST_LABEL_CHARS
    assert label.isascii()
    assert label == "" or label.isprintable()
    assert request_label(label.encode()) == label


@pytest.mark.parametrize(
    ("value", "valid"),
    [
        (TRACE, True),
        (b" " + TRACE + b" ", True),
        (b"cc" + TRACE[2:] + b"-what-comes-later", True),
        (TRACE + b"-x", False),
        (TRACE.upper(), False),
        (b"ff" + TRACE[2:], False),
        (b"00-" + b"0" * 32 + TRACE[35:], False),
        (TRACE[:36] + b"0" * 16 + b"-01", False),
        (TRACE[:-1], False),
        (b"", False),
        (b"x" * 10_000, False),
    ],
)
def test_traceparent_follows_w3c(value: bytes, valid: bool) -> None:
    assert valid_traceparent(value) == (value.decode().strip() if valid else "")
    assert parse_headers([(b"traceparent", value)]).traceparent == valid_traceparent(value)


def test_find_header() -> None:
    assert find_header([(b"a", b"1"), (b"authorization", b"2")], b"authorization") == b"2"
    assert find_header([], b"authorization") is None


def test_a_tracestate_in_parts_is_one() -> None:
    parts = [(b"tracestate", b"a=1"), (b"tracestate", b" b=2,c=3 ")]
    assert parse_headers(parts).tracestate == "a=1,b=2,c=3"
    assert parse_headers([(b"tracestate", b"a=1"), (b"tracestate", b"b=" + b"x" * 509)]).tracestate == "a=1"
    assert parse_headers([(b"tracestate", b""), (b"tracestate", b"b=2")]).tracestate == "b=2"


def test_a_policy_class_is_a_wish_like_the_others() -> None:
    raw = [(b"x-dynamo-meta-policy-class", b"interactive")]
    assert parse_headers(raw).steer(Steering()).policy_class == "interactive"
    assert parse_headers(raw, steering=False).steer(Steering()).policy_class is None
    assert route_of(None, None, None, {}, policy_class="interactive").policy_class == "interactive"
