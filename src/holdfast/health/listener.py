"""A thread of its own that answers HTTP, so that a busy or stuck event loop changes nothing for those who ask.

Answers that need work (rendering metrics, asking the engine) come back later through `Pending.reply` from any
thread; the listener itself never waits for anybody. Everything a client can do is bounded: connections, the
size of a request, the time until it is complete, the time until its answer is taken. When all connections are
in use the one that has been incomplete for longest makes room, so that idle clients never lock a probe out.

Must never run code of the process in its thread that can take longer than microseconds.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable

from holdfast.base.errors import CannotConnect, Conflict, HoldfastError
from holdfast.health.http import Answer, HttpRequest, Refused, message, parse, render
from holdfast.runtime.transport import is_loopback, join_address

log = logging.getLogger(__name__)

CONNECTIONS = 64
REQUEST_SECONDS = 5.0
"""A request must be complete within this."""
ANSWER_SECONDS = 60.0
"""A pending answer must come, and be taken, within this, unless the handler allows more."""
TICK_SECONDS = 0.5
"""How often the thread looks at its own clock."""
_ACCEPTS = 16
_READ_BYTES = 64 * 1024
_STOP_SECONDS = 2.0


class Pending:
    """The place where a later answer goes; safe from any thread, only the first answer counts."""

    __slots__ = ("_connection", "_listener")

    def __init__(self, listener: Listener, connection: _Connection):
        self._listener = listener
        self._connection = connection

    def allow(self, seconds: float) -> None:
        """Let the answer take so long; to be called by the handler itself."""
        self._connection.bound = seconds
        self._connection.deadline = time.monotonic() + seconds

    def reply(self, answer: Answer) -> None:
        """Send the answer."""
        self._listener.hand_in(self._connection, answer)


Handler = Callable[[HttpRequest, Pending], Answer | None]
"""Answers at once, or returns None and lets `Pending.reply` do it."""


class _Connection:
    __slots__ = ("bound", "deadline", "head_only", "inbox", "outbox", "socket", "stage")

    def __init__(self, sock: socket.socket, deadline: float):
        self.socket = sock
        self.deadline = deadline
        self.bound = ANSWER_SECONDS
        self.inbox = bytearray()
        self.outbox = memoryview(b"")
        self.stage = "reading"
        """``reading``, ``pending``, ``writing``, ``lingering`` (the answer is out, what still comes is dropped)."""
        self.head_only = False


class Listener:
    """See the module.

    Args:
        host: address to bind.
        port: 0 picks a free one.
        handler: called in this thread for each request.
        on_tick: called in this thread every `TICK_SECONDS`, with whether it was on time.
        setting: the variable that decides the port, for messages.
    """

    def __init__(
        self,
        host: str,
        port: int,
        handler: Handler,
        on_tick: Callable[[bool], None] = lambda _: None,
        *,
        setting: str = "DYN_SYSTEM_PORT",
    ):
        self._handler = handler
        self._on_tick = on_tick
        self._loopback = is_loopback(host)
        self._socket = _bind(host, port, setting)
        self.address = join_address(host, self._socket.getsockname()[1])
        """``host:port``."""
        self._selector = selectors.DefaultSelector()
        self._connections: dict[socket.socket, _Connection] = {}
        self._answers: deque[tuple[_Connection, Answer]] = deque()
        self._waker, self._woken = socket.socketpair()
        for sock in (self._waker, self._woken):
            sock.setblocking(False)
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="holdfast-status", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._selector.register(self._socket, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._thread.start()

    def stop(self) -> None:
        """Close everything; waits for the thread, which is a matter of milliseconds. Idempotent."""
        self._stopping = True
        self._wake()
        if self._thread.is_alive():
            self._thread.join(_STOP_SECONDS)
        self._socket.close()

    def hand_in(self, connection: _Connection, answer: Answer) -> None:
        """Take a later answer, from any thread."""
        self._answers.append((connection, answer))
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # full: it will wake anyway; closed: nobody is left to wake
            self._waker.send(b"\0")

    # in the thread

    def _run(self) -> None:
        due = time.monotonic() + TICK_SECONDS
        while not self._stopping:
            try:
                for key, mask in self._selector.select(max(0.0, due - time.monotonic())):
                    self._serve(key.fileobj, mask)
                self._take_answers()
                now = time.monotonic()
                if now >= due:
                    self._on_tick(now - due < TICK_SECONDS)
                    self._expire(now)
                    due = now + TICK_SECONDS
            except Exception:
                log.exception("the status server had a fault; it goes on")
        for connection in list(self._connections.values()):
            self._close(connection)
        self._selector.close()
        for sock in (self._socket, self._waker, self._woken):
            sock.close()

    def _serve(self, where: object, mask: int) -> None:
        if where is self._socket:
            self._accept()
        elif where is self._woken:
            with contextlib.suppress(BlockingIOError):
                self._woken.recv(4096)
        elif isinstance(where, socket.socket) and where in self._connections:
            connection = self._connections[where]
            try:
                if mask & selectors.EVENT_WRITE:
                    self._write(connection)
                else:
                    self._read(connection)
            except BlockingIOError:
                pass
            except OSError:
                self._close(connection)

    def _accept(self) -> None:
        for _ in range(_ACCEPTS):
            try:
                sock, _peer = self._socket.accept()
            except OSError:
                return
            sock.setblocking(False)
            if len(self._connections) >= CONNECTIONS and not self._make_room():
                sock.close()
                continue
            connection = self._connections[sock] = _Connection(sock, time.monotonic() + REQUEST_SECONDS)
            self._selector.register(sock, selectors.EVENT_READ)
            self._serve(connection.socket, selectors.EVENT_READ)  # the request is often there already

    def _make_room(self) -> bool:
        """Close the connection that has been incomplete for longest; False when all of them are being answered."""
        for connection in self._connections.values():
            if connection.stage in ("reading", "lingering"):
                self._close(connection)
                return True
        return False

    def _read(self, connection: _Connection) -> None:
        data = connection.socket.recv(_READ_BYTES)
        if not data:
            self._close(connection)
            return
        if connection.stage != "reading":
            return
        connection.inbox += data
        try:
            request = parse(connection.inbox, loopback=self._loopback)
        except Refused as refusal:
            self._answer(connection, refusal.answer)
            return
        if request is None:
            return
        connection.stage = "pending"
        connection.head_only = request.method == "HEAD"
        connection.deadline = time.monotonic() + ANSWER_SECONDS
        answer = self._ask(request, Pending(self, connection))
        if answer is not None:
            self._answer(connection, answer)

    def _ask(self, request: HttpRequest, pending: Pending) -> Answer | None:
        try:
            return self._handler(request, pending)
        except Exception:
            log.exception("answering %s failed", request.path[:100])
            return message(500, "The status server could not make up this answer; its log says why.")

    def _take_answers(self) -> None:
        while self._answers:
            connection, answer = self._answers.popleft()
            if connection.stage == "pending" and connection.socket in self._connections:
                self._answer(connection, answer)

    def _answer(self, connection: _Connection, answer: Answer) -> None:
        connection.stage = "writing"
        connection.inbox.clear()
        connection.outbox = memoryview(render(answer, with_body=not connection.head_only))
        try:
            self._write(connection)
        except BlockingIOError:
            self._selector.modify(connection.socket, selectors.EVENT_WRITE)
        except OSError:
            self._close(connection)

    def _write(self, connection: _Connection) -> None:
        sent = connection.socket.send(connection.outbox)
        connection.outbox = connection.outbox[sent:]
        if connection.outbox:
            self._selector.modify(connection.socket, selectors.EVENT_WRITE)
            return
        # closing at once could destroy the answer while the client still sends; its own close ends it
        connection.stage = "lingering"
        connection.socket.shutdown(socket.SHUT_WR)
        self._selector.modify(connection.socket, selectors.EVENT_READ)
        connection.deadline = min(connection.deadline, time.monotonic() + REQUEST_SECONDS)

    def _expire(self, now: float) -> None:
        for connection in [c for c in self._connections.values() if now >= c.deadline]:
            if connection.stage == "pending":
                connection.deadline = now + REQUEST_SECONDS
                self._answer(connection, message(504, f"There was no answer within {connection.bound:g} s."))
            else:
                self._close(connection)

    def _close(self, connection: _Connection) -> None:
        if self._connections.pop(connection.socket, None) is not None:
            self._selector.unregister(connection.socket)
        connection.socket.close()


def _bind(host: str, port: int, setting: str) -> socket.socket:
    """Return a listening socket.

    Raises:
        Conflict: the port is taken.
        CannotConnect: the address cannot be used.
    """
    where = join_address(host, port)
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, proto)
    except OSError as error:
        raise CannotConnect(f"The status server cannot use the address {where}: {error}.") from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(128)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise _bind_error(error, where, setting) from error
    return sock


def _bind_error(error: OSError, where: str, setting: str) -> HoldfastError:
    if error.errno == errno.EADDRINUSE:
        return Conflict(
            f"The status server cannot listen on {where} ({setting}): the port is taken. Stop whoever has it, choose "
            "another port, or 0 for a free one; a negative port turns the status server off.",
            address=where,
        )
    return CannotConnect(f"The status server cannot listen on {where} ({setting}): {error.strerror}.", address=where)
