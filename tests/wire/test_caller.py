"""The caller's end: which frame is legal when, what reaches the sinks, and what is contained."""

import logging
from typing import Any

import pytest

from holdfast.base import limits
from holdfast.base.errors import (
    CapacityExhausted,
    Disconnected,
    ErrorInfo,
    InternalError,
    PayloadTooLarge,
    ProtocolViolation,
    StreamIncomplete,
    WorkerDraining,
)
from holdfast.wire import caller as caller_module
from holdfast.wire.caller import LEGAL, CallerConnection
from holdfast.wire.caller_stream import STREAM_LEGAL
from holdfast.wire.codec import encode
from holdfast.wire.columns import encode_items
from holdfast.wire.frames import (
    VERSION,
    Accept,
    Challenge,
    Data,
    Draining,
    End,
    Items,
    Kill,
    Load,
    OpenHeaders,
    Pong,
    Progress,
    Refuse,
    Welcome,
    WorkerFrame,
)
from tests.wire.pairs import Sink, hello, joined

HEADERS = OpenHeaders()


def items(*entries: tuple[int, int, list[int]]) -> bytes:
    return b"".join(bytes(p) for p in encode_items([(s, i, t, None) for s, i, t in entries]))


def ready() -> CallerConnection:
    core = CallerConnection(hello())
    core.receive(bytes(encode(Welcome(VERSION, "w1", 77))))
    core.outbox.take()
    return core


def streaming(first_index: int | None = None, sink: Sink | None = None) -> tuple[CallerConnection, Any, Sink]:
    core, sink = ready(), sink or Sink()
    stream = core.open("generate", HEADERS, b"", sink, first_index=first_index)
    core.receive(bytes(encode(Accept(stream.id))))
    core.outbox.take()
    return core, stream, sink


FRAMES: list[WorkerFrame] = [
    Challenge(b"n" * 16),
    Welcome(VERSION, "w1", 77),
    Accept(1),
    Refuse(1, ErrorInfo("worker_saturated", "full")),
    Items(b"\1\0\0\0", b"\0\0\0\0", b"", b"\5\0\0\0"),
    Data(1, 0, b"x"),
    End(1, "stop"),
    Draining(),
    Pong(0, Progress(), Load()),
]


@pytest.mark.parametrize("frame", FRAMES, ids=lambda f: type(f).__name__)
@pytest.mark.parametrize("state", ["greeting", "ready", "draining", "closed"])
def test_a_frame_that_the_connection_state_forbids_is_named(state: str, frame: WorkerFrame) -> None:
    core = CallerConnection(hello())
    if state != "greeting":
        core, _, _ = streaming() if type(frame) in STREAM_LEGAL["streaming"] else (ready(), None, None)
        if not core.streams:
            core.open("generate", HEADERS, b"", Sink())
    if state == "draining":
        core.receive(bytes(encode(Draining())))
    if state == "closed":
        core.fail(Disconnected("gone"))
    if type(frame) in LEGAL[core.state]:
        if state != "greeting" or isinstance(frame, Welcome):
            core.receive(bytes(encode(frame)))
    else:
        with pytest.raises(ProtocolViolation) as caught:
            core.receive(bytes(encode(frame)))
        assert caught.value.details["frame"] == type(frame).__name__.lower()
        assert state in caught.value.details["state"]


@pytest.mark.parametrize("frame", FRAMES[2:7], ids=lambda f: type(f).__name__)
@pytest.mark.parametrize("state", ["opening", "streaming"])
def test_a_frame_that_the_stream_state_forbids_is_named(state: str, frame: WorkerFrame) -> None:
    core, sink = ready(), Sink()
    core.open("generate", HEADERS, b"", sink)
    if state == "streaming":
        core.receive(bytes(encode(Accept(1))))
    if type(frame) in STREAM_LEGAL[state]:  # type: ignore[index]
        core.receive(bytes(encode(frame)))
    else:
        with pytest.raises(ProtocolViolation, match=state):
            core.receive(bytes(encode(frame)))


@pytest.mark.parametrize("frame", FRAMES[2:7], ids=lambda f: type(f).__name__)
def test_streams_that_were_never_opened_are_a_violation_and_closed_ones_are_late(frame: WorkerFrame) -> None:
    with pytest.raises(ProtocolViolation, match="never opened"):
        ready().receive(bytes(encode(frame)))
    core, stream, sink = streaming()
    stream.kill()
    core.receive(bytes(encode(frame)))
    assert core.late_frames == 1
    assert sink.names == ["accept"]


def test_ids_rise_and_are_never_used_again() -> None:
    core = ready()
    ids = []
    for _ in range(5):
        stream = core.open("generate", HEADERS, b"", Sink())
        ids.append(stream.id)
        stream.kill()
    assert ids == [1, 2, 3, 4, 5]


