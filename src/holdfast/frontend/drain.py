"""How a frontend leaves: ``serving → draining → stopping``.

Where that is wanted, its health says for a moment that it leaves before anything else changes, so that balancers look
away first. While it drains, new clients go to other frontends (those on the same port get the connection in the first
place; elsewhere they are answered 503 with Retry-After), and running answers go on. A client that holds a connection
already could not know: for a moment its next request is still served, and the answer says ``connection: close``. What
runs when the grace is over ends with a typed error.

Must never end a stream before the grace is over, unless somebody hurries.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from typing import TYPE_CHECKING, Protocol

from holdfast.frontend.config import FrontendConfig

if TYPE_CHECKING:
    from holdfast.frontend.app import Frontend

log = logging.getLogger(__name__)

_POLL = 0.01
_SETTLE = 0.1
"""Seconds for connections that were accepted at the last moment to appear."""
_SHARE = 0.5
"""Of the grace, which clients that hold connections may use at most: what they ask then has to end as well."""


class Listening(Protocol):
    """What leaving asks of the listeners and their connections (`server.Server`)."""

    should_exit: bool
    """Set when everything has been said."""
    force_exit: bool
    """Set when nobody waits any more."""

    @property
    def connections(self) -> int:
        """Connections of clients, idle ones included."""

    async def retire(self) -> None:
        """Leave new connections to others."""

    def close_idle(self) -> None:
        """Close the connections on which nothing is going on."""


class Drain:
    """Owns the signals of a frontend process.

    Args:
        frontend: the application.
        server: its listeners and connections.
        config: notice, grace and weaning.
    """

    def __init__(self, frontend: Frontend, server: Listening, config: FrontendConfig):
        self._frontend, self._server = frontend, server
        self._notice = config.http_drain_notice
        self._grace = config.http_graceful_shutdown_timeout_secs
        self._weaning = min(config.http_drain_keep_alive, _SHARE * self._grace)
        self._signals: asyncio.Queue[int] = asyncio.Queue(maxsize=16)

    def caught(self, number: int) -> None:
        """Somebody wants this process to leave."""
        with contextlib.suppress(asyncio.QueueFull):
            self._signals.put_nowait(number)

    async def on_signals(self) -> None:
        """Obey this process's signals until cancelled."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.caught, number)
        await self.obey()

    async def obey(self) -> None:
        """First signal: drain; second: hurry; third: now. Runs until it is cancelled."""
        signals = self._signals
        first = await signals.get()
        log.info(
            "%s: draining; %d requests in hand have %g s",
            signal.Signals(first).name,
            self._frontend.generate.in_hand,
            self._notice + self._grace,
        )
        async with asyncio.TaskGroup() as group:
            draining = group.create_task(self.run())
            hurry = group.create_task(signals.get())
            await asyncio.wait({draining, hurry}, return_when=asyncio.FIRST_COMPLETED)
            draining.cancel()
            hurry.cancel()
        self._frontend.end_all()
        self._server.should_exit = True
        await signals.get()
        log.warning("third signal: leaving at once")
        self._server.force_exit = True

    async def run(self) -> None:
        """Drain; returns when nothing is left to do, or when the grace is over."""
        loop = asyncio.get_running_loop()
        self._frontend.announce()
        if self._notice:
            await asyncio.sleep(self._notice)
        began = loop.time()
        self._frontend.turn_away()
        await self._server.retire()
        # in both loops: connections and requests are counted by others and have no event
        while loop.time() < began + self._patience():  # noqa: ASYNC110
            await asyncio.sleep(_POLL)
        self._frontend.generate.weaning = False
        self._server.close_idle()
        while self._frontend.generate.in_hand and loop.time() < began + self._grace:  # noqa: ASYNC110
            await asyncio.sleep(_POLL)

    def _patience(self) -> float:
        """Return for how long those who hold connections are served, seconds from the beginning."""
        return self._weaning if self._server.connections else min(self._weaning, _SETTLE)
