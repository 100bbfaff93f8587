"""Uvicorn, told what it needs for long-lived streams, with signals handled by the process itself.

Must never know routes.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Generator
from typing import Any

import uvicorn

from holdfast.base.errors import Conflict
from holdfast.frontend.config import FrontendConfig
from holdfast.frontend.http_protocol import Bounds, protocol_class

BACKLOG = 2048


class Server(uvicorn.Server):
    """A uvicorn server whose owner decides about signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leave signals alone: `frontend.process` drains first."""
        yield


def listen(host: str, port: int) -> socket.socket:
    """Return a bound socket.

    Raises:
        Conflict: the port is taken or the address is not ours; the message says what to do.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
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


def make_server(app: Any, config: FrontendConfig) -> Server:
    """Return a server for this ASGI application; run it with ``await server.serve(sockets=[…])``."""
    return Server(
        uvicorn.Config(
            app,
            loop="none",
            http=protocol_class(
                Bounds(
                    head_timeout=config.http_head_timeout,
                    body_timeout=config.http_body_timeout,
                    keep_alive=config.http_keep_alive,
                    stall_timeout=config.requests.client_stall_timeout,
                    max_connections=config.http_max_connections,
                )
            ),
            ws="none",
            lifespan="off",
            log_config=None,
            log_level=None,
            access_log=False,
            server_header=False,
            date_header=False,
            proxy_headers=False,
            backlog=BACKLOG,
            timeout_graceful_shutdown=1,
        )
    )