def test_overlaps_are_dropped_token_by_token() -> None:
    core, _, sink = streaming(first_index=10)
    core.receive(items((1, 10, [1, 2, 3])) + items((1, 11, [2, 3])) + items((1, 12, [3, 4, 5])) + items((1, 10, [1])))
    assert sink.tokens == [1, 2, 3, 4, 5]
    assert sink.calls[1:] == [("tokens", 10, [1, 2, 3]), ("tokens", 13, [4, 5])]


def test_log_probabilities_are_cut_like_their_tokens() -> None:
    core, _, sink = streaming(first_index=0)
    chances = [(-0.5, [(1, -0.5)]), (-0.25, [(2, -0.25)])]
    for index in (0, 1):
        core.receive(bytes(encode_items([(1, index, [index + 1, index + 2], chances)])[0]))
    assert sink.tokens == [1, 2, 3]
    assert sink.logprobs == [chances[0], chances[1], chances[1]]


@pytest.mark.parametrize("first_index", [0, 7])
def test_a_gap_breaks_only_that_stream(first_index: int) -> None:
    core, _, sink = streaming(first_index=first_index)
    other = Sink()
    core.open("generate", HEADERS, b"", other)
    core.outbox.take()
    core.receive(bytes(encode(Accept(2))) + items((1, first_index + 1, [5]), (2, 0, [6])))
    assert isinstance(sink.error, StreamIncomplete)
    assert sink.tokens == []
    assert other.tokens == [6]
    assert bytes(core.outbox.take()) == bytes(encode(Kill(1, "broken")))


def test_without_a_first_index_the_first_token_sets_it() -> None:
    core, _, sink = streaming()
    core.receive(items((1, 41, [1])) + items((1, 42, [2])))
    assert sink.tokens == [1, 2]
    core.receive(items((1, 44, [4])))
    assert isinstance(sink.error, StreamIncomplete)


def test_what_one_sink_raises_never_reaches_another(caplog: pytest.LogCaptureFixture) -> None:
    core = ready()
    sinks = [Sink(), Sink(raising=["tokens"]), Sink()]
    for sink in sinks:
        core.open("generate", HEADERS, b"", sink)
    core.receive(b"".join(bytes(encode(Accept(n))) for n in (1, 2, 3)))
    core.outbox.take()
    with caplog.at_level(logging.ERROR):
        core.receive(items((1, 0, [1]), (2, 0, [2]), (3, 0, [3])) + items((1, 1, [4]), (2, 1, [5]), (3, 1, [6])))
    assert [sink.tokens for sink in sinks] == [[1, 4], [], [3, 6]]
    assert isinstance(sinks[1].error, InternalError)
    assert sinks[1].names == ["accept", "tokens", "broken"]
    assert bytes(core.outbox.take()) == bytes(encode(Kill(2, "broken")))
    assert "stream 2" in caplog.text


@pytest.mark.parametrize("callback", ["accept", "data", "end:stop", "refuse", "broken"])
def test_raising_anywhere_is_contained(callback: str) -> None:
    core, sink = ready(), Sink(raising=[callback])
    core.open("generate", HEADERS, b"", sink)
    if callback == "refuse":
        core.receive(bytes(encode(Refuse(1, ErrorInfo("worker_saturated", "full")))))
    else:
        core.receive(bytes(encode(Accept(1))))
        if callback == "data":
            core.receive(bytes(encode(Data(1, 0, b"x"))))
        elif callback == "end:stop":
            core.receive(bytes(encode(End(1, "stop"))))
        elif callback == "broken":
            core.fail(Disconnected("gone"))
    assert core.streams == []


def test_fragments_make_one_message_and_gaps_break() -> None:
    core, _, sink = streaming()
    for frame in (Data(1, 0, b"ab", True), Data(1, 0, b"cd"), Data(1, 0, b"again"), Data(1, 1, b"e")):
        core.receive(bytes(encode(frame)))
    assert sink.messages == [b"abcd", b"e"]
    core.receive(bytes(encode(Data(1, 3, b"x"))))
    assert isinstance(sink.error, StreamIncomplete)


def test_a_message_in_fragments_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("holdfast.wire.caller_stream.PAYLOAD_BYTES", 10)
    core, _, sink = streaming()
    core.receive(bytes(encode(Data(1, 0, b"123456", True))) * 2)
    assert isinstance(sink.error, StreamIncomplete)
    assert sink.error.details["limit"] == "PAYLOAD_BYTES"


def test_after_draining_nothing_can_be_opened_and_an_accept_is_a_violation() -> None:
    core, _, sink = streaming()
    core.open("generate", HEADERS, b"", Sink())
    events = core.receive(bytes(encode(Draining("rollout", 5000))))
    assert events == [Draining("rollout", 5000)]
    with pytest.raises(WorkerDraining):
        core.open("generate", HEADERS, b"", Sink())
    core.receive(items((1, 0, [1])) + bytes(encode(End(1, "stop", None, 3))))
    assert (sink.final, sink.cached_tokens) == ("end:stop", 3)
    with pytest.raises(ProtocolViolation):
        core.receive(bytes(encode(Accept(2))))


