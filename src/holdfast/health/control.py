"""Control routes of the status server: ``/engine/…``, registered by the process, run on its event loop.

Routes take POST; those that only read take GET as well. `mount` gives them a place outside of ``/engine/`` too.

Who may: this machine, or whoever knows the token; never a web page (a request with an ``Origin``) without it.

Must never answer on the listener's thread: the event loop owns the engine.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import hmac
import logging
import urllib.parse
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec

from holdfast.base.errors import HoldfastError, InternalError
from holdfast.health.http import Answer, HttpRequest, message
from holdfast.health.listener import Pending

log = logging.getLogger(__name__)

PREFIX = "/engine/"
AT_ONCE = 16
"""Control calls under way; more are refused."""
CONTROL_SECONDS = 900.0
"""How long one may take: streams may be waited for, and weights copied."""

ControlRoute = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]
"""Takes the request's JSON object and returns the answer's; runs on the event loop. Raises HoldfastError."""


class _Mount(msgspec.Struct, frozen=True):
    """Routes outside of ``/engine/``, by method."""

    routes: dict[str, ControlRoute]
    item: str


class ControlRoutes:
    """See the module.

    Args:
        token: that callers must know; empty: only this machine may call.
    """

    def __init__(self, token: str = ""):
        self._token = token
        self._routes: dict[str, ControlRoute] = {}
        self._readable: frozenset[str] = frozenset()
        self._mounts: dict[str, _Mount] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._running: set[concurrent.futures.Future[dict[str, Any]]] = set()

    def add(self, name: str, route: ControlRoute, *, reads: bool = False) -> None:
        """Serve ``/engine/<name>`` on the running loop; adding again replaces it.

        Args:
            name: after the prefix.
            route: what to run.
            reads: it changes nothing, so that GET will do.
        """
        self._loop = asyncio.get_running_loop()
        self._readable = self._readable | {name} if reads else self._readable - {name}
        self._routes = {**self._routes, name: route}

    def mount(self, path: str, routes: Mapping[str, ControlRoute], *, item: str) -> None:
        """Serve routes at a path of their own, one per method.

        Args:
            path: such as ``/v1/things``.
            routes: by method.
            item: name of the argument that gets what follows the path (``DELETE /v1/things/<item>``).
        """
        self._loop = asyncio.get_running_loop()
        self._mounts = {**self._mounts, path: _Mount(dict(routes), item)}

    def owns(self, path: str) -> bool:
        """Whether a path is that of control routes; safe in any thread."""
        return path.startswith(PREFIX) or any(path == one or path.startswith(f"{one}/") for one in self._mounts)

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
        found = self._find(request)
        if isinstance(found, Answer):
            return found
        route, named = found
        try:
            arguments = msgspec.json.decode(request.body, type=dict[str, Any]) if request.body.strip() else {}
        except msgspec.DecodeError as error:
            return message(400, f"The body is not a JSON object: {error}.")
        if len(self._running) >= AT_ONCE or self._loop is None:
            return message(503, f"{AT_ONCE} control calls are under way already.")
        self._start(route, arguments | named, pending, self._loop)
        return None

    def _find(self, request: HttpRequest) -> tuple[ControlRoute, dict[str, str]] | Answer:
        """Return the route and the arguments that its path names, or why there is none."""
        if not request.path.startswith(PREFIX):
            return self._mounted(request)
        name = request.path.removeprefix(PREFIX)
        route = self._routes.get(name)
        if route is None:
            there = ", ".join(f"{PREFIX}{known}" for known in sorted(self._routes)) or "none"
            return message(404, f"There is no such control route; there are: {there}.")
        if request.method in ("POST", "PUT") or (request.method == "GET" and name in self._readable):
            return route, {}
        return _not_so("POST")

    def _mounted(self, request: HttpRequest) -> tuple[ControlRoute, dict[str, str]] | Answer:
        path = next(one for one in self._mounts if request.path == one or request.path.startswith(f"{one}/"))
        mount, rest = self._mounts[path], request.path.removeprefix(path).strip("/")
        route = mount.routes.get(request.method)
        if route is None:
            return _not_so(*mount.routes)
        return route, {mount.item: urllib.parse.unquote(rest)} if rest else {}

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
        pending.allow(CONTROL_SECONDS)
        future = asyncio.run_coroutine_threadsafe(_call(route, arguments), loop)
        self._running.add(future)

        def over(done: concurrent.futures.Future[dict[str, Any]]) -> None:
            self._running.discard(done)
            pending.reply(_answer(done))

        future.add_done_callback(over)


def _not_so(*methods: str) -> Answer:
    allowed = ", ".join(methods)
    return Answer(405, message(405, f"This control route takes {allowed}.").body, headers=(("allow", allowed),))


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
