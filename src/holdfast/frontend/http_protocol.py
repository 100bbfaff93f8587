"""Uvicorn's HTTP/1.1 protocol with bounds on what clients may leave unfinished, unread or piled up.

A connection that brings no complete request head, or whose body pauses or trickles, is answered and closed, and
so is one that does not take its answer; heads, pipelines, chunk overhead and the number of connections are bounded;
the kernel's send buffer is bounded so that a client which does not read is noticed. Each request gets a
`ClientWire` (``scope["holdfast.wire"]``), and a short cut to a body that is there (``scope["holdfast.body"]``).

Must never look into requests.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from urllib.parse import unquote

import httptools
import msgspec
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

from holdfast.base.errors import CapacityExhausted
from holdfast.frontend.client_wire import ClientWire
from holdfast.frontend.http_clocks import Bounds, Clocked
from holdfast.openai.errors import Headers, error_response

log = logging.getLogger(__name__)

SEND_BUFFER_BYTES = 256 * 1024
"""Kernel send buffer per client. Autotuning would hide up to 4 MB of unread tokens per stalled client."""
WRITE_HIGH_WATER = 64 * 1024
HEAD_BYTES = 64 * 1024
"""Largest request head, give or take one read."""
BODY_BYTES_PER_SECOND = 4 * 1024
"""A body that comes slower than this on average, after its first pause, is given up."""
CHUNK_OVERHEAD = 8
"""Bytes on the wire per byte of a chunked body; one-byte chunks need 6."""
CHUNK_SLACK = 512 * 1024
PIPELINED = 128
"""Requests that may wait on one connection behind the one that is answered."""
LINGER = 2.0
"""Seconds for which the rest of what a client sends is thrown away, so that it gets to read our last words."""
CROWDED_SECONDS = 2.0
"""After so long a client that was one too many may try again."""
LINGERING = 256
"""Connections that may do so at once."""

_error = msgspec.json.Encoder().encode


class HttpProtocol(Clocked):
    """See the module; `protocol_class` sets the bounds."""

    shared = False
    """It came through a listener that is closed before this frontend drains: whoever is here could not know."""

    watcher: ClientWire | None = None
    """Who is told what happens to the client, while its answer is on its way."""
    _leaving = False
    """The last word has been said; what still comes is thrown away."""
    _upgrade = False
    """The present head asks for another protocol; the parser is about to stop."""
    _head_size = 0
    _wire_size = 0
    """Bytes read since the head of the present request was complete."""
    _body_size = 0
    _late = False
    """It came when this frontend was draining already."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count the connection, or turn it away."""
        super().connection_made(transport)
        bounds = self.bounds
        self.timeout_keep_alive = bounds.keep_alive  # type: ignore[assignment]  # any number of seconds will do
        transport.set_write_buffer_limits(high=WRITE_HIGH_WATER)
        raw = transport.get_extra_info("socket")
        if raw is not None:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        if len(self.connections) - bounds.lingering > bounds.max_connections:
            self._turn_away()
            return
        self._late = bounds.leaving and not self.shared
        self._watch(bounds.head_timeout)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clocks."""
        self._unwatch()
        self._unset_keepalive_if_required()
        self.bounds.lingering -= self._leaving
        self._leaving = False
        watcher, self.watcher = self.watcher, None
        super().connection_lost(exc)
        if watcher is not None:
            watcher.on_lost()

    def pause_writing(self) -> None:
        """The client takes no more bytes for now."""
        super().pause_writing()
        if self.watcher is not None:
            self.watcher.on_blocked()

    def resume_writing(self) -> None:
        """It takes bytes again."""
        super().resume_writing()
        if self.watcher is not None:
            self.watcher.on_writable()

    def data_received(self, data: bytes) -> None:
        """Feed the parser and keep the clock that fits what is still missing."""
        if self._leaving:
            return
        self._unset_keepalive_if_required()
        self._feed(data)
        if self._leaving:
            return
        if self._in_head:
            self._read_head(len(data))
        elif self._in_body:
            self._read_body(len(data))
        elif self._timer is not None:
            self._unwatch()
        elif self.timeout_keep_alive_task is None and (self.cycle is None or self.cycle.response_complete):
            self._keep_alive_again()

    def _feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")
        except httptools.HttpParserUpgrade as upgrade:
            self._feed(self._without_upgrade() + data[upgrade.args[0] :])

    def _without_upgrade(self) -> bytes:
        """Return the present head again without the wish for another protocol (Java's clients always have one).

        The parser has thrown the body's beginning out with it; RFC 9110, section 7.8: a server may ignore the wish.
        """
        self._upgrade = False
        kept = [b"%b: %b\r\n" % (n, v) for n, v in self.headers if n not in (b"upgrade", b"connection")]
        return b"".join([self.parser.get_method(), b" ", self.url, b" HTTP/1.1\r\n", *kept, b"\r\n"])

    def _read_head(self, size: int) -> None:
        if self._idle:
            return
        self._head_size += size
        if self._head_size > HEAD_BYTES:
            self._last_word(431, "head_too_large", f"The request's head is over {HEAD_BYTES} bytes.")
        elif self._timer is None and not self.pipeline:
            self._watch(self.bounds.head_timeout)

    def _read_body(self, size: int) -> None:
        self._wire_size += size
        if self._wire_size > CHUNK_OVERHEAD * self._body_size + CHUNK_SLACK:
            self._last_word(400, "chunks_too_small", "The body's chunks are mostly overhead; send larger ones.")
            return
        if self.cycle.response_complete:
            return
        late = self._since + self._wire_size / BODY_BYTES_PER_SECOND
        self._due = self.bounds.body_timeout + min(self.loop.time(), late)
        if self._timer is None and not self.pipeline:
            self._watch(self.bounds.body_timeout)

    # the parser

    def on_message_begin(self) -> None:
        """A request begins."""
        self._idle = False
        self._in_head = True
        self._head_size = 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header; trailers of chunked bodies are nobody's business."""
        if not self._in_head:
            return
        name = name.lower()
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        """The head is there."""
        if len(self.pipeline) >= PIPELINED:
            raise OverflowError("too many pipelined requests")
        if self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT":
            self._upgrade = True
            return
        self._begin_request()
        self._unwatch()
        self._in_head = False
        self._in_body = True
        self._wire_size = self._body_size = 0
        self._since = self.loop.time()
        if self.bounds.leaving:
            self.cycle.keep_alive = False
            self.scope["holdfast.late"] = self._late  # type: ignore[typeddict-unknown-key]
        wire = ClientWire(self, self.cycle, self.flow, self.transport)
        self.scope["holdfast.wire"] = wire  # type: ignore[typeddict-unknown-key]
        self.scope["holdfast.body"] = wire.body  # type: ignore[typeddict-unknown-key]

    def _begin_request(self) -> None:
        """Let the application begin, or queue it behind the request before it.

        What uvicorn's own method does, less what is not switched on here: WebSockets, a path in front of ours, a bound
        of its own on concurrency.
        """
        parser, scope = self.parser, self.scope
        version = parser.get_http_version()
        scope["method"] = parser.get_method().decode("ascii")
        if version != "1.1":
            scope["http_version"] = version
        url = httptools.parse_url(self.url)
        scope["raw_path"] = url.path
        path = url.path.decode("ascii")
        scope["path"] = unquote(path) if "%" in path else path
        scope["query_string"] = url.query or b""
        before = self.cycle
        self.cycle = cycle = RequestResponseCycle(
            scope,
            self.transport,
            self.flow,
            self.logger,
            self.access_logger,
            self.access_log,
            self.server_state.default_headers,
            asyncio.Event(),
            self.expect_100_continue,
            version != "1.0" and parser.should_keep_alive(),
            self.on_response_complete,
        )
        if before is None or before.response_complete:
            self._start_asgi_task(cycle, self.app)
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((cycle, self.app))

    def on_body(self, body: bytes) -> None:
        """A part of the body, its chunks taken apart."""
        self._body_size += len(body)
        cycle = self.cycle
        if cycle.response_complete:
            return
        cycle.body += body
        if len(cycle.body) > HIGH_WATER_LIMIT:
            self.flow.pause_reading()
        cycle.message_event.set()

    def on_message_complete(self) -> None:
        """The whole request is there; the next one may take its time (keep-alive bound)."""
        if self._upgrade:
            return
        self._in_body = False
        cycle = self.cycle
        if not cycle.response_complete:
            cycle.more_body = False
            cycle.message_event.set()

    # the answer

    def on_response_complete(self) -> None:
        """See that the client takes it; what it still sends of its request is thrown away for a moment."""
        super().on_response_complete()
        if self.transport.is_closing():
            self._unwatch()
            if self.transport.get_write_buffer_size():
                self._watch_flush()
        elif self.flow.write_paused:
            self._unset_keepalive_if_required()
            self._watch_flush()
        elif self._in_body and self.cycle.response_complete:
            self._unwatch()
            self._due = 0.0
            self._watch(LINGER)
        elif self._timer is None and not self.pipeline:
            self._await_rest()

    def _give_up(self) -> None:
        cycle = self.cycle
        if self._idle:
            self.transport.close()
        elif self._in_head and cycle is not None and not cycle.response_complete:
            cycle.keep_alive = False  # the next request will not be waited for; the present answer goes on
        elif self._in_body and cycle.response_complete:
            self.transport.abort()
        elif self._in_head:
            self._too_slow("head", f"within {self.bounds.head_timeout:g} s (DYN_HTTP_HEAD_TIMEOUT_SECS)")
        else:
            self._too_slow(
                "body",
                f"for {self.bounds.body_timeout:g} s (DYN_HTTP_BODY_TIMEOUT_SECS), "
                f"or at less than {BODY_BYTES_PER_SECOND} bytes/s",
            )

    def _too_slow(self, what: str, bound: str) -> None:
        self._last_word(408, "request_timeout", f"The rest of the request's {what} did not come {bound}.")

    # last words

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP."""
        self._last_word(400, "invalid_http", f"{msg} This server speaks HTTP/1.1 without TLS.")

    def _turn_away(self) -> None:
        """There are too many connections: say so like every other rejection."""
        bounds = self.bounds
        log.warning("client turned away: %d connections (DYN_HTTP_MAX_CONNECTIONS)", bounds.max_connections)
        error = CapacityExhausted(
            f"This frontend has {bounds.max_connections} connections, its limit (DYN_HTTP_MAX_CONNECTIONS).",
            retry_after=CROWDED_SECONDS,
            layer="frontend",
            knob="DYN_HTTP_MAX_CONNECTIONS",
            threshold=bounds.max_connections,
            measured=len(self.connections) - bounds.lingering - 1,
        )
        bounds.on_turned_away(error)
        answer = error_response(error, overload_status=bounds.overload_status)
        self._close_with(answer.status, answer.headers, answer.body)

    def _last_word(self, status: int, code: str, message: str) -> None:
        """Answer without the application and close."""
        body = _error({"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}})
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        self._close_with(status, headers, body)

    def _close_with(self, status: int, headers: Headers, body: bytes) -> None:
        """Say the last word and close; where another answer is due first: just drop."""
        if self.transport.is_closing():
            return
        if not self._may_speak():
            self._drop()
            return
        head = [b"%b: %b\r\n" % header for header in (*headers, (b"connection", b"close"))]
        self.transport.write(b"".join([STATUS_LINE[status], *head, b"\r\n", body]))
        if self.bounds.lingering >= LINGERING:
            self.transport.close()
        else:
            self._linger()

    def _drop(self) -> None:
        """Close at once; whose answer it cuts learns it before it writes again."""
        watcher, self.watcher = self.watcher, None
        if self.cycle is not None:
            self.cycle.disconnected = not self.cycle.response_complete
        self.transport.abort()
        if watcher is not None:
            watcher.on_lost()

    def _may_speak(self) -> bool:
        """Say whether the client would take our words for the answer to what it sends now."""
        cycle = self.cycle
        if cycle is None:
            return True
        if self._in_body:
            return not self.pipeline and not cycle.response_started
        return cycle.response_complete

    def _linger(self) -> None:
        self._leaving = True
        self.bounds.lingering += 1
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._unwatch()
        if self.transport.can_write_eof():  # TLS has no half that could be closed
            self.transport.write_eof()
        self._timer = self.loop.call_later(LINGER, self.transport.abort)


def protocol_class(bounds: Bounds) -> type[HttpProtocol]:
    """Return the protocol with these bounds, for uvicorn's ``http=``."""
    return type("BoundedHttpProtocol", (HttpProtocol,), {"bounds": bounds})
