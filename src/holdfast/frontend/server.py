"""Uvicorn, told what it needs for long-lived streams, with signals handled by the process itself.

Must never know routes.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import resource
import socket
import struct
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import uvicorn

from holdfast.base.errors import Conflict
from holdfast.base.settings import InvalidSetting
from holdfast.frontend.config import FrontendConfig
from holdfast.frontend.http_clocks import Bounds
from holdfast.frontend.http_protocol import protocol_class
from holdfast.frontend.https import https_context
from holdfast.runtime.tls_renewal import Renewal

if TYPE_CHECKING:
    from holdfast.frontend.app import Frontend

log = logging.getLogger(__name__)

BACKLOG = 2048
_LETTING_GO = 0.02
"""Seconds in which the event loop has closed its own copy of a socket for sure."""
_HANDSHAKE = 0.005
"""Seconds in which handshakes that had begun are over, unless the client is further away than that. Who begins one now
has to try again, which costs it a second, so this is short."""
_SO_ATTACH_FILTER = 26
_NO_SYN = ((0x30, 0, 0, 13), (0x45, 0, 1, 0x02), (0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFFFFFF))
"""Classic BPF over the TCP header: load the byte of flags; with SYN among them drop, else let pass."""
SPARE_FILES = 1024
"""Open files beside clients: workers, children, logs."""


class Server(uvicorn.Server):
    """A uvicorn server whose owner decides about signals and about leaving.

    Args:
        config: uvicorn's.
        bounds: of its connections.
    """

    def __init__(self, config: uvicorn.Config, bounds: Bounds):
        super().__init__(config)
        self._bounds = bounds
        self._sharing: list[tuple[asyncio.Server, socket.socket]] = []
        """Listeners on a port that other frontends share."""

    @property
    def connections(self) -> int:
        """Connections of clients, idle ones included."""
        return len(self.server_state.connections)

    async def retire(self) -> None:
        """Leave new connections to those who share the port; every answer is the last one on its connection.

        A queue of our own is emptied before it is closed, for the kernel would reset what waits in it; and first no
        new connection may come into it (`_close_to_new`), so that none slips in between. The event loop closes its
        sockets when it comes to it, so a copy keeps the queue until it has let go.
        """
        self._bounds.leaving = True
        own = [sock.dup() for _, sock in self._sharing if sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT)]
        for server, _ in self._sharing:
            server.close()
        if not own:
            return
        await asyncio.sleep(_LETTING_GO)
        for sock in own:
            _close_to_new(sock)
        await asyncio.sleep(_HANDSHAKE)
        waiting = [connection for sock in own for connection in _emptied(sock)]
        for connection in waiting:
            connection.setblocking(False)
            with contextlib.suppress(OSError):
                await asyncio.get_running_loop().connect_accepted_socket(
                    self._shared_protocol, connection, ssl=self.config.ssl
                )

    async def accept_on(self, sock: socket.socket) -> None:
        """Take connections from another listening socket as well, shared with other frontends; once it has started."""
        loop = asyncio.get_running_loop()
        server = await loop.create_server(
            self._shared_protocol, sock=sock, backlog=self.config.backlog, ssl=self.config.ssl
        )
        self.servers.append(server)
        self._sharing.append((server, sock))

    def _shared_protocol(self) -> asyncio.Protocol:
        protocol: Any = type("SharedHttpProtocol", (self.config.http_protocol_class,), {"shared": True})
        made: asyncio.Protocol = protocol(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        return made

    def close_idle(self) -> None:
        """Close connections without a request, and the others after their present one."""
        for connection in list(self.server_state.connections):
            connection.shutdown()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leave signals alone: `frontend.process` drains first."""
        yield


def _close_to_new(sock: socket.socket) -> None:
    """Let a listening socket overlook new connections: their clients try again after a second and find another one.

    Handshakes that have begun come to their end. Where the system has no such filters (they are Linux's), a connection
    that arrives at this very moment may be reset.
    """
    code = b"".join(struct.pack("HBBI", *step) for step in _NO_SYN)
    held = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HP", len(_NO_SYN), ctypes.addressof(held))
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)


def _emptied(sock: socket.socket) -> list[socket.socket]:
    """Close a listening socket with nothing in its queue; returns what was there."""
    found: list[socket.socket] = []
    sock.setblocking(False)
    with sock, contextlib.suppress(OSError):
        while True:
            found.append(sock.accept()[0])
    return found


def inherited(descriptor: int) -> socket.socket:
    """Return a listening socket that this process was started with.

    Raises:
        InvalidSetting: there is none under that number.
    """
    try:
        sock = socket.socket(fileno=descriptor)
        listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError:
        listens = 0
    if not listens:
        raise InvalidSetting(f"DYN_HTTP_LISTEN_FD={descriptor}: no listening socket was inherited under that number.")
    sock.setblocking(False)
    return sock


def listen(host: str, port: int, *, reuse_port: bool = False) -> socket.socket:
    """Return a listening socket; with ``reuse_port`` one that is only bound, as others on this machine may do.

    A socket that shares its port does not listen before somebody accepts from it: the kernel would give it
    connections that others could serve.

    Raises:
        Conflict: the port is taken or the address is not ours; the message says what to do.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if reuse_port:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        sock.bind((host, port))
        if not reuse_port:
            sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise Conflict(
            f"The HTTP API cannot listen on {host}:{port}: {error.strerror}. Stop what uses that port, "
            "or choose another one with --http-port (0 picks a free one).",
            host=host,
            port=port,
        ) from error
    sock.setblocking(False)
    return sock


def allow_files(connections: int) -> None:
    """Raise this process's soft limit of open files so that so many clients fit; say so when they do not."""
    needed = connections + SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        log.warning(
            "at most %d files may be open here, %d are needed for DYN_HTTP_MAX_CONNECTIONS=%d: raise the hard limit "
            "(ulimit -Hn) or lower that setting",
            hard,
            needed,
            connections,
        )
        needed = hard
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def make_server(app: Frontend, config: FrontendConfig, renewal: Renewal | None = None) -> Server:
    """Return a server for this application; run it with ``await server.serve(sockets=[…])``.

    Args:
        app: answers requests.
        config: the frontend's settings.
        renewal: is told which certificates are in use; None: they are read once.
    """
    tls = https_context(config.https, renewal)
    bounds = Bounds(
        head_timeout=config.http_head_timeout,
        body_timeout=config.http_body_timeout,
        keep_alive=config.http_keep_alive,
        stall_timeout=config.requests.client_stall_timeout,
        max_connections=config.http_max_connections,
        overload_status=config.http_overload_status_code,
        on_turned_away=app.metrics.turned_away,
    )
    server = Server(
        uvicorn.Config(
            app,
            loop="none",
            http=protocol_class(bounds),
            ws="none",
            interface="asgi3",
            lifespan="off",
            log_config=None,
            log_level=None,
            access_log=False,
            server_header=False,
            date_header=False,
            proxy_headers=False,
            backlog=BACKLOG,
            timeout_graceful_shutdown=1,
            ssl_context_factory=None if tls is None else lambda _config, _default: tls,
        ),
        bounds,
    )
    app.connections = lambda: server.connections
    return server
