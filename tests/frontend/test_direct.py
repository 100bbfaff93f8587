"""Events that take the short way to the client: in order with all else, once each, and without harm to others."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from holdfast.frontend.reply import Reply
from holdfast.requests.flusher import Flusher

pytestmark = pytest.mark.asyncio


class Wire:
    """A client's connection that keeps what is written."""

    def __init__(self) -> None:
        self.out: list[bytes] = []
        self.on_raw: Callable[[], None] = lambda: None

    def watch(
        self, on_lost: Callable[[], None], on_blocked: Callable[[], None], on_writable: Callable[[], None]
    ) -> None:
        raise AssertionError("nobody watches here")

    def unwatch(self) -> None:
        raise AssertionError("nobody watches here")

    def start(self, head: bytes, length: int | None = None) -> None:
        self.out.append(head)

    def write(self, data: bytes) -> None:
        self.out.append(data)

    def end(self, data: bytes) -> None:
        self.out.append(data + b"!")

    def abort(self) -> None:
        self.out.append(b"aborted")

    def unsent(self) -> int:
        return 0

    def _raw(self, data: bytes) -> None:
        self.on_raw()
        self.out.append(data)

    @property
    def raw(self) -> Callable[[bytes], object]:
        return self._raw


class Stream:
    """Something that is delivered."""

    def __init__(self, act: Callable[[], None]) -> None:
        self.deliver = act


def begun(flusher: Flusher) -> tuple[Reply, Wire]:
    """Return a response whose head is gone, so that the short way is open."""
    wire = Wire()
    reply = Reply(wire, flusher, 0.0)
    reply.hold(b"head")
    assert reply.direct is None
    reply.write(b"first")
    reply.push()
    assert wire.out == [b"head", b"first"]
    wire.out.clear()
    return reply, wire


def say(reply: Reply, data: bytes) -> None:
    direct = reply.direct
    assert direct is not None
    reply.later((direct, data))


async def test_the_short_way_keeps_the_order() -> None:
    flusher = Flusher(lambda: 0)
    reply, wire = begun(flusher)

    def deliver() -> None:
        say(reply, b"token")
        reply.write(b"end")
        reply.finish()
        reply.push()

    flusher.streams.append(Stream(deliver))
    flusher.flush()
    assert wire.out == [b"token", b"end!"]
    assert reply.direct is None


async def test_it_is_closed_while_something_stands_before_it() -> None:
    reply, _ = begun(Flusher(lambda: 0))
    reply.write(b"a comment")
    assert reply.direct is None
    reply.push()
    assert reply.direct is not None
    reply.block()
    assert reply.direct is None
    reply.write(b"more")
    reply.resume()
    assert reply.direct is not None
    reply.abandon()
    assert reply.direct is None


async def test_a_failing_write_harms_nobody_else(caplog: pytest.LogCaptureFixture) -> None:
    flusher = Flusher(lambda: 0)
    bad, broken = begun(flusher)
    good, wire = begun(flusher)

    def fail() -> None:
        raise RuntimeError("the handle is closed")

    broken.on_raw = fail
    flusher.streams += [Stream(lambda: say(bad, b"lost")), Stream(lambda: say(good, b"token"))]
    flusher.flush()
    assert (broken.out, wire.out) == ([], [b"token"])
    assert "could not be written" in caplog.text


async def test_a_write_that_lets_others_go_on_writes_nothing_twice() -> None:
    flusher = Flusher(lambda: 0)
    one, first = begun(flusher)
    other, second = begun(flusher)
    third, late = begun(flusher)
    first.on_raw = lambda: flusher.deliver([Stream(lambda: say(third, b"waited"))])
    flusher.streams += [Stream(lambda: say(one, b"a")), Stream(lambda: say(other, b"b"))]
    flusher.flush()
    assert (first.out, second.out, late.out) == ([b"a"], [b"b"], [b"waited"])
