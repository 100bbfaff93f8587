"""How a frontend leaves: ``serving → draining → stopping``.

While it drains, its health says so, new clients go to other frontends (those on the same port get the connection
in the first place; elsewhere they are answered 503 with Retry-After), and running answers go on. A client that
holds a connection already could not know: for a moment its next request is still served, and the answer says
``connection: close``. What runs when the grace is over ends with a typed error.

Must never end a stream before the grace is over, unless somebody hurries.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from typing import TYPE_CHECKING

from holdfast.frontend.config import FrontendConfig
from holdfast.frontend.server import Server

if TYPE_CHECKING:
    from holdfast.frontend.app import Frontend

log = logging.getLogger(__name__)

_POLL = 0.01
_SETTLE = 0.1
"""Seconds for connections that were accepted at the last moment to appear."""
_SHARE = 0.5
"""Of the grace, which clients that hold connections may use at most: what they ask then has to end as well."""


class Drain:
    """Owns the signals of a frontend process.

    Args:
        frontend: the application.
        server: its listeners and connections.
        config: grace and weaning.
    """

    def __init__(self, frontend: Frontend, server: Server, config: FrontendConfig):
        self._frontend, self._server = frontend, server
        self._grace = config.http_graceful_shutdown_timeout_secs
        self._weaning = min(config.http_drain_keep_alive, _SHARE * self._grace)

    async def on_signals(self) -> None:
        """First signal: drain; second: hurry; third: now. Runs until it is cancelled."""
        loop = asyncio.get_running_loop()
        signals: asyncio.Queue[int] = asyncio.Queue(maxsize=16)

        def caught(number: int) -> None:
            with contextlib.suppress(asyncio.QueueFull):
                signals.put_nowait(number)

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, caught, number)
        first = await signals.get()
        log.info(
            "%s: draining; %d requests in hand have %g s",
            signal.Signals(first).name,
            self._frontend.generate.in_hand,
            self._grace,
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
