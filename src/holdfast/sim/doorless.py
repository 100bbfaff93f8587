"""An event loop without doors: what other loops do with sockets, processes, signals and threads is an escape here.

Must never do any of it.
"""

from __future__ import annotations

import asyncio

from holdfast.sim.guard import refusal

WAYS_OUT = (
    *("add_signal_handler", "remove_signal_handler", "add_reader", "remove_reader", "add_writer", "remove_writer"),
    *("sock_recv", "sock_recv_into", "sock_recvfrom", "sock_sendall", "sock_sendto", "sock_connect", "sock_accept"),
    *("sock_sendfile", "sendfile", "start_tls", "connect_accepted_socket", "create_datagram_endpoint"),
    *("create_connection", "create_server", "create_unix_connection", "create_unix_server"),
    *("connect_read_pipe", "connect_write_pipe", "subprocess_exec", "subprocess_shell", "getaddrinfo", "getnameinfo"),
)
"""Methods of event loops that lead to the real world."""


class DoorlessLoop(asyncio.BaseEventLoop):
    """See the module."""

    async def shutdown_asyncgens(self) -> None:
        """There is nothing to wait for."""

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:  # noqa: ASYNC109
        """There are no threads."""


for _name in WAYS_OUT:
    setattr(DoorlessLoop, _name, refusal(f"loop.{_name}"))