def test_stop_and_kill_are_idempotent_and_harmless_after_the_end() -> None:
    core, stream, sink = streaming()
    stream.stop()
    stream.stop()
    once = bytes(core.outbox.take())
    core.receive(bytes(encode(End(1, "cancelled"))))
    stream.stop()
    stream.kill()
    stream.credit(5)
    assert not core.outbox
    assert once.count(b"cancelled") == 1
    assert sink.final == "end:cancelled"


def test_abandon_breaks_all_streams_and_keeps_the_connection() -> None:
    core, _, sink = streaming()
    core.abandon(Disconnected("suspect"))
    assert sink.final == "broken"
    assert bytes(core.outbox.take()) == bytes(encode(Kill(1, "abandoned")))
    core.receive(items((1, 0, [1])))
    assert core.late_frames == 1
    assert core.open("generate", HEADERS, b"", Sink()).id == 2


def test_fail_breaks_every_stream_once() -> None:
    core, _, sink = streaming()
    core.fail(Disconnected("gone"))
    core.fail(Disconnected("gone again"))
    assert sink.names == ["accept", "broken"]
    with pytest.raises(Disconnected):
        core.open("generate", HEADERS, b"", Sink())


def test_limits_are_typed_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    core = ready()
    with pytest.raises(PayloadTooLarge):
        core.open("generate", HEADERS, b"x" * limits.FRAME_BYTES, Sink())
    monkeypatch.setattr(caller_module, "STREAMS_PER_CONNECTION", 2)
    for _ in range(2):
        core.open("generate", HEADERS, b"", Sink())
    with pytest.raises(CapacityExhausted) as caught:
        core.open("generate", HEADERS, b"", Sink())
    assert caught.value.details["limit"] == "STREAMS_PER_CONNECTION"
    assert [stream.id for stream in core.streams] == [1, 2]


@pytest.mark.parametrize(
    "frame",
    [
        Items(b"\1\0\0", b"\0\0\0\0", b"", b"\0\0\0\0"),
        Items(b"\1\0\0\0", b"\0\0\0\0", b"", b""),
        Items(b"\1\0\0\0", b"", b"", b"\0\0\0\0"),
        Items(b"\1\0\0\0", b"\0\0\0\0", b"\2\0\0\0", b"\0\0\0\0"),
        Items(b"\1\0\0\0", b"\0\0\0\0", b"\1\0\0\0\1\0\0\0", b"\0\0\0\0"),
        Items(b"\1\0\0\0", b"\0\0\0\0", b"", b"\0\0\0\0", ((1, []),)),
        Items(b"\1\0\0\0", b"\0\0\0\0", b"", b"\0\0\0\0", ((0, []),)),
    ],
)
def test_columns_that_do_not_fit_each_other_are_a_violation(frame: Items) -> None:
    core, _, _ = streaming()
    with pytest.raises(ProtocolViolation):
        core.receive(bytes(encode(frame)))


def test_a_pong_for_a_ping_that_was_not_sent_is_a_violation() -> None:
    pair = joined()
    assert pair.caller.ping() == 1
    pair.caller.receive(bytes(encode(Pong(1, Progress(), Load()))))
    with pytest.raises(ProtocolViolation):
        pair.caller.receive(bytes(encode(Pong(2, Progress(), Load()))))


def test_a_sink_may_open_and_kill_streams_while_it_is_called() -> None:
    core = ready()
    second = Sink()

    class Restless(Sink):
        def on_tokens(self, index: int, tokens: Any, logprobs: Any) -> None:
            super().on_tokens(index, tokens, logprobs)
            stream.kill()
            core.open("generate", HEADERS, b"", second)

    sink = Restless()
    stream = core.open("generate", HEADERS, b"", sink)
    core.receive(bytes(encode(Accept(1))) + items((1, 0, [1]), (1, 1, [2])) + bytes(encode(Accept(2))))
    assert sink.tokens == [1]
    assert second.names == ["accept"]


def test_an_end_that_counts_other_tokens_than_came_breaks_the_stream() -> None:
    core = ready()
    sink = Sink()
    core.open("generate", HEADERS, b"", sink, first_index=5)
    core.receive(
        bytes(encode(Accept(1))) + items((1, 5, [7])) + items((1, 5, [8])) + bytes(encode(End(1, "stop", None, 0, 2)))
    )
    assert isinstance(sink.error, StreamIncomplete)
    assert (sink.tokens, sink.error.details["sent"], sink.error.details["received"]) == ([7], 2, 1)


@pytest.mark.parametrize("end", [End(1, "stop", None, 0, 1), End(1, "stop"), End(1, "cancelled", None, 0, 3)])
def test_an_end_with_the_right_count_or_none_or_after_a_stop_is_an_end(end: End) -> None:
    core = ready()
    sink = Sink()
    core.open("generate", HEADERS, b"", sink, first_index=5)
    core.receive(bytes(encode(Accept(1))) + items((1, 5, [7])) + bytes(encode(end)))
    assert sink.final == f"end:{end.finish}"
