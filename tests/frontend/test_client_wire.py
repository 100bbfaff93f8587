"""Our way to the client and uvicorn's own `send` produce the same bytes."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from holdfast.frontend.client_wire import ClientWire, head_of

HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


class Sink(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.closed = False

    def write(self, data: Any) -> None:
        self.writes.append(bytes(data))

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def resume_reading(self) -> None: ...

    def pause_reading(self) -> None: ...


class Connection:
    watcher: ClientWire | None = None


class Side:
    """One connection with one request on it."""

    def __init__(self, *, keep_alive: bool = True, version: str = "1.1"):
        self.sink = Sink()
        self.flow = FlowControl(self.sink)
        self.completed = 0
        self.cycle = RequestResponseCycle(
            scope={"type": "http", "method": "POST", "http_version": version},  # type: ignore[typeddict-item]
            transport=self.sink,
            flow=self.flow,
            logger=logging.getLogger("x"),
            access_logger=logging.getLogger("x"),
            access_log=False,
            default_headers=[],
            message_event=asyncio.Event(),
            expect_100_continue=False,
            keep_alive=keep_alive,
            on_response=self.complete,
        )
        self.wire = ClientWire(Connection(), self.cycle, self.flow, self.sink)

    def complete(self) -> None:
        self.completed += 1

    @property
    def bytes(self) -> bytes:
        return b"".join(self.sink.writes)

    def state(self) -> tuple[object, ...]:
        cycle = self.cycle
        return (
            self.bytes, self.sink.closed, self.completed, cycle.response_started, cycle.response_complete,
            cycle.message_event.is_set(), cycle.keep_alive,
        )  # fmt: skip


async def asgi(side: Side, parts: list[bytes], headers: list[tuple[bytes, bytes]]) -> None:
    await side.cycle.send({"type": "http.response.start", "status": 200, "headers": headers})
    for part in parts[:-1]:
        await side.cycle.send({"type": "http.response.body", "body": part, "more_body": True})
    await side.cycle.send({"type": "http.response.body", "body": parts[-1], "more_body": False})


def ours(side: Side, parts: list[bytes], length: int | None = None) -> None:
    side.wire.start(head_of(200, HEADERS), length)
    for part in parts[:-1]:
        side.wire.write(part)
    side.wire.end(parts[-1])


@pytest.mark.parametrize("keep_alive", [True, False])
@pytest.mark.parametrize("parts", [[b"data: a\n\n", b"x" * 70_000, b"end"], [b"a", b""], [b""], [b"whole"]])
async def test_same_bytes_in_chunks(parts: list[bytes], keep_alive: bool) -> None:
    one, other = Side(keep_alive=keep_alive), Side(keep_alive=keep_alive)
    await asgi(one, parts, HEADERS)
    ours(other, parts)
    assert other.state() == one.state()


@pytest.mark.parametrize("keep_alive", [True, False])
async def test_same_bytes_of_a_whole_answer(keep_alive: bool) -> None:
    one, other = Side(keep_alive=keep_alive), Side(keep_alive=keep_alive)
    framing = [(b"connection", b"close")] if not keep_alive else []
    await asgi(one, [b"12345"], [*HEADERS, *framing, (b"content-length", b"5")])
    ours(other, [b"12345"], 5)
    assert other.state() == one.state()
    assert len(other.sink.writes) == 1


async def test_head_and_end_cost_no_write_of_their_own() -> None:
    side = Side()
    ours(side, [b"a", b"b", b"c"])
    assert len(side.sink.writes) == 3


async def test_nothing_after_the_end_or_to_nobody() -> None:
    side = Side()
    ours(side, [b"a"])
    before = side.bytes
    side.wire.end(b"again")
    assert side.bytes == before
    gone = Side()
    gone.cycle.disconnected = True
    ours(gone, [b"a"])
    assert gone.bytes == b""


async def test_old_clients() -> None:
    side = Side(keep_alive=False, version="1.0")
    ours(side, [b"a", b"b"])
    assert side.bytes.endswith(b"connection: close\r\n\r\nab")
    assert b"transfer-encoding" not in side.bytes
    assert side.sink.closed


async def test_watching_tells_what_has_happened_already() -> None:
    told: list[str] = []

    def watch(side: Side) -> None:
        side.wire.watch(lambda: told.append("lost"), lambda: told.append("blocked"), lambda: told.append("writable"))

    watch(Side())
    assert told == []
    side = Side()
    side.cycle.disconnected = True
    watch(side)
    side = Side()
    side.flow.pause_writing()
    watch(side)
    assert told == ["lost", "blocked"]
