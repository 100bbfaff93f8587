"""The worker's end: credit, stops, drains and limits, and which frame is legal when."""

from typing import Any

import msgspec
import pytest

from holdfast.base import limits
from holdfast.base.errors import (
    Cancelled,
    CapacityExhausted,
    EngineFailed,
    HoldfastError,
    InternalError,
    InvalidRequest,
    PayloadTooLarge,
    ProtocolViolation,
    WorkerDraining,
    WorkerSaturated,
)
from holdfast.wire import worker as worker_module
from holdfast.wire import worker_sending
from holdfast.wire.codec import WORKER_FRAMES, encode
from holdfast.wire.frames import (
    Auth,
    CallerFrame,
    Credit,
    Items,
    Kill,
    Load,
    Open,
    OpenHeaders,
    Part,
    Ping,
    Pong,
    Progress,
    Stop,
)
from holdfast.wire.framing import FrameSplitter
from holdfast.wire.worker import LEGAL, WorkerConnection
from tests.wire.pairs import NONCE, Pair, Ref, Sink, Token, hello, joined

FRAMES: list[CallerFrame] = [
    hello(),
    Auth(b"m" * 32),
    Part(1, 2, b"xy"),
    Open(1, "generate", OpenHeaders()),
    Stop(1),
    Kill(1),
    Credit(0, 1),
    Ping(1),
]


def said(core: WorkerConnection) -> list[Any]:
    return [WORKER_FRAMES.read(p, "test", lenient=False) for p in FrameSplitter().feed(bytes(core.outbox.take()))]


@pytest.mark.parametrize("frame", FRAMES, ids=lambda f: type(f).__name__)
@pytest.mark.parametrize("state", ["greeting", "proving", "joining", "ready", "draining", "closed"])
@pytest.mark.parametrize("channel", ["control", "bulk"])
def test_a_frame_that_the_connection_state_forbids_is_named(state: str, channel: str, frame: CallerFrame) -> None:
    core = WorkerConnection("w1", 77, lambda *_: None, secret=b"s" if state == "proving" else b"", nonce=NONCE)
    if state != "greeting":
        core.receive(bytes(encode(hello(channel=channel))))
    if state in ("ready", "draining", "closed"):
        core.join()
    if state == "draining":
        core.drain("test", 0)
    if state == "closed":
        core.fail("gone")
    legal = type(frame) in LEGAL[core.state] and not (isinstance(frame, Part) and channel == "control")
    if legal and not isinstance(frame, Auth):
        core.receive(bytes(encode(frame)))
    elif not legal:
        with pytest.raises(ProtocolViolation) as caught:
            core.receive(bytes(encode(frame)))
        assert caught.value.details["frame"] == type(frame).__name__.lower()


def test_one_step_of_many_streams_is_one_frame_and_ends_follow_in_the_same_write() -> None:
    pair = joined()
    streams = [pair.accepted() for _ in range(3)]
    pair.send(*((remote, 0, [7]) for _, remote, _ in streams))
    pair.worker.end(streams[0][1], "stop", None, 12)
    frames = said(pair.worker)
    assert [type(f).__name__ for f in frames] == ["Items", "End"]
    assert frames[0] == Items(b"\1\0\0\0\2\0\0\0\3\0\0\0", b"\0" * 12, b"", b"\7\0\0\0" * 3)


def test_tokens_arrive_with_their_log_probabilities() -> None:
    pair = joined()
    _, remote, sink = pair.accepted(first_index=0)
    chances = [(-0.5, [(5, -0.5), (6, -1.5)]), (-1.0, [])]
    pair.worker.send_items([Token(Ref(remote.id), 0, [5, 9], chances)])
    pair.exchange()
    assert sink.tokens == [5, 9]
    assert sink.logprobs == chances


def test_without_credit_tokens_wait_and_the_end_waits_behind_them() -> None:
    pair = joined()
    stream, remote, sink = pair.accepted(credit=3, first_index=0)
    _, other, other_sink = pair.accepted(credit=100, first_index=0)
    for index in range(10):
        pair.send((remote, index, [index]), (other, index, [index]))
    pair.worker.end(remote, "length")
    pair.exchange()
    assert sink.tokens == [0, 1, 2]
    assert sink.final is None
    assert other_sink.tokens == list(range(10))
    stream.credit(4)
    pair.exchange()
    assert sink.tokens == list(range(7))
    stream.credit(3)
    pair.exchange()
    assert sink.tokens == list(range(10))
    assert sink.final == "end:length"
    assert pair.worker.streams == [other]


