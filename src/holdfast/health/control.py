"""Control routes of the status server: ``/engine/…``, registered by the process, run on its event loop.

Who may: this machine, or whoever knows the token; never a web page (a request with an ``Origin``) without it.

Must never answer on the listener's thread: the event loop owns the engine.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import hmac
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from holdfast.base.errors import HoldfastError, InternalError
from holdfast.health.http import Answer, HttpRequest, message
from holdfast.health.listener import Pending

log = logging.getLogger(__name__)

PREFIX = "/engine/"
AT_ONCE = 16
"""Control calls under way; more are refused."""

ControlRoute = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]
"""Takes the request's JSON object and returns the answer's; runs on the event loop. Raises HoldfastError."""


class ControlRoutes:
    """See the module.

    Args:
        token: that callers must know; empty: only this machine may call.
    """

    def __init__(self, token: str = ""):
        self._token = token
        self._routes: dict[str, ControlRoute] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._running: set[concurrent.futures.Future[dict[str, Any]]] = set()

    def add(self, name: str, route: ControlRoute) -> None:
        """Serve ``/engine/<name>`` on the running loop; adding again replaces it."""
        self._loop = asyncio.get_running_loop()
        self._routes = {**self._routes, name: route}

    def close(self) -> None:
        """Stop what is under way."""
        for future in list(self._running):
            future.cancel()

    # in the listener's thread

    def serve(self, request: HttpRequest, pending: Pending) -> Answer | None:
        """Answer, or pass on to the event loop."""
        refused = self._refuse(request)
        if refused is not None:
            return refused
        name = request.path.removeprefix(PREFIX)
        route = self._routes.get(name)
        if route is None or self._loop is None:
            there = ", ".join(f"{PREFIX}{known}" for known in sorted(self._routes)) or "none"
            return message(404, f"There is no such control route; there are: {there}.")
        if request.method not in ("POST", "PUT"):
            return Answer(405, message(405, "Control routes take POST.").body, headers=(("allow", "POST"),))
        try:
            arguments = msgspec.json.decode(request.body, type=dict[str, Any]) if request.body.strip() else {}
        except msgspec.DecodeError as error:
            return message(400, f"The body is not a JSON object: {error}.")
        if len(self._running) >= AT_ONCE:
            return message(503, f"{AT_ONCE} control calls are under way already.")
        self._start(route, arguments, pending, self._loop)
        return None

    def _refuse(self, request: HttpRequest) -> Answer | None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
        if self._token:
            if hmac.compare_digest(given.encode(), self._token.encode()):
                return None
            return message(401, "Control routes need 'Authorization: Bearer <DYN_SYSTEM_TOKEN>'.")
        if not request.loopback:
            return message(403, "Control routes off loopback need a token: set DYN_SYSTEM_TOKEN.")
        if "origin" in request.headers:
            return message(403, "Control routes are not for web pages; set DYN_SYSTEM_TOKEN to use them from one.")
        return None

    def _start(
        self, route: ControlRoute, arguments: dict[str, Any], pending: Pending, loop: asyncio.AbstractEventLoop
    ) -> None:
        future = asyncio.run_coroutine_threadsafe(_call(route, arguments), loop)
        self._running.add(future)

        def over(done: concurrent.futures.Future[dict[str, Any]]) -> None:
            self._running.discard(done)
            pending.reply(_answer(done))

        future.add_done_callback(over)


async def _call(route: ControlRoute, arguments: dict[str, Any]) -> dict[str, Any]:
    return await route(arguments)


def _answer(done: concurrent.futures.Future[dict[str, Any]]) -> Answer:
    if done.cancelled():
        return message(503, "This process is leaving.")
    error = done.exception()
    if error is None:
        return Answer(200, msgspec.json.encode(done.result(), enc_hook=str))
    if not isinstance(error, HoldfastError):
        log.error("a control route failed", exc_info=error)
        error = InternalError(f"The control route failed: {type(error).__name__}: {error}")
    return Answer(error.status, msgspec.json.encode(error.openai_body(), enc_hook=str))
