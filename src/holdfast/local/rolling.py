"""Rolling restarts: one process after the other makes room for a new one, the next only when that one is used.

A worker is back when every frontend sends it work; that is more than its own opinion of being ready. A frontend is
back when it can use every worker. Before each step all others of the same kind have to be in service, so that there
are never fewer than all but one (promise P9). What does not come back stops the restart where it is.

Must never take two processes down at once, and never go on after a failure.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Literal

import msgspec

from holdfast.base.errors import HoldfastError
from holdfast.local import http
from holdfast.local.supervisor import Supervisor

log = logging.getLogger(__name__)

Role = Literal["worker", "frontend"]
ROLES: tuple[Role, ...] = ("worker", "frontend")

_POLL_SECONDS = 0.05
_ANSWER_SECONDS = 2.0
_WAITING = 4
"""Restarts that may wait for the present one."""


class RestartStopped(HoldfastError):
    """A rolling restart could not go on; what was not replaced yet still runs."""

    code = "restart_stopped"
    fault = "capacity"
    status = 503
    hint = "Look at the lines of the process that is named; start the restart again once it is fixed."


class Report(msgspec.Struct, frozen=True):
    """How a rolling restart went, as the supervisor's record shows it."""

    number: int = 0
    """Restarts that have ended since the supervisor started."""
    role: str = ""
    replaced: int = 0
    of: int = 0
    error: str = ""


class Rolling:
    """See the module.

    Args:
        supervisor: runs the slots.
        frontends: own base URL of each frontend, by slot.
        patience: seconds that each process may take to be in service.
        on_change: called when `report` or `under_way` has changed.
    """

    def __init__(
        self,
        supervisor: Supervisor,
        frontends: Callable[[], Mapping[str, str]],
        patience: float,
        on_change: Callable[[], None] = lambda: None,
        tls: ssl.SSLContext | None = None,
    ):
        self.report = Report()
        self.under_way = ""
        """``worker 2/3`` while a restart runs."""
        self._supervisor = supervisor
        self._frontends = frontends
        self._patience = patience
        self._on_change = on_change
        self._tls = tls
        self._asked: asyncio.Queue[Role] = asyncio.Queue(_WAITING)
        self._one = asyncio.Lock()

    def ask(self, role: Role) -> None:
        """Restart all processes of a role as soon as nothing else is being restarted; `serve_requests` does it."""
        try:
            self._asked.put_nowait(role)
        except asyncio.QueueFull:
            log.warning("%d restarts wait already; this one is not added", _WAITING)

    async def serve_requests(self) -> None:
        """Do what `ask` is told, one after the other, for ever."""
        while True:
            role = await self._asked.get()
            try:
                await self.restart(role)
            except RestartStopped:
                while not self._asked.empty():  # what was to follow would meet the same trouble
                    self._asked.get_nowait()

    async def restart(self, role: Role) -> Report:
        """Replace all processes of a role, one after the other.

        Raises:
            RestartStopped: one was not in service in time; the message names it and says what is missing.
        """
        async with self._one:
            names = [name for name in self._supervisor.slots if name.startswith(role)]
            done, error = 0, ""
            try:
                for name in names:
                    self._show(f"{role} {done + 1}/{len(names)}")
                    await self._step(name, [other for other in names if other != name])
                    done += 1
            except RestartStopped as stopped:
                error = stopped.message
                log.error("rolling restart stopped: %s", error)  # noqa: TRY400  the sentence says it all
                raise
            finally:
                self.report = Report(self.report.number + 1, role, done, len(names), error)
                self._show("")
            log.info("rolling restart: all %d %ss were replaced", done, role)
            return self.report

    def _show(self, under_way: str) -> None:
        self.under_way = under_way
        self._on_change()

    async def _step(self, name: str, others: list[str]) -> None:
        for other in others:
            await self._until(lambda other=other: self._in_service(other), other, "so nothing is replaced")  # type: ignore[misc]
        slot = self._supervisor.slots[name]
        before = slot.pid
        if not await self._supervisor.replace(name):
            log.info("%s is not running; waiting for its next process", name)

        async def back() -> bool:
            return slot.pid not in (None, before) and await self._in_service(name)

        await self._until(back, name, "after it was replaced")

    async def _until(self, condition: Callable[[], Awaitable[bool]], name: str, when: str) -> None:
        """Wait for a condition of a slot. Raises RestartStopped when it cannot come true, or not in time."""
        slot = self._supervisor.slots[name]
        try:
            async with asyncio.timeout(self._patience):
                while not await condition():
                    if self._supervisor.stopping:
                        raise RestartStopped("everything is being stopped.")
                    if slot.state == "gave-up":
                        raise RestartStopped(f"{name} has been given up, {when}: {slot.last_exit}")
                    await asyncio.sleep(_POLL_SECONDS)
        except TimeoutError:
            raise RestartStopped(
                f"{name} (pid {slot.pid}, {slot.state}) was not in service within {self._patience:g} s, {when}."
            ) from None

    async def _in_service(self, name: str) -> bool:
        """Say whether the process that now runs in a slot is used: by every frontend, or with every worker."""
        slots = self._supervisor.slots
        pid = slots[name].pid
        if pid is None:
            return False
        urls = self._frontends()
        if name in urls:
            wanted = {slot.pid for other, slot in slots.items() if other not in urls and slot.pid is not None}
            return wanted <= await self._used_by(urls[name])
        views = [await self._used_by(url) for frontend, url in urls.items() if slots[frontend].pid is not None]
        return all(pid in view for view in views)

    async def _used_by(self, url: str) -> set[int]:
        """Return the pids of the workers that a frontend uses; none when it does not answer or turns requests away."""
        with contextlib.suppress(HoldfastError, TimeoutError, msgspec.DecodeError):
            answer = await http.get(f"{url}/health", _ANSWER_SECONDS, self._tls)
            if answer.status == 200:
                return {pid for one in answer.json()["instances"] if (pid := pid_in_use(one))}
        return set()


def pid_in_use(instance: dict[str, Any]) -> int:
    """Return the process id of a worker as ``/health`` shows it, if new work goes there; otherwise 0."""
    used = instance.get("state") == "usable" and not instance.get("draining")
    return int(instance.get("pid") or 0) if used else 0
