"""The supervisor: keeps the slots of one machine running, and takes everything down with it.

Each slot is a process in its own group. A crash is answered by a restart with back-off until the
restart intensity says that restarting does not help; a process that was asked to leave is replaced at once.
Stopping goes stage by stage: frontends drain before workers. A sentinel process cleans up should the
supervisor itself be killed.

Must never import what it runs, and never leave a process behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from holdfast.base.lineage import COOKIE
from holdfast.local.backoff import EXIT_CONFIGURATION, RestartBudget
from holdfast.local.child import Child, ChildSpec, RelayLine, describe_exit
from holdfast.local.sentinel import kill_marked

log = logging.getLogger(__name__)

SlotState = Literal["starting", "running", "restarting", "gave-up", "stopped"]
OnChange = Callable[[], None]

_HURRIED_GRACE = 3.0
_LONG_ENOUGH = 1.0
"""A process that leaves in order after less than this many seconds is one that does not work."""
_SENTINEL_SECONDS = 5.0
_SENTINEL_RESTART_SECONDS = 0.5


class Slot:
    """The present state of one slot, for those who look."""

    def __init__(self, spec: ChildSpec):
        self.spec = spec
        self.state: SlotState = "starting"
        self.child: Child | None = None
        self.restarts = 0
        """Starts after the first one, crashes and replacements alike."""
        self.replacing: Child | None = None
        """The process that was asked to make room for a new one."""
        self.last_exit = ""
        """How the last process of this slot ended, with its last lines; empty: none has ended yet."""
        self.budget = RestartBudget(spec.restart)
        self.gone = asyncio.Event()
        """Set while no process of this slot runs."""

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        return self.child.pid if self.child else None


class Supervisor:
    """Runs children until `stop`, or until all slots have given up."""

    def __init__(
        self,
        specs: Sequence[ChildSpec],
        environ: Mapping[str, str],
        relay: RelayLine,
        on_change: OnChange = lambda: None,
    ):
        self.slots = {spec.slot: Slot(spec) for spec in specs}
        # never from a seeded source: two supervisors with one cookie would kill each other's children
        self._cookie = secrets.token_hex(16)
        self._environ = dict(environ)
        self._relay = relay
        self._on_change = on_change
        self._stopping = asyncio.Event()
        self._hurry = asyncio.Event()
        self._now = asyncio.Event()
        self._news = asyncio.Event()
        self._sentinel: asyncio.subprocess.Process | None = None

    async def run(self) -> int:
        """Keep the slots running; return 0 after `stop`, 1 when every slot has given up."""
        self._sentinel = await self._start_sentinel()
        try:
            async with asyncio.TaskGroup() as tasks:
                watch = tasks.create_task(self._keep_sentinel())
                keepers = [tasks.create_task(self._keep(slot)) for slot in self.slots.values()]
                stopper = tasks.create_task(self._stop_in_order())
                await asyncio.wait(keepers)
                stopper.cancel()
                watch.cancel()
        finally:
            await self._dismiss_sentinel()
        return 1 if all(slot.state == "gave-up" for slot in self.slots.values()) else 0

    def stop(self) -> None:
        """Stop all children in order; a second call hurries them, a third one kills them."""
        if self._hurry.is_set():
            self._now.set()
        if self._stopping.is_set():
            self._hurry.set()
        self._stopping.set()
        self._news.set()

    async def news(self) -> None:
        """Wait until the state of a slot has changed, or everything is being stopped; callers are cancelled."""
        self._news.clear()
        await self._news.wait()

    @property
    def stopping(self) -> bool:
        """Whether everything is being stopped."""
        return self._stopping.is_set()

    async def replace(self, name: str) -> bool:
        """Stop the process of a slot in order, SIGKILL after its grace; the next one starts at once.

        Returns:
            Whether there was one; it is gone when this returns.
        """
        slot = self.slots[name]
        child = slot.replacing = slot.child
        if child is None:
            return False
        log.info("%s is replaced; its process %d has %.1f s to leave", name, child.pid, slot.spec.grace)
        child.signal(signal.SIGTERM)
        await self._wait_gone([slot], slot.spec.grace)
        if slot.child is child:
            log.error("%s did not leave within %.1f s; killed", name, slot.spec.grace)
            child.kill_group()
            await slot.gone.wait()
        return True

    async def _keep(self, slot: Slot) -> None:
        """Run one slot until it is stopped or given up."""
        while not self._stopping.is_set():
            delay = await self._run_once(slot)
            if self._stopping.is_set():
                break
            if delay is None:
                self._set(slot, "gave-up")
                return
            self._set(slot, "restarting")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), delay)
            slot.restarts += 1
        self._set(slot, "stopped")

    async def _run_once(self, slot: Slot) -> float | None:
        """Run the child of a slot to its end; return the delay before the next start, None to give up."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            child = await Child.start(slot.spec, self._cookie, self._environ)
        except OSError as error:
            slot.last_exit = f"cannot be started: {error}"
            log.error("%s cannot be started: %s", slot.spec.slot, error)  # noqa: TRY400  the sentence says it all
            return slot.budget.crashed(loop.time(), 0.0)
        slot.child = child
        slot.gone.clear()
        self._tell_sentinel("+", child.pid)
        self._set(slot, "running")
        try:
            code = await child.wait(self._relay)
        finally:
            child.kill_group()
            self._tell_sentinel("-", child.pid)
            slot.child = None
            slot.gone.set()
        await asyncio.to_thread(kill_marked, *child.marks)
        return self._judge(slot, child, code, loop.time() - started)

    def _judge(self, slot: Slot, child: Child, code: int, uptime: float) -> float | None:
        name, how = slot.spec.slot, describe_exit(code)
        if self._stopping.is_set():
            slot.last_exit = how
            log.info("%s stopped: %s", name, how, extra={"pid": child.pid})
            return None
        slot.last_exit = "\n".join([f"{name} ended after {uptime:.1f} s: {how}", *child.tail])
        if slot.replacing is child or (code in slot.spec.orderly and uptime >= _LONG_ENOUGH):
            slot.replacing = None
            log.info("%s left in order after %.1f s: %s; started again", name, uptime, how)
            return 0.0
        if code == EXIT_CONFIGURATION:
            log.error("%s cannot run with these settings, see its last lines above; not restarted", name)
            return None
        delay = slot.budget.crashed(asyncio.get_running_loop().time(), uptime)
        if delay is None:
            policy = slot.spec.restart
            log.error(
                "%s crashed more than %d times in %.0f s (last: %s); given up, restart the supervisor once it is fixed",
                name,
                policy.intensity,
                policy.window,
                how,
            )
        else:
            log.warning("%s ended after %.1f s: %s; next start in %.2f s", name, uptime, how, delay)
        return delay

    def _set(self, slot: Slot, state: SlotState) -> None:
        if slot.state != state:
            slot.state = state
            self._news.set()
            self._on_change()

    async def _stop_in_order(self) -> None:
        """Stop stage after stage once asked; SIGKILL what outlives its grace."""
        await self._stopping.wait()
        for stage in sorted({slot.spec.stage for slot in self.slots.values()}):
            members = [s for s in self.slots.values() if s.spec.stage == stage and s.child]
            for slot in members:
                if slot.child:
                    slot.child.signal(signal.SIGTERM)
            grace = max((slot.spec.grace for slot in members), default=0.0)
            await self._wait_gone(members, grace)
            for slot in members:
                if slot.child:
                    log.error("%s did not stop within %.1f s; killed", slot.spec.slot, slot.spec.grace)
                    slot.child.kill_group()

    async def _wait_gone(self, members: list[Slot], grace: float) -> None:
        """Wait until no member runs, for ``grace`` seconds, or less when told to hurry: they are told so too."""
        if not members:
            return
        async with asyncio.TaskGroup() as tasks:
            gone = [tasks.create_task(slot.gone.wait()) for slot in members]
            hurry = tasks.create_task(self._hurry.wait())
            now = tasks.create_task(self._now.wait())
            everyone = tasks.create_task(_all_done(gone))
            await asyncio.wait({everyone, hurry}, timeout=grace, return_when=asyncio.FIRST_COMPLETED)
            if hurry.done() and not everyone.done():
                for slot in members:
                    if slot.child:
                        slot.child.signal(signal.SIGTERM)
                short = min(grace, _HURRIED_GRACE)
                await asyncio.wait({everyone, now}, timeout=short, return_when=asyncio.FIRST_COMPLETED)
            for task in (everyone, hurry, now, *gone):
                task.cancel()

    async def _start_sentinel(self) -> asyncio.subprocess.Process:
        script = Path(__file__).with_name("sentinel.py")
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-I",
            "-S",
            str(script),
            f"{COOKIE}={self._cookie}",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
            env={},
            start_new_session=True,
        )
        self._sentinel = process
        for slot in self.slots.values():
            if slot.child:
                self._tell_sentinel("+", slot.child.pid)
        return process

    async def _keep_sentinel(self) -> None:
        while self._sentinel is not None:
            code = await self._sentinel.wait()
            log.error("the clean-up helper ended (%s); started again", describe_exit(code))
            await asyncio.sleep(_SENTINEL_RESTART_SECONDS)
            await self._start_sentinel()

    def _tell_sentinel(self, sign: str, group: int) -> None:
        if self._sentinel and self._sentinel.stdin and self._sentinel.returncode is None:
            self._sentinel.stdin.write(f"{sign}{group}\n".encode())

    async def _dismiss_sentinel(self) -> None:
        """Let the sentinel find whatever is left, and wait for it."""
        for slot in self.slots.values():
            if slot.child:
                slot.child.kill_group()
        sentinel, self._sentinel = self._sentinel, None
        if sentinel is None or sentinel.stdin is None:
            return
        sentinel.stdin.close()
        try:
            await asyncio.wait_for(sentinel.wait(), _SENTINEL_SECONDS)
        except TimeoutError:
            log.error("the clean-up helper did not finish; cleaning up here")  # noqa: TRY400
            await asyncio.to_thread(kill_marked, f"{COOKIE}={self._cookie}".encode())
            sentinel.kill()


async def _all_done(waits: list[asyncio.Task[Literal[True]]]) -> Literal[True]:
    await asyncio.wait(waits)
    return True
