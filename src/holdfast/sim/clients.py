"""Simulated clients: they call a frontend's ASGI application in process, and read as slowly as they like.

One `Exchange` is one HTTP request and its answer; it stands where the HTTP server stands otherwise (the boundary of
the simulation: `frontend.client_wire.Sink`). It writes down what its client saw and when. Must never judge an answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from holdfast.frontend.app import Frontend
from holdfast.sim.history import Call, History
from holdfast.sim.hosts import Host
from holdfast.sim.workload import Wish

LATENCY = 0.000_4
"""Seconds between a client and its frontend, one way."""
_PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}


class Connected(Protocol):
    """One client's connection, as its frontend's system sees it."""

    def cut(self) -> None:
        """The connection breaks on the frontend's side."""


class Serving(Protocol):
    """A frontend as clients find it."""

    host: Host
    exchanges: dict[Connected, None]
    listens: bool
    """Whether a connection is accepted."""
    app: Frontend

    @property
    def draining(self) -> bool:
        """Whether a connection that comes now is a late one."""


class Exchange:
    """See the module. `begin` it on the clients' host.

    Args:
        wish: what is asked, and how the client behaves.
        frontend: finds whom to ask, at the moment of asking; None: nobody is there.
        clients: the host on which clients live.
        history: where the call is written down.
        frontend_name: whom it asks.
    """

    def __init__(
        self,
        wish: Wish,
        frontend: Callable[[], Serving | None],
        clients: Host,
        history: History,
        frontend_name: str,
    ):
        self.call = Call(
            wish.name,
            frontend_name,
            wish.surface,
            wish.body,
            wish.valid,
            wish.probe,
            wish.headers,
            slow=wish.manner.reading != "at once",
        )
        self.wish = wish
        self._find, self._clients, self._history = frontend, clients, history
        self._loop = clients.world.loop
        self._frontend: Serving | None = None
        self._watch: tuple[Callable[[], None], Callable[[], None], Callable[[], None]] | None = None
        self._sent_body = False
        self._gone: asyncio.Future[None] | None = None
        self._lost = False
        """The frontend knows that nobody is there any more."""
        self._complete = False
        self._head: tuple[int, int] | None = None
        """Status and length, not sent yet."""
        self._unsent = 0
        self._free_at = 0.0
        self._paused = False
        self._takes_from = 0.0
        history.calls.append(self.call)

    @property
    def over(self) -> bool:
        """Whether the client has nothing more to expect."""
        return self.call.ending != ""

    # -- the client ------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Connect and ask; called on the clients' host."""
        self.call.sent = self._loop.time()
        frontend = self._frontend = self._find()
        if frontend is None or not frontend.listens:
            self._end("unreachable")
            return
        frontend.exchanges[self] = None
        late = frontend.draining
        self._loop.call_later(LATENCY, self._arrive_at, frontend, late, context=frontend.host.context)
        if self.wish.manner.leaves == "time":
            self._loop.call_later(self.wish.manner.after, self.leave)

    def leave(self) -> None:
        """The client closes its connection, whatever it has got."""
        if self.over or self._frontend is None:
            return
        self._history.see("client-leaves")
        self._end("left")
        self._loop.call_later(LATENCY, self._client_gone, context=self._frontend.host.context)

    def cut(self) -> None:
        """The connection broke on the frontend's side."""
        self._complete = self._lost = True
        self._loop.call_later(LATENCY, self._broken, context=self._clients.context)

    def _broken(self) -> None:
        if not self.over:
            self._end("broken")

    def _end(self, ending: Any) -> None:
        self.call.ending = ending
        self.call.ended = self._loop.time()

    def _take(self, data: bytes, head: tuple[int, int] | None, last: bool) -> None:
        """Bytes reach the client."""
        call, now = self.call, self._loop.time()
        if self.over:
            return
        if head is not None:
            call.status, call.answered = head[0], now
        if data:
            call.pieces.append((now, data))
        if last:
            self._end("complete")
        elif self.wish.manner.leaves == "tokens" and len(call.pieces) >= self.wish.manner.after:
            self.leave()

    # -- the frontend's side ---------------------------------------------------------------------------

    def _arrive_at(self, frontend: Serving, late: bool) -> None:
        """The request has reached the frontend; runs on its host."""
        if frontend.listens:
            frontend.host.spawn(self._serve(frontend, late), f"http-{self.call.name}")
        else:
            self.cut()

    async def _serve(self, frontend: Serving, late: bool) -> None:
        headers = [(b"content-type", b"application/json"), (b"x-request-id", self.call.name.encode())]
        headers += [(name.encode(), value.encode()) for name, value in self.call.headers.items()]
        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": "POST",
            "path": _PATHS[self.call.surface],
            "query_string": b"",
            "headers": headers,
            "client": ("10.1.0.1", 1),
            "holdfast.wire": self,
            "holdfast.late": late,
        }
        try:
            await frontend.app(scope, self._receive, self._send)
        except Exception as error:
            self._history.violate("P2", "the application raised", call=self.call.name, error=repr(error))
        if not self._complete and not self._lost:
            self._history.violate("P2", "an answer was left without an end", call=self.call.name)
            self.cut()
        frontend.exchanges.pop(self, None)

    async def _receive(self) -> dict[str, Any]:
        if not self._sent_body:
            self._sent_body = True
            return {"type": "http.request", "body": msgspec.json.encode(self.call.body), "more_body": False}
        if not self._lost:
            self._gone = self._loop.create_future()
            await self._gone
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self._head = (message["status"], 0)
            return
        self.end(message["body"]) if not message.get("more_body") else self.write(message["body"])

    def _client_gone(self) -> None:
        """The frontend's system has noticed that the client is gone; runs on its host."""
        if self._lost:
            return
        self._lost = True
        if self._gone is not None and not self._gone.done():
            self._gone.set_result(None)
        if self._watch is not None and not self._complete:
            self._watch[0]()

    # -- `Sink` ----------------------------------------------------------------------------------------

    def watch(
        self, on_lost: Callable[[], None], on_blocked: Callable[[], None], on_writable: Callable[[], None]
    ) -> None:
        """See `Sink.watch`."""
        self._watch = (on_lost, on_blocked, on_writable)
        if self._lost:
            on_lost()
        elif self._paused:
            on_blocked()

    def unwatch(self) -> None:
        """See `Sink.unwatch`."""
        self._watch = None

    def start(self, head: bytes, length: int | None = None) -> None:
        """See `Sink.start`."""
        self._head = (int(head[9:12]), length or 0)

    def write(self, data: bytes) -> None:
        """See `Sink.write`."""
        self._put(data, last=False)

    def end(self, data: bytes) -> None:
        """See `Sink.end`."""
        self._put(data, last=True)
        self._complete = True

    @property
    def raw(self) -> None:
        """See `Sink.raw`: chunks are not framed here."""
        return

    @property
    def socket(self) -> None:
        """See `Sink.socket`: there is none."""
        return

    def unsent(self) -> int:
        """See `Sink.unsent`."""
        return self._unsent

    def abort(self) -> None:
        """See `Sink.abort`."""
        if not self._lost and not self._complete:
            self._lost = True
            self._loop.call_soon(self._aborted)

    def _aborted(self) -> None:
        watch = self._watch
        self.cut()
        if watch is not None:
            watch[0]()

    def _put(self, data: bytes, *, last: bool) -> None:
        if self._complete and not self._lost:
            self._history.violate("P2", "bytes were written after the end of an answer", call=self.call.name)
        if self._lost or self._complete:
            return
        head, self._head = self._head, None
        now = self._loop.time()
        at = self._when(now, len(data))
        if at > now:
            self._unsent += len(data)
            self._loop.call_at(at, self._sent, len(data))
        self._loop.call_at(at + LATENCY, self._take, data, head, last, context=self._clients.context)
        if self._unsent > self.wish.manner.buffer and not self._paused:
            self._paused = True
            self._history.see("client-slow" if self.wish.manner.reading == "slowly" else "client-stalls")
            if self._watch is not None:
                self._watch[1]()

    def _when(self, now: float, size: int) -> float:
        """Return when the client takes these bytes."""
        manner = self.wish.manner
        if manner.reading == "at once":
            return now
        if manner.reading == "slowly":
            self._free_at = max(now, self._free_at) + size / manner.rate
            return self._free_at
        if not self._takes_from:
            self._takes_from = now + manner.pause
        return max(now, self._takes_from)

    def _sent(self, size: int) -> None:
        self._unsent -= size
        if self._paused and self._unsent <= self.wish.manner.buffer // 4:
            self._paused = False
            if self._watch is not None and not self._lost:
                self._watch[2]()
