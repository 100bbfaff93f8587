"""The online driver: sends jobs to an OpenAI-compatible endpoint as streamed completions with token-id prompts.

Written on asyncio protocols and the HTTP parser in C, because a load generator must not be what is measured: an event
costs microseconds, prompts are put together from remembered pieces of JSON, connections are kept.

Must never keep or log what is generated, and never repeat a request but when a kept connection turns out to be closed
before a byte of its answer came.
"""

from __future__ import annotations

import asyncio
import ssl
from typing import Any, cast
from urllib.parse import urlsplit

import httptools
import msgspec

from holdfast.base.errors import CannotConnect, Disconnected, HoldfastError, InvalidRequest, ProtocolViolation
from holdfast.replay.answer import Answer
from holdfast.replay.driver import Events, Job
from holdfast.replay.prompts import Prompts

CONNECT_SECONDS = 10.0


class _Connection(asyncio.Protocol):
    """One kept connection; one exchange at a time."""

    def __init__(self) -> None:
        self.open = False
        self.used = False
        """A request went over it before this one."""
        self.silent = True
        """No byte of the present answer has come."""
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._answer: Answer | None = None
        self._done: asyncio.Future[None] | None = None
        self._keep = True

    # asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # a cast: uvloop's transports are none of asyncio's class
        self._transport, self.open = cast("asyncio.Transport", transport), True

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False
        self._fail(Disconnected("The connection ended in the middle of an answer."), exc)

    def data_received(self, data: bytes) -> None:
        self.silent = False
        try:
            self._parser.feed_data(data)
        except HoldfastError as error:
            self._fail(error)
            self.close()
        except httptools.HttpParserError as error:
            cause = error.__context__
            wrong = cause if isinstance(cause, HoldfastError) else ProtocolViolation(f"Not an HTTP answer: {error}.")
            self._fail(wrong)
            self.close()

    # httptools

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._answer is not None:
            self._answer.header(name, value)

    def on_headers_complete(self) -> None:
        if self._answer is not None:
            self._answer.status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        if self._answer is not None:
            self._answer.part(data)

    def on_message_complete(self) -> None:
        self._keep = self._parser.should_keep_alive()
        if self._done is not None and not self._done.done():
            self._done.set_result(None)

    # the driver

    async def exchange(self, request: bytes, answer: Answer) -> None:
        """Send a request and return when its answer is complete. Raises Disconnected or ProtocolViolation."""
        assert self._transport is not None
        self._answer, self.silent = answer, True
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            await self._done
        finally:
            self._answer = None
            if not self._keep or not self._done.done() or self._done.cancelled():
                self.close()

    def close(self) -> None:
        """Drop the connection; a server stops what it was doing for it."""
        self.open = False
        if self._transport is not None:
            self._transport.close()

    def _fail(self, error: HoldfastError, cause: Exception | None = None) -> None:
        if self._done is not None and not self._done.done():
            error.__cause__ = cause
            self._done.set_exception(error)


class HttpDriver:
    """A `Driver` over an endpoint."""

    def __init__(
        self, url: str, prompts: Prompts, *, model: str = "", api_key: str = "", extra: dict[str, Any] | None = None
    ):
        """Prepare; nothing is sent yet.

        Args:
            url: ``http://host:port`` or https, with a path before ``/v1`` if there is one.
            prompts: makes the prompts.
            model: as in requests; empty: the first that the endpoint lists (`find_model`).
            api_key: sent as a bearer token.
            extra: fields added to every request.

        Raises:
            InvalidRequest: not such a URL.
        """
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise InvalidRequest(f"{url!r} is not an http:// or https:// address.")
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._address = parts.hostname, parts.port or (443 if self._tls else 80)
        self._base = parts.path.rstrip("/").removesuffix("/v1")
        key = f"authorization: Bearer {api_key}\r\n" if api_key else ""
        self._head = f"host: {parts.netloc.rpartition('@')[2]}\r\nuser-agent: holdfast-replay\r\n{key}"
        self._prompts = prompts
        self.model = model
        self._extra = {"temperature": 0, "ignore_eos": True} if extra is None else extra
        self._idle: list[_Connection] = []

    async def find_model(self) -> str:
        """Ask the endpoint which models it has and take the first, unless one was given.

        Raises:
            CannotConnect: nobody listens there.
            InvalidRequest: it has none.
        """
        if not self.model:
            answer = Answer(None)
            where = "{}:{}".format(*self._address)
            try:
                async with asyncio.timeout(CONNECT_SECONDS):
                    await self._send(self._request("GET", "/v1/models", b""), answer)
            except TimeoutError as error:
                raise CannotConnect(f"{where} does not say its models within {CONNECT_SECONDS:g} s.") from error
            try:
                listed = msgspec.json.decode(answer.body)
                self.model = str(listed["data"][0]["id"])
            except (msgspec.DecodeError, LookupError, TypeError) as error:
                raise InvalidRequest(f"{where} lists no model (status {answer.status}); name one.") from error
        return self.model

    async def submit(self, job: Job, events: Events) -> None:
        """Send one job and read its stream; see `Driver.submit`."""
        body = {
            "model": self.model,
            "prompt": self._prompts.json(job.request),
            "max_tokens": job.request.output_length,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._extra,
        }
        answer = Answer(events)
        await self._send(self._request("POST", "/v1/completions", msgspec.json.encode(body)), answer)
        answer.judge()

    async def close(self) -> None:
        """Close the connections that nobody uses."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    def _request(self, method: str, path: str, body: bytes) -> bytes:
        head = f"{method} {self._base}{path} HTTP/1.1\r\n{self._head}content-type: application/json\r\n"
        return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body

    async def _send(self, request: bytes, answer: Answer) -> None:
        connection = await self._connection()
        try:
            await connection.exchange(request, answer)
        except Disconnected:
            if not (connection.used and connection.silent):
                raise
            # a kept connection that the server gave up meanwhile
            connection = await self._connect()
            await connection.exchange(request, answer)
        if connection.open:
            connection.used = True
            self._idle.append(connection)

    async def _connection(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.open:
                return connection
        return await self._connect()

    async def _connect(self) -> _Connection:
        host, port = self._address
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                _, connection = await loop.create_connection(_Connection, host, port, ssl=self._tls)
        except (OSError, TimeoutError) as error:
            why = str(error) or "no answer"
            raise CannotConnect(f"Nobody answers at {host}:{port} ({why}).") from error
        return connection