def test_an_entry_larger_than_the_credit_is_cut() -> None:
    pair = joined()
    stream, remote, sink = pair.accepted(credit=5, first_index=0)
    chances = [(float(-n), []) for n in range(8)]
    pair.worker.send_items([Token(Ref(remote.id), 0, list(range(8)), chances)])
    pair.exchange()
    assert sink.tokens == [0, 1, 2, 3, 4]
    pair.send((remote, 8, [8]))
    stream.credit(50)
    pair.exchange()
    assert sink.tokens == list(range(9))
    assert sink.logprobs == [*chances, None]
    pair.send((remote, 9, [9]))
    assert [type(f).__name__ for f in said(pair.worker)] == ["Items"], "it flows again"


def test_messages_cost_credit_too_and_keep_their_order() -> None:
    pair = joined()
    stream, remote, sink = pair.accepted(credit=2)
    for n in range(4):
        pair.worker.send_data(remote, bytes([n]))
    pair.worker.end(remote, "done")
    pair.exchange()
    assert sink.messages == [b"\0", b"\1"]
    stream.credit(2)
    pair.exchange()
    assert sink.names == ["accept", "data", "data", "data", "data", "end:done"]


def test_long_messages_travel_in_fragments() -> None:
    pair = joined()
    _, remote, sink = pair.accepted()
    message = bytes(range(256)) * 1000
    pair.worker.send_data(remote, message)
    pair.worker.send_data(remote, b"")
    pair.exchange()
    assert sink.messages == [message, b""]
    with pytest.raises(PayloadTooLarge):
        pair.worker.send_data(remote, bytes(limits.PAYLOAD_BYTES + 1))


def test_a_stopped_stream_gets_its_end_and_nothing_else() -> None:
    pair = joined()
    stream, remote, sink = pair.accepted(credit=1, first_index=0)
    pair.send((remote, 0, [1, 2, 3]))
    pair.exchange()
    stream.stop("client_gone")
    pair.exchange()
    assert pair.stopped == [(1, "client_gone")]
    pair.send((remote, 3, [4]))
    pair.worker.end(remote, "cancelled")
    pair.exchange()
    assert sink.tokens == [1]
    assert sink.final == "end:cancelled"


def test_a_stop_releases_an_end_that_waits_for_credit() -> None:
    pair = joined()
    stream, remote, sink = pair.accepted(credit=1, first_index=0)
    pair.send((remote, 0, [1, 2, 3]))
    pair.worker.end(remote, "stop")
    pair.exchange()
    stream.stop()
    pair.exchange()
    assert sink.tokens == [1]
    assert sink.final == "end:stop"
    assert pair.worker.streams == []


def test_after_a_kill_nothing_is_sent() -> None:
    pair = joined()
    stream, remote, sink = pair.accepted()
    stream.kill("abandoned")
    pair.to_worker()
    pair.send((remote, 0, [1]))
    pair.worker.send_data(remote, b"x")
    pair.worker.end(remote, "stop")
    pair.worker.refuse(remote, EngineFailed("x"))
    pair.worker.accept(remote)
    assert said(pair.worker) == []
    assert pair.stopped == [(1, "abandoned")]
    assert sink.names == ["accept"]


def test_a_stop_is_told_once() -> None:
    pair = joined()
    stream, _, _ = pair.accepted()
    stream.stop("first")
    stream.kill("second")
    pair.to_worker()
    pair.worker.fail("caller_lost")
    assert pair.stopped == [(1, "first")]


@pytest.mark.parametrize("kind", [Stop, Kill])
def test_an_open_after_its_stop_is_refused(kind: type[Stop] | type[Kill]) -> None:
    pair = joined()
    pair.worker.receive(bytes(encode(kind(2))))
    for number in (1, 2, 3):
        pair.worker.receive(bytes(encode(Open(number, "generate", OpenHeaders()))))
    refusals = said(pair.worker)
    assert [(f.stream, f.error.code) for f in refusals] == [(2, Cancelled.code)]
    assert [stream.id for stream in pair.worker.streams] == [1, 3]


