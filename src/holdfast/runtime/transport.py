"""The only door to the network: byte connections for the wire protocol.

Everything else in the runtime sees `Transport`, so that the simulation can put its own network in place.
Must never know what the bytes mean.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import ssl
from collections.abc import Callable
from typing import Any, Protocol

from holdfast.base.errors import CannotConnect

ProtocolFactory = Callable[[], asyncio.Protocol]


class CannotListen(CannotConnect):
    """An address of our own cannot be bound."""

    code = "cannot_listen"
    hint = "Stop what uses it, or choose another port with --tcp-rpc-port (DYN_TCP_RPC_PORT); 0 picks a free one."


class ByteStream(Protocol):
    """What the runtime uses of an `asyncio.Transport`; a simulated network implements just this."""

    def write(self, data: bytes | bytearray) -> None:
        """Send bytes, or keep them until the network takes them."""

    def close(self) -> None:
        """Close after everything written has gone out."""

    def abort(self) -> None:
        """Close now and forget what was not sent."""

    def get_write_buffer_size(self) -> int:
        """Bytes written and not yet taken by the network."""


class Listener(Protocol):
    """An open port."""

    address: str
    """``host:port`` with the port that was really bound."""

    async def close(self) -> None:
        """Accept nothing more. Connections that are open stay open. Idempotent."""


class Transport(Protocol):
    """Makes connections. Protocol objects get asyncio's callbacks, `pause_writing` and `resume_writing` included."""

    authenticates_callers: bool
    """Whether whoever connects to a listener has proved its identity to the transport (mTLS)."""

    async def connect(self, address: str, protocol_factory: ProtocolFactory, timeout: float) -> asyncio.Protocol:  # noqa: ASYNC109
        """Connect to ``host:port`` within ``timeout`` seconds. Raises CannotConnect with the reason."""

    async def listen(self, host: str, port: int, protocol_factory: ProtocolFactory) -> Listener:
        """Listen; port 0 picks a free one. Raises CannotListen when the address cannot be bound."""


def reason_of(error: OSError) -> str:
    """Return the system's own words; asyncio puts a sentence around them that repeats the address."""
    return os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)


def _tls_reason(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted: {error.verify_message}"
    if error.reason == "WRONG_VERSION_NUMBER":
        return "what answers there does not speak TLS"
    return str(error.reason or error)


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of ``host:port`` or ``[v6]:port``. Raises CannotConnect when it is neither."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise CannotConnect(f"{address!r} is not host:port", address=address)
    return host.removeprefix("[").removesuffix("]"), int(port)


def join_address(host: str, port: int) -> str:
    """Return ``host:port``, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a listener on ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _TcpListener:
    def __init__(self, server: asyncio.Server, host: str):
        self._server = server
        self.address = join_address(host, server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        self._server.close()


class TcpTransport:
    """TCP, or TLS when contexts are given. TCP_NODELAY is asyncio's and uvloop's default.

    Args:
        client_tls: context for connecting; None: plain TCP.
        server_tls: context for listening; one with ``verify_mode=CERT_REQUIRED`` makes callers prove themselves.
        server_name: name that a worker's certificate must carry; empty: the host that is connected to.
        handshake_timeout: seconds for a TLS handshake; None: asyncio's own bound.
    """

    def __init__(
        self,
        client_tls: ssl.SSLContext | None = None,
        server_tls: ssl.SSLContext | None = None,
        *,
        server_name: str = "",
        handshake_timeout: float | None = None,
    ):
        self._client_tls = client_tls
        self._server_tls = server_tls
        more = {"ssl_handshake_timeout": handshake_timeout} if handshake_timeout is not None else {}
        self._connecting: dict[str, Any] = {**more} if client_tls is not None else {}
        if server_name and client_tls is not None:
            self._connecting["server_hostname"] = server_name
        self._listening: dict[str, Any] = more if server_tls is not None else {}
        self.authenticates_callers = server_tls is not None and server_tls.verify_mode == ssl.CERT_REQUIRED

    async def connect(self, address: str, protocol_factory: ProtocolFactory, timeout: float) -> asyncio.Protocol:  # noqa: ASYNC109
        """Connect to ``host:port`` within ``timeout`` seconds. Raises CannotConnect with the reason."""
        host, port = split_address(address)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout):
                _, protocol = await loop.create_connection(
                    protocol_factory, host, port, ssl=self._client_tls, **self._connecting
                )
        except TimeoutError:
            raise CannotConnect(
                f"no connection to {address} within {timeout:g} s", address=address, threshold=timeout
            ) from None
        except ssl.SSLError as error:
            raise CannotConnect(
                f"no TLS with {address}: {_tls_reason(error)} (see the settings DYN_TCP_TLS_* here and there)",
                address=address,
            ) from error
        except (OSError, UnicodeError) as error:
            raise CannotConnect(f"cannot connect to {address}: {error}", address=address) from error
        return protocol

    async def listen(self, host: str, port: int, protocol_factory: ProtocolFactory) -> Listener:
        """Listen; port 0 picks a free one. Raises CannotListen when the address cannot be bound."""
        loop = asyncio.get_running_loop()
        try:
            server = await loop.create_server(protocol_factory, host, port, ssl=self._server_tls, **self._listening)
        except OSError as error:
            raise CannotListen(
                f"The wire protocol cannot listen on {join_address(host, port)}: {reason_of(error)}.",
                address=join_address(host, port),
            ) from error
        return _TcpListener(server, host)
