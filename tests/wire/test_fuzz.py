"""Whatever bytes come, nothing but a typed error comes out, nothing hangs, and little is kept."""

import random
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.base.errors import HoldfastError, ProtocolViolation
from holdfast.base.limits import FRAME_BYTES
from holdfast.wire.caller import CallerConnection
from holdfast.wire.codec import encode
from holdfast.wire.columns import encode_items
from holdfast.wire.frames import (
    VERSION,
    Accept,
    Credit,
    Data,
    Draining,
    End,
    Kill,
    Load,
    Open,
    OpenHeaders,
    Part,
    Ping,
    Pong,
    Progress,
    Stop,
    Welcome,
)
from holdfast.wire.worker import Joined, WorkerConnection
from tests.wire.pairs import Sink, hello

Receive = Callable[[bytes], object]


def caller(opened: int = 3, newer: bool = False) -> CallerConnection:
    core = CallerConnection(hello())
    core.receive(bytes(encode(Welcome(VERSION, "w1", 77, (), b"", VERSION + newer))))
    for _ in range(opened):
        core.open("generate", OpenHeaders(), b"", Sink())
    core.ping()
    return core


def worker() -> WorkerConnection:
    core = WorkerConnection("w1", 77, lambda *_: None)
    assert isinstance(core.receive(bytes(encode(hello(channel="bulk"))))[0], Joined)
    core.join()
    return core


FROM_WORKER = b"".join(
    [
        *(bytes(encode(Accept(n))) for n in (1, 2, 3)),
        *(bytes(p) for p in encode_items([(1, 0, [5], None), (2, 0, [6, 7], [(-1.0, [(1, -2.0)]), (-2.0, [])])])),
        bytes(encode(Data(3, 0, b"abc", True))),
        bytes(encode(Pong(1, Progress(), Load()))),
        bytes(encode(End(1, "stop"))),
        bytes(encode(Draining())),
    ]
)
FROM_CALLER = b"".join(
    bytes(encode(frame))
    for frame in (
        Open(1, "generate", OpenHeaders(request_id="abc", remaining_ms=5), b"payload"),
        Part(1, 5, b"abc"),
        Open(2, "other", OpenHeaders(), b"", 1, 50),
        Credit(1, 7),
        Stop(2),
        Kill(1),
        Ping(1),
    )
)


def feed(core: CallerConnection | WorkerConnection, data: bytes, rng: random.Random) -> None:
    """Feed in random pieces until a violation; anything but a `ProtocolViolation` fails the test."""
    while data:
        size = rng.randint(1, len(data))
        try:
            core.receive(data[:size])
        except ProtocolViolation:
            return
        except HoldfastError as error:
            assert error.fault in ("transport", "capacity", "worker")  # noqa: PT017
            return
        data = data[size:]
    assert core._splitter.unfinished <= FRAME_BYTES + 4


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=400), st.integers(0, 2**32))
def test_random_bytes(data: bytes, seed: int) -> None:
    rng = random.Random(seed)
    feed(caller(), data, rng)
    feed(worker(), data, rng)
    feed(CallerConnection(hello(), b"s"), data, rng)
    feed(WorkerConnection("w1", 7, lambda *_: None, secret=b"s", nonce=b"n" * 16), data, rng)


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.binary(max_size=40)
    | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.lists(plain, max_size=7)), max_size=4), st.integers(0, 2**32))
def test_wellformed_msgpack_that_is_no_frame(frames: list[tuple[int, list[object]]], seed: int) -> None:
    rng = random.Random(seed)
    data = b""
    for tag, fields in frames:
        payload = msgspec.msgpack.encode([tag, *fields])
        data += len(payload).to_bytes(4, "little") + payload
    for core in (caller(), worker(), caller(newer=True)):
        feed(core, data, rng)


@pytest.mark.parametrize("seed", range(400))
def test_valid_transcripts_with_flipped_cut_and_doubled_bytes(seed: int) -> None:
    rng = random.Random(seed)
    for core, transcript in ((caller(), FROM_WORKER), (worker(), FROM_CALLER)):
        data = bytearray(transcript)
        for _ in range(rng.randint(0, 4)):
            at = rng.randrange(len(data))
            kind = rng.randrange(4)
            if kind == 0:
                data[at] ^= 1 << rng.randrange(8)
            elif kind == 1:
                data[at] = rng.randrange(256)
            elif kind == 2:
                del data[at : at + rng.randint(1, 6)]
            else:
                data[at:at] = data[at : at + rng.randint(1, 60)]
        feed(core, bytes(data), rng)


def test_deep_nesting_is_a_violation_and_no_crash() -> None:
    payload = b"\x91" * 60_000
    for core in (caller(), worker(), caller(newer=True)):
        with pytest.raises(ProtocolViolation):
            core.receive(len(payload).to_bytes(4, "little") + payload)


def test_the_unbroken_transcripts_are_legal() -> None:
    caller().receive(FROM_WORKER)
    worker().receive(FROM_CALLER)
