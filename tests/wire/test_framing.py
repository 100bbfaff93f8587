"""Whatever way the network splits the bytes, the same frames come out, at a linear cost."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.base.errors import ProtocolViolation
from holdfast.base.limits import FRAME_BYTES
from holdfast.wire.framing import FrameSplitter


def framed(*payloads: bytes) -> bytes:
    return b"".join(len(p).to_bytes(4, "little") + p for p in payloads)


def fed(splitter: FrameSplitter, data: bytes) -> list[bytes]:
    return [bytes(view) for view in splitter.feed(data)]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.binary(min_size=1, max_size=300), max_size=8),
    st.lists(st.integers(min_value=1, max_value=50), min_size=1, max_size=20),
)
def test_any_split_gives_the_same_frames(payloads: list[bytes], sizes: list[int]) -> None:
    data, splitter, out, turn = framed(*payloads), FrameSplitter(), [], 0
    while data:
        size = sizes[turn % len(sizes)]
        out += fed(splitter, data[:size])
        data, turn = data[size:], turn + 1
    assert out == payloads
    assert splitter.unfinished == 0


def test_byte_by_byte_the_largest_frame_is_not_copied_over_and_over() -> None:
    payload = random.Random(1).randbytes(FRAME_BYTES)
    splitter, out = FrameSplitter(), []
    for byte in framed(payload):
        out += fed(splitter, bytes([byte]))
    assert out == [payload]


@pytest.mark.parametrize("length", [0, FRAME_BYTES + 1, 2**32 - 1])
def test_a_forbidden_length_names_limit_and_value_after_the_frames_before_it(length: int) -> None:
    splitter, seen = FrameSplitter(), []
    with pytest.raises(ProtocolViolation, match=str(length)) as caught:
        seen.extend(bytes(view) for view in splitter.feed(framed(b"good") + length.to_bytes(4, "little") + b"x"))
    assert seen == [b"good"]
    assert caught.value.details == {"limit": "FRAME_BYTES", "threshold": FRAME_BYTES, "actual": length}


def test_no_more_than_one_unfinished_frame_is_kept() -> None:
    splitter = FrameSplitter()
    assert fed(splitter, framed(b"a" * 1000) * 50 + framed(b"b" * 1000)[:500]) == [b"a" * 1000] * 50
    assert splitter.unfinished == 500
