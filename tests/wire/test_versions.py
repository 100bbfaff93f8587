"""Version 1 peers, spoken by a frozen codec of their own, and this version understand each other both ways."""

import msgspec
import pytest

from holdfast.base.errors import PayloadTooLarge, VersionMismatch
from holdfast.wire.caller import CallerConnection
from holdfast.wire.frames import VERSION, Load, OpenHeaders, Progress
from holdfast.wire.worker import Joined, Opened, WorkerConnection
from tests.wire import frozen_v1 as v1
from tests.wire.pairs import Ref, Sink, Token, hello


class Stopped:
    def __init__(self) -> None:
        self.reasons: list[tuple[int, str]] = []

    def __call__(self, stream: object, reason: str) -> None:
        self.reasons.append((stream.id, reason))  # type: ignore[attr-defined]


def old_caller() -> tuple[WorkerConnection, list[object], Stopped]:
    """A present worker with a version 1 caller that has opened stream 1."""
    stopped = Stopped()
    worker = WorkerConnection("w1", 77, stopped)
    assert isinstance(worker.receive(v1.encode(v1.Hello(1, 1, "old", "control", "w1", 77)))[0], Joined)
    worker.join()
    welcome = v1.read_worker(bytes(worker.outbox.take()))
    assert welcome == [v1.Welcome(1, "w1", 77)]
    headers = v1.OpenHeaders(request_id="r", attempt=2, priority=3, remaining_ms=900)
    events = worker.receive(v1.encode(v1.Open(1, "generate", headers, b"payload", 0, 100)))
    return worker, list(events), stopped


def test_an_old_caller_at_this_worker() -> None:
    worker, events, stopped = old_caller()
    (opened,) = events
    assert isinstance(opened, Opened)
    frame = opened.stream.opened_by
    assert (frame.endpoint, frame.payload, frame.headers.attempt) == ("generate", b"payload", 2)
    assert frame.headers.tracestate == ""
    worker.delivered(opened.stream)
    worker.accept(opened.stream)
    worker.send_items([Token(Ref(1), 0, [5, 6], [(-1.0, []), (-2.0, [])]), Token(Ref(1), 2, [7])])
    worker.send_data(opened.stream, b"short")
    worker.pong(1, Progress(steps=9), Load(running=2), "saturated")
    worker.end(opened.stream, "length", None, 4)
    worker.drain("rollout", 50)
    assert v1.read_worker(bytes(worker.outbox.take())) == [
        v1.Accept(1),
        v1.Items(b"\1\0\0\0" * 2, b"\0\0\0\0\2\0\0\0", b"\2\0\0\0\1\0\0\0", b"\5\0\0\0\6\0\0\0\7\0\0\0"),
        v1.Data(1, 0, b"short"),
        v1.Pong(1, v1.Progress(steps=9), v1.Load(running=2), 1),
        v1.End(1, "length", None, 4),
        v1.Draining("rollout", 50),
    ]
    assert stopped.reasons == []


def test_an_old_caller_never_gets_fragments_it_would_take_for_messages() -> None:
    worker, events, _ = old_caller()
    stream = events[0].stream  # type: ignore[attr-defined]
    worker.accept(stream)
    with pytest.raises(PayloadTooLarge):
        worker.send_data(stream, bytes(100_000))


def test_an_old_caller_stops_kills_credits_and_pings() -> None:
    worker, events, stopped = old_caller()
    worker.accept(events[0].stream)  # type: ignore[attr-defined]
    more = worker.receive(
        v1.encode(v1.Credit(1, 5), v1.Ping(1), v1.Stop(1), v1.Open(2, "e", v1.OpenHeaders()), v1.Kill(2))
    )
    assert [type(event).__name__ for event in more] == ["Ping", "Opened"]
    assert stopped.reasons == [(1, "cancelled"), (2, "cancelled")]


def test_an_old_worker_at_this_caller() -> None:
    caller, sink = CallerConnection(hello(instance="w1")), Sink()
    (greeting,) = v1.read_caller(bytes(caller.outbox.take()))
    assert isinstance(greeting, v1.Hello)
    assert (greeting.version_min, greeting.version_max) == (1, VERSION)
    caller.receive(v1.encode(v1.Welcome(1, "w1", 77)))
    assert caller.version == 1
    headers = OpenHeaders(request_id="r", attempt=3, tracestate="vendor=1")
    stream = caller.open("generate", headers, b"p", sink, credit=9, first_index=4)
    caller.ping()
    stream.credit(3)
    assert v1.read_caller(bytes(caller.outbox.take())) == [
        v1.Open(1, "generate", v1.OpenHeaders(request_id="r", attempt=3), b"p", 0, 9),
        v1.Ping(1),
        v1.Credit(1, 3),
    ]
    events = caller.receive(
        v1.encode(
            v1.Accept(1),
            v1.Items(b"\1\0\0\0", b"\4\0\0\0", b"\2\0\0\0", b"\5\0\0\0\6\0\0\0"),
            v1.Data(1, 0, b"m"),
            v1.Pong(1, v1.Progress(tokens=2), v1.Load(), 1),
            v1.End(1, "error", v1.ErrorInfo("engine_failed", "boom", "worker", "elsewhere")),
        )
    )
    assert sink.tokens == [5, 6]
    assert sink.messages == [b"m"]
    assert sink.error is not None
    assert sink.error.code == "engine_failed"
    assert [(e.progress.tokens, e.state) for e in events] == [(2, "ready")]  # type: ignore[union-attr]


def test_a_worker_of_a_later_version_may_append_fields() -> None:
    caller = CallerConnection(hello())
    payload = msgspec.msgpack.encode([17, VERSION, "w1", 77, [], b"", VERSION + 1, "new field", {"more": 1}])
    caller.receive(len(payload).to_bytes(4, "little") + payload)
    assert caller.state == "ready"
    unknown = msgspec.msgpack.encode([99, "a frame of the future"])
    caller.receive(len(unknown).to_bytes(4, "little") + unknown)
    assert caller.ignored_frames == 1


def test_two_versions_ahead_is_refused_naming_both_ranges() -> None:
    worker = WorkerConnection("w1", 77, lambda *_: None)
    with pytest.raises(VersionMismatch):
        worker.receive(v1.encode(v1.Hello(VERSION + 1, VERSION + 2, "new", "control")))
    (refusal,) = v1.read_worker(bytes(worker.outbox.take()))
    assert isinstance(refusal, v1.Refuse)
    assert refusal.error.details == {
        "caller_versions": [VERSION + 1, VERSION + 2],
        "worker_versions": [1, VERSION],
    }
