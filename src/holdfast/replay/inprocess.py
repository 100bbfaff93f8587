"""The offline driver: clients of a simulated cluster, calling the production frontends in process.

What an HTTP server does otherwise is skipped: a request reaches the frontend's application at once, and what that
writes is read at once, by the same code as online. Clients are patient, and spread over the frontends that listen.

Must never route by anything but the turn: which worker answers is the frontend's decision.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable
from typing import Any

import msgspec

from holdfast.base.errors import CannotConnect, Disconnected
from holdfast.base.ids import InstanceId
from holdfast.replay.answer import Answer
from holdfast.replay.driver import Events, Job, Outcome
from holdfast.replay.prompts import Prompts
from holdfast.sim.cluster import SimCluster
from holdfast.sim.processes import FrontendProcess
from holdfast.sim.workload import MODEL


class Stream(msgspec.Struct):
    """What became of one request at which frontend, for who looks closely."""

    label: str
    """Its ``x-request-id``."""
    frontend: str
    times: array[float]
    """When its tokens came, in seconds of the loop."""


class SimDriver:
    """A `Driver` over a simulated cluster. ``submit`` runs on the clients' host.

    Args:
        cluster: it is ready.
        prompts: makes the prompts.
        keep: whether the times of all tokens are kept, eight bytes each.
    """

    def __init__(self, cluster: SimCluster, prompts: Prompts, *, keep: bool = False):
        self._cluster, self._prompts, self._keep = cluster, prompts, keep
        self.streams: dict[int, Stream] = {}
        """By number of the job, when they are kept."""
        self._turn = 0

    async def submit(self, job: Job, events: Events) -> None:
        """Send one job; see `Driver.submit`."""
        frontend = self._next_frontend()
        label = f"r{job.index}"
        body = {
            "model": MODEL,
            "prompt": self._prompts.json(job.request),
            "max_tokens": job.request.output_length,
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0,
            "ignore_eos": True,
        }
        seen = _Seen(events, self._name_of, array("d") if self._keep else None)
        if seen.times is not None:
            self.streams[job.index] = Stream(label, frontend.name, seen.times)
        answer = Answer(seen)
        await Conversation(label, msgspec.json.encode(body), answer).hold(frontend)
        answer.judge()

    def _next_frontend(self) -> FrontendProcess:
        listening = [frontend for frontend in self._cluster.frontends if frontend.listens and not frontend.draining]
        if not listening:
            raise CannotConnect("No frontend listens.")
        self._turn += 1
        return listening[self._turn % len(listening)]

    def _name_of(self, instance: str) -> str:
        return self._cluster.name_of(InstanceId(instance)) or instance


class _Seen:
    """Passes events on, with the worker's name instead of its instance id."""

    __slots__ = ("_inner", "_loop", "_name_of", "times")

    def __init__(self, inner: Events, name_of: Callable[[str], str], times: array[float] | None):
        self._inner, self._name_of, self.times = inner, name_of, times
        self._loop = asyncio.get_running_loop()

    def worker(self, name: str) -> None:
        self._inner.worker(self._name_of(name))

    def tokens(self, count: int = 1) -> None:
        if self.times is not None:
            self.times.append(self._loop.time())
        self._inner.tokens(count)

    def usage(self, prompt: int, completion: int, cached: int) -> None:
        self._inner.usage(prompt, completion, cached)

    def ended(self, outcome: Outcome, reason: str = "") -> None:
        self._inner.ended(outcome, reason)


class Conversation:
    """One HTTP request and its answer (`frontend.client_wire.Sink`), without HTTP.

    Args:
        label: the client's ``x-request-id``.
        body: of the request, JSON.
        answer: reads the response.
    """

    def __init__(self, label: str, body: bytes, answer: Answer):
        self._label, self._body, self._answer = label, body, answer
        self._loop = asyncio.get_running_loop()
        self._done: asyncio.Future[None] = self._loop.create_future()
        """On the client's host."""
        self._gone: asyncio.Future[None] | None = None
        """On the frontend's."""
        self._on_lost: Callable[[], None] | None = None
        self._lost = False
        """Nobody is there any more, on one of the two sides."""
        self._complete = False

    async def hold(self, frontend: FrontendProcess) -> None:
        """Ask, and return when the answer is complete. Raises Disconnected or ProtocolViolation."""
        frontend.exchanges[self] = None
        frontend.host.spawn(self._serve(frontend), f"http-{self._label}")
        try:
            await self._done
        finally:
            if not self._complete and not self._lost:
                frontend.host.post(self._client_gone)

    def cut(self) -> None:
        """The connection broke on the frontend's side."""
        self._lost = True
        self._fail(Disconnected("The connection to the frontend broke in the middle of an answer."))

    # -- the frontend's side ---------------------------------------------------------------------------

    async def _serve(self, frontend: FrontendProcess) -> None:
        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": "POST",
            "path": "/v1/completions",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json"), (b"x-request-id", self._label.encode())],
            "client": ("10.1.0.1", 1),
            "holdfast.wire": self,
            "holdfast.late": False,
        }
        await frontend.app(scope, self._receive, self._send)
        if not self._complete and not self._lost:
            self.cut()
        frontend.exchanges.pop(self, None)

    async def _receive(self) -> dict[str, Any]:
        if self._body:
            body, self._body = self._body, b""
            return {"type": "http.request", "body": body, "more_body": False}
        if not self._lost:
            self._gone = self._loop.create_future()
            await self._gone
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self._answer.status = message["status"]
        elif message.get("more_body"):
            self.write(message["body"])
        else:
            self.end(message["body"])

    def _client_gone(self) -> None:
        """The frontend's system has noticed that the client has left; runs on its host."""
        if self._lost or self._complete:
            return
        self._lost = True
        if self._gone is not None and not self._gone.done():
            self._gone.set_result(None)
        if self._on_lost is not None:
            self._on_lost()

    def _fail(self, error: Exception) -> None:
        if not self._done.done():
            self._done.set_exception(error)

    # -- `Sink` ----------------------------------------------------------------------------------------

    def watch(
        self, on_lost: Callable[[], None], on_blocked: Callable[[], None], on_writable: Callable[[], None]
    ) -> None:
        """See `Sink.watch`; a client that reads at once never blocks."""
        del on_blocked, on_writable
        self._on_lost = on_lost
        if self._lost:
            on_lost()

    def unwatch(self) -> None:
        """See `Sink.unwatch`."""
        self._on_lost = None

    def start(self, head: bytes, length: int | None = None) -> None:
        """See `Sink.start`."""
        del length
        lines = head.split(b"\r\n")
        self._answer.status = int(lines[0].split(b" ", 2)[1])
        for line in lines[1:]:
            name, colon, value = line.partition(b":")
            if colon:
                self._answer.header(name, value.strip())

    def write(self, data: bytes) -> None:
        """See `Sink.write`."""
        if not self._lost:
            self._answer.part(data)

    def end(self, data: bytes) -> None:
        """See `Sink.end`."""
        self.write(data)
        self._complete = True
        if not self._done.done():
            self._done.set_result(None)

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
        return 0

    def abort(self) -> None:
        """See `Sink.abort`."""
        if not self._lost and not self._complete:
            on_lost = self._on_lost
            self.cut()
            if on_lost is not None:
                self._loop.call_soon(on_lost)