def test_stops_of_streams_that_never_come_are_bounded() -> None:
    pair = joined()
    for number in range(1, limits.EARLY_STOPS_PER_CONNECTION + 1):
        pair.worker.receive(bytes(encode(Stop(number))))
    with pytest.raises(ProtocolViolation):
        pair.worker.receive(bytes(encode(Stop(limits.EARLY_STOPS_PER_CONNECTION + 1))))


def test_stream_ids_must_rise() -> None:
    for again in (5, 4, 0):
        pair = joined()
        pair.worker.receive(bytes(encode(Open(5, "generate", OpenHeaders()))))
        with pytest.raises(ProtocolViolation):
            pair.worker.receive(bytes(encode(Open(again, "generate", OpenHeaders()))))


def test_draining_refuses_what_was_not_accepted_and_every_crossing_open() -> None:
    pair = joined()
    _, running, sink = pair.accepted(first_index=0)
    _, waiting, waiting_sink = pair.open()
    crossing = Sink()
    pair.caller.open("generate", OpenHeaders(), b"", crossing)
    pair.worker.drain("rollout", 9000)
    pair.worker.accept(waiting)
    pair.exchange()
    for refused in (waiting_sink, crossing):
        assert refused.final == "refuse"
        assert isinstance(refused.error, WorkerDraining)
        assert refused.error.retry == "elsewhere"
    assert pair.stopped == [(waiting.id, "draining")]
    pair.send((running, 0, [1]))
    pair.worker.end(running, "stop")
    pair.exchange()
    assert sink.tokens == [1]
    assert sink.final == "end:stop"


def test_refusals_and_ends_carry_typed_errors_that_cannot_break_the_frame() -> None:
    pair = joined()
    _, remote, sink = pair.open()
    error = InvalidRequest("x" * 100_000, param="top_k", thing=object(), big=["y" * 1000] * 1000)
    pair.worker.refuse(remote, error)
    pair.exchange()
    assert isinstance(sink.error, InvalidRequest)
    assert sink.error.message == "x" * 4096
    _, remote, sink = pair.accepted()
    pair.worker.end(remote, "error", EngineFailed("boom", worker="w1", thing=object()))
    pair.exchange()
    assert isinstance(sink.error, EngineFailed)
    assert sink.error.details["worker"] == "w1"


def test_refuse_after_accept_ends_and_end_before_accept_accepts_or_refuses() -> None:
    pair = joined()
    _, remote, sink = pair.accepted()
    pair.worker.refuse(remote, EngineFailed("late"))
    pair.exchange()
    assert sink.names == ["accept", "end:error"]
    _, remote, sink = pair.open()
    pair.worker.end(remote, "done")
    pair.exchange()
    assert sink.names == ["accept", "end:done"]
    _, remote, sink = pair.open()
    pair.worker.end(remote, "error", EngineFailed("early"))
    pair.exchange()
    assert sink.names == ["refuse"]


def test_tokens_before_accept_cost_only_that_stream() -> None:
    pair = joined()
    _, good, good_sink = pair.accepted(first_index=0)
    _, bad, bad_sink = pair.open()
    pair.send((good, 0, [1]), (bad, 0, [2]))
    pair.exchange()
    assert good_sink.tokens == [1]
    assert isinstance(bad_sink.error, InternalError)
    assert pair.stopped == [(bad.id, "not_accepted")]
    _, twice, _ = pair.accepted()
    with pytest.raises(InternalError):
        pair.worker.accept(twice)


@pytest.mark.parametrize("credit", [1, 100])
@pytest.mark.parametrize("token", [-1, 2**32])
def test_a_token_that_cannot_be_sent_costs_only_its_stream(token: int, credit: int) -> None:
    pair = joined()
    _, good, good_sink = pair.accepted(first_index=0)
    _, bad, bad_sink = pair.accepted(credit=credit, first_index=0)
    pair.send((good, 0, [1]), (bad, 0, [2, token]))
    pair.send((good, 1, [3]), (bad, 2, [4]))
    pair.exchange()
    assert good_sink.tokens == [1, 3]
    assert isinstance(bad_sink.error, InternalError)
    assert pair.stopped == [(bad.id, "bad_tokens")]


