"""The context of one call: its id, whether it is to stop, and its children.

``stop`` asks for an orderly end, ``kill`` for an immediate one; both go down to every child, never up. A context
never starts or ends work itself: it tells those who watch it.
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import Callable
from typing import Literal

from holdfast.wire.frames import OpenHeaders

log = logging.getLogger(__name__)

ContextState = Literal["running", "stopped", "killed"]
ContextWatcher = Callable[[ContextState], None]


class Context:
    """A call's context. States only go forward: running → stopped → killed.

    Args:
        context_id: the request id it stands for.
        headers: what travelled with the call; None: only the id is known.
    """

    __slots__ = ("__weakref__", "_changed", "_children", "_id", "_state", "_watchers", "headers", "metadata")

    def __init__(self, context_id: str, headers: OpenHeaders | None = None):
        self._id = context_id
        self._state: ContextState = "running"
        self._children: dict[int, weakref.ref[Context]] = {}
        self._watchers: list[ContextWatcher] = []
        self._changed = asyncio.Event()
        self.headers = headers if headers is not None else OpenHeaders(request_id=context_id)
        self.metadata: dict[str, str] = {}
        """Facts that the owner of the call wants to keep with it; they do not travel."""

    def id(self) -> str:
        """Return the request id."""
        return self._id

    @property
    def state(self) -> ContextState:
        """Where it stands."""
        return self._state

    def is_stopped(self) -> bool:
        """Whether an end was asked for, orderly or not."""
        return self._state != "running"

    def is_killed(self) -> bool:
        """Whether an immediate end was asked for."""
        return self._state == "killed"

    def stop(self) -> None:
        """Ask for an orderly end, here and in every child. Idempotent."""
        if self._state == "running":
            self._move("stopped")

    def stop_generating(self) -> None:
        """Do as `stop`; the name that serving frameworks know."""
        self.stop()

    def kill(self) -> None:
        """Ask for an immediate end, here and in every child. Idempotent."""
        if self._state != "killed":
            self._move("killed")

    async def stopped(self) -> None:
        """Wait until an end is asked for."""
        await self._changed.wait()

    async def async_killed_or_stopped(self) -> bool:
        """Do as `stopped`, and return True."""
        await self._changed.wait()
        return True

    def child(self, context_id: str = "") -> Context:
        """Return a new context that stops and is killed with this one; without an id it has ours."""
        made = Context(context_id or self._id, self.headers)
        self.link_child(made)
        return made

    def link_child(self, child: Context) -> None:
        """Let a context stop and be killed with this one, at once when that has happened already."""
        key = id(child)
        self._children[key] = weakref.ref(child, lambda _: self._children.pop(key, None))
        child.follow(self._state)

    def watch(self, watcher: ContextWatcher) -> Callable[[], None]:
        """Call back on every step forward, at once when one was made already; returns the way to stop it."""
        self._watchers.append(watcher)
        if self._state != "running":
            self._tell(watcher)

        def unwatch() -> None:
            if watcher in self._watchers:
                self._watchers.remove(watcher)

        return unwatch

    def follow(self, state: ContextState) -> None:
        """Take over a parent's state."""
        if state == "stopped":
            self.stop()
        elif state == "killed":
            self.kill()

    def _move(self, state: ContextState) -> None:
        self._state = state
        self._changed.set()
        for watcher in list(self._watchers):
            self._tell(watcher)
        for reference in list(self._children.values()):
            child = reference()
            if child is not None:
                child.follow(state)

    def _tell(self, watcher: ContextWatcher) -> None:
        try:
            watcher(self._state)
        except Exception:
            log.exception("a watcher of context %s raised", self._id)