def test_a_step_too_large_for_a_frame_becomes_several() -> None:
    pair = joined()
    streams = [pair.accepted(first_index=0, credit=10_000) for _ in range(6)]
    tokens = list(range(6000))
    pair.send(*((remote, 0, tokens) for _, remote, _ in streams))
    pair.exchange()
    assert all(sink.tokens == tokens for _, _, sink in streams)
    _, remote, sink = pair.accepted(first_index=0, credit=10_000)
    chances = [(-1.0, [(n, -2.0) for n in range(20)])] * 600
    pair.worker.send_items([Token(Ref(remote.id), 0, tokens[:600], chances)])
    pair.exchange()
    assert sink.logprobs == chances


def test_while_the_network_is_full_tokens_wait_in_their_streams() -> None:
    pair = joined()
    streams = [pair.accepted(first_index=0) for _ in range(3)]
    pair.worker.paused = True
    for index in range(100):
        pair.send(*((remote, index, [index]) for _, remote, _ in streams))
    pair.worker.end(streams[0][1], "stop")
    assert not pair.worker.outbox
    assert pair.worker.releasable
    pair.worker.paused = False
    while pair.worker.releasable:
        pair.worker.release()
    pair.exchange()
    assert all(sink.tokens == list(range(100)) for _, _, sink in streams)
    assert streams[0][2].final == "end:stop"


@pytest.mark.parametrize("limit", ["UNSENT_TOKENS_PER_STREAM", "UNSENT_TOKENS_PER_CONNECTION"])
def test_unsent_tokens_are_bounded_by_a_typed_error(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_sending, limit, 50)
    pair = joined()
    _, remote, sink = pair.accepted(credit=10, first_index=0)
    for index in range(80):
        pair.send((remote, index, [index]))
    pair.exchange()
    assert isinstance(sink.error, CapacityExhausted)
    assert sink.error.details == {"limit": limit, "threshold": 50, "actual": 51}
    assert pair.stopped == [(1, "unsent_limit")]
    _, remote, sink = pair.accepted(credit=10, first_index=0)
    pair.send((remote, 0, list(range(30))))
    pair.exchange()
    assert sink.tokens == list(range(10)), "the others' room is given back"


def test_unsent_messages_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_sending, "UNSENT_MESSAGE_BYTES_PER_STREAM", 1000)
    pair = joined()
    _, remote, sink = pair.accepted(credit=1)
    for _ in range(12):
        pair.worker.send_data(remote, b"x" * 100)
    pair.exchange()
    assert isinstance(sink.error, CapacityExhausted)


def test_too_many_streams_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "STREAMS_PER_CONNECTION", 2)
    pair = joined()
    sinks = [Sink() for _ in range(3)]
    for sink in sinks:
        pair.caller.open("generate", OpenHeaders(), b"", sink)
    pair.exchange()
    assert isinstance(sinks[2].error, WorkerSaturated)
    assert len(pair.opened) == 2


def test_a_pong_tells_up_to_which_stream_the_load_includes() -> None:
    pair = joined()
    for number in (1, 2, 3):
        pair.worker.receive(bytes(encode(Open(number, "generate", OpenHeaders()))))
    first, second, third = pair.worker.streams
    pair.worker.delivered(first)
    pair.worker.delivered(third)
    pair.worker.pong(1, Progress(steps=4), Load(), "ready")
    pair.worker.delivered(second)
    pair.worker.pong(2, Progress(), Load(), "saturated")
    pongs = said(pair.worker)
    assert [(p.sequence, p.last_open, p.state) for p in pongs] == [(1, 1, "ready"), (2, 3, "saturated")]
    assert pongs[0].progress.steps == 4
    assert isinstance(pongs[0], Pong)


def test_losing_the_caller_stops_all_its_streams_once() -> None:
    pair = joined()
    pair.accepted()
    pair.open()
    pair.worker.fail("caller_lost")
    pair.worker.fail("caller_lost")
    assert pair.stopped == [(1, "caller_lost"), (2, "caller_lost")]
    assert pair.worker.streams == []


def test_credit_must_not_be_negative() -> None:
    pair = joined()
    pair.accepted()
    with pytest.raises(ProtocolViolation):
        pair.worker.receive(bytes(encode(Credit(1, -5))))


def test_unknown_frames_are_ignored_only_from_a_newer_peer() -> None:
    unknown = msgspec.msgpack.encode((99, "something new"))
    data = len(unknown).to_bytes(4, "little") + unknown
    newer = Pair(version_max=99)
    newer.exchange()
    newer.worker.receive(data)
    assert newer.worker.ignored_frames == 1
    with pytest.raises(HoldfastError):
        joined().worker.receive(data)
