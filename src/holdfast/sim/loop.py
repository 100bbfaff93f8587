"""An event loop on virtual time that runs many hosts in one process, in an order that the tape decides.

Each host has a *lane*: a first-in-first-out queue of callbacks, as a process has with asyncio. When several lanes have
something to do at the same instant, the tape says which one runs its next iteration. When none has, the clock jumps to
the next timer. A context variable, inherited by everything that a host starts, says whose a callback is.

Must never wait, never look at a real clock, and never let the address of an object decide anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import Callable, Coroutine, Generator
from contextvars import Context, copy_context
from heapq import heapify, heappop, heappush
from typing import Any, NoReturn, TypeVar

from holdfast.sim.digest import TURN, Digest
from holdfast.sim.doorless import DoorlessLoop
from holdfast.sim.guard import Escape
from holdfast.sim.lanes import LANE, Failure, Lane, Runaway, SimFuture, SimHandle, SimTask, describe, is_cancelled
from holdfast.sim.tape import Stream
from holdfast.sim.threads import WORK_SECONDS, WORK_STEPS, work_inline

T = TypeVar("T")

START = 1_000.0
"""Virtual time at which a universe begins, in seconds."""
WALL_START = 1_750_000_000.0
"""Calendar time at which a universe begins, in seconds since 1970."""
COLLECT_EVERY = 400_000
"""Callbacks between two collections of garbage."""
MAX_CALLBACKS = 20_000_000
"""A universe with more callbacks than this runs away."""
MAX_PER_INSTANT = 200_000
"""More callbacks than this without any time passing: something spins."""
MANY_CANCELLED = 256
DROP_ROUNDS = 8
"""How often `close` looks for tasks that dropping others has made."""


class SimLoop(DoorlessLoop):
    """See the module.

    Args:
        schedule: decides which lane runs next.
        max_callbacks: budget of the universe.
    """

    _stopping: bool

    def __init__(self, schedule: Stream, *, max_callbacks: int = MAX_CALLBACKS):
        super().__init__()
        self.now = START
        self.callbacks = 0
        """Callbacks that were run."""
        self.failures: list[Failure] = []
        self.world = Lane("world", 0)
        """Whoever is no host: the harness."""
        self.escape: Escape | None = None
        """Set by the guard; ends the run."""
        self.budget = max_callbacks
        self._stop_at = min(MAX_PER_INSTANT, max_callbacks)
        self.events = Digest()
        self._turned = self.events.number
        self.trace: list[tuple[float, str, str]] | None = None
        """When a list: receives time, host and name of every callback."""
        self._choose = schedule.choose
        self._runnable: list[Lane] = []
        self._heap: list[tuple[float, int, SimHandle | Lane]] = []
        self._serial = 0
        self._tasks_made = 0
        self._timers_cancelled = 0
        self._until: Callable[[], bool] | None = None
        self._limit = START
        self._reached = False
        self.dropping = False
        """The universe is over: nothing that is still asked for will happen."""
        self._next_collection = COLLECT_EVERY
        self._fatal: BaseException | None = None
        self.set_exception_handler(self._note_failure)

    def time(self) -> float:
        """Return virtual seconds."""
        return self.now

    def nanoseconds(self) -> int:
        """Return virtual nanoseconds: a stopwatch for code that counts them."""
        return int(self.now * 1e9)

    def wall(self) -> float:
        """Return calendar time, seconds since 1970, as the host whose code runs has it."""
        return WALL_START + self.now - START + LANE.get(self.world).wall_offset

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> SimHandle:
        """Run a callback in the next iteration of the lane whose context this is."""
        if context is None:
            context = copy_context()
        lane = context.get(LANE, self.world)
        handle = SimHandle(self, 0.0, callback, args, context, lane, False)
        if lane.alive and not self.dropping:
            lane.ready.append(handle)
            if not lane.queued:
                lane.queued = True
                self._runnable.append(lane)
        return handle

    call_soon_threadsafe = call_soon  # type: ignore[assignment]

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> SimHandle:
        """Run a callback ``delay`` virtual seconds from now."""
        return self.call_at(self.now + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> SimHandle:
        """Run a callback at a virtual time."""
        if context is None:
            context = copy_context()
        handle = SimHandle(self, when, callback, args, context, context.get(LANE, self.world), True)
        if not self.dropping:
            self._serial = serial = self._serial + 1
            heappush(self._heap, (when, serial, handle))
        return handle

    def timer_cancelled(self) -> None:
        """Called by a timer's handle; many cancelled timers are swept out of the heap."""
        self._timers_cancelled += 1
        if self._timers_cancelled > MANY_CANCELLED and self._timers_cancelled * 2 > len(self._heap):
            self._heap = [entry for entry in self._heap if not is_cancelled(entry[2])]
            heapify(self._heap)
            self._timers_cancelled = 0

    def create_future(self) -> SimFuture:
        """Return a future of this loop."""
        return SimFuture(loop=self)

    def create_task(
        self,
        coro: Coroutine[Any, Any, T] | Generator[Any, None, T],
        *,
        name: object = None,
        context: Context | None = None,
        **_: Any,
    ) -> asyncio.Task[T]:
        """Make a task; its name and number are this universe's own."""
        task = SimTask.__new__(SimTask)
        self._tasks_made = task.serial = self._tasks_made + 1
        task.lane = LANE.get(self.world) if context is None else context.get(LANE, self.world)
        label = f"task-{task.serial}" if name is None else str(name)
        task.__init__(coro, loop=self, name=label, context=context)  # type: ignore[misc]
        if self.dropping:
            self._drop_task(task)
        elif not task.lane.alive:
            task.lane.kept.append(task)
        return task

    def run_in_executor(self, executor: object, func: Callable[..., T], *args: Any) -> asyncio.Future[T]:  # type: ignore[override]
        """Run the function inline in a later callback of the same lane, as if a thread had done it by then."""
        del executor
        future = self.create_future()
        delay = WORK_SECONDS * self._choose(WORK_STEPS, "thread") / WORK_STEPS
        self.call_at(self.now + delay, work_inline, self, future, func, args)
        return future

    def run(self, until: Callable[[], bool] | None = None, limit_s: float = 3600.0) -> bool:
        """Run until the condition holds, nothing is left to do, or so much virtual time has passed.

        Args:
            until: asked each time before the clock moves on.
            limit_s: virtual seconds from now.

        Returns:
            Whether ``until`` was reached; without it, whether nothing was left to do.

        Raises:
            Runaway: the budget of callbacks is used up.
            Escape: code touched the real world.
            BaseException: what a callback of the harness itself raised.
        """
        self._until, self._limit, self._reached = until, self.now + limit_s, False
        try:
            self.run_forever()
        finally:
            self._until = None
        return self._reached

    def _run_once(self) -> None:
        """Run until somebody calls `stop`: the base class calls this again and again, once is enough."""
        runnable, choose, turn, advance = self._runnable, self._choose, self._turn, self._advance
        while not self._stopping:
            if runnable:
                count = len(runnable)
                turn(runnable.pop() if count == 1 else runnable.pop(choose(count, "who runs")))
            elif not advance():
                self.stop()

    def _turn(self, lane: Lane) -> None:
        """One iteration of a lane: what was ready when it began."""
        queue = lane.ready
        todo = 1 if lane.cost else len(queue)
        ran = 0
        if self.trace is not None:
            self._trace_turn(lane, todo)
        while ran < todo:
            ran += 1
            handle = queue.popleft()
            callback = handle._callback
            if callback is None:
                continue
            try:
                handle._context.run(callback, *handle._args)
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:  # as asyncio does: the loop goes on
                self._callback_failed(lane, error)
            if lane.held:
                break
        self.callbacks += ran
        self._turned(lane.index * TURN + ran)
        if lane.held:
            pass  # it stays out of the line until it is let go
        elif lane.cost:
            lane.busy_until = self.now + lane.cost * ran
            self._wake_at(lane, lane.busy_until)
        elif queue:
            self._runnable.append(lane)
        else:
            lane.queued = False
        if self.escape is not None or self.callbacks > self._stop_at or self._fatal is not None:
            self._raise_what_ends_it()

    def _wake_at(self, lane: Lane, when: float) -> None:
        self._serial += 1
        heappush(self._heap, (when, self._serial, lane))

    def _advance(self) -> bool:
        """Move the clock to the next timer and make ready what is due; False when the run is over."""
        if self._until is not None and self._until():
            self._reached = True
            return False
        if self.callbacks >= self._next_collection:
            self._next_collection = self.callbacks + COLLECT_EVERY
            gc.collect()
        return self._make_ready(self._heap)

    def _make_ready(self, heap: list[tuple[float, int, SimHandle | Lane]]) -> bool:
        """Move the clock to the first timer that was not cancelled, and make ready what is due by then."""
        now, runnable, due = self.now, self._runnable, False
        while heap:
            when, _, entry = heap[0]
            if isinstance(entry, SimHandle) and entry._callback is None:
                heappop(heap)
                self._timers_cancelled -= 1
                continue
            if when > now:
                if due:
                    return True
                if when > self._limit:
                    self.now = self._limit
                    return False
                self.now = now = when
                self.events.time(now)
                self._stop_at = min(self.callbacks + MAX_PER_INSTANT, self.budget)
            heappop(heap)
            due = True
            if not isinstance(entry, SimHandle):
                self._let_go_on(entry)
                continue
            lane = entry.lane
            entry.pending = False
            if lane.alive:
                lane.ready.append(entry)
                if not lane.queued:
                    lane.queued = True
                    runnable.append(lane)
        self._reached = not due and self._until is None
        return due

    def _let_go_on(self, lane: Lane) -> None:
        """A slow lane is through with its callback."""
        if lane.held:
            return
        if lane.ready:
            self._runnable.append(lane)
        else:
            lane.queued = False

    def hold(self, lane: Lane) -> None:
        """Let nothing of this lane run until `release`; what becomes ready waits in order."""
        lane.held = lane.queued = True
        if lane in self._runnable:
            self._runnable.remove(lane)

    def release(self, lane: Lane) -> None:
        """Undo `hold`."""
        lane.held = False
        lane.queued = bool(lane.ready)
        if lane.ready:
            self._runnable.append(lane)

    def schedule(
        self, lane: Lane, when: float, callback: Callable[..., Any], args: tuple[Any, ...], context: Context
    ) -> SimHandle:
        """Do as `call_at`, for what the network brings: it is no timer of the process."""
        handle = SimHandle(self, 0.0, callback, args, context, lane, True)
        if not self.dropping:
            self._serial = serial = self._serial + 1
            heappush(self._heap, (when, serial, handle))
        return handle

    def tasks_of(self, lane: Lane | None = None) -> list[SimTask]:
        """Return the tasks of a lane (None: of all) that are not over, oldest first."""
        tasks = [task for task in asyncio.all_tasks(self) if isinstance(task, SimTask)]
        mine = [task for task in tasks if lane is None or task.lane is lane]
        return sorted(mine, key=lambda task: task.serial)

    def _callback_failed(self, lane: Lane, error: BaseException) -> None:
        if lane is self.world:
            self._fatal = error
            return
        self.failures.append(Failure(self.now, lane.label, "a callback raised", error))

    def _note_failure(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if not self.dropping:
            label = LANE.get(self.world).label
            self.failures.append(Failure(self.now, label, str(context.get("message")), context.get("exception")))

    def _raise_what_ends_it(self) -> NoReturn:
        self.stop()
        if self.escape is not None:
            raise self.escape
        if self._fatal is not None:
            error, self._fatal = self._fatal, None
            raise error
        busy = self._runnable[0] if self._runnable else self.world
        next_up = describe(busy.ready[0]._callback) if busy.ready else "nothing"
        limit = f"the budget of {self.budget}" if self.callbacks > self.budget else f"{MAX_PER_INSTANT} at one instant"
        raise Runaway(
            f"{self.callbacks} callbacks at virtual second {self.now - START:.3f}: over {limit}; "
            f"{busy.label} is about to run {next_up}"
        )

    def digest(self) -> str:
        """Return the hash of everything that happened so far: equal when a universe is replayed."""
        return self.events.value(self._serial, self._tasks_made, self.callbacks)

    def _trace_turn(self, lane: Lane, todo: int) -> None:
        assert self.trace is not None
        for handle in list(lane.ready)[:todo]:
            self.trace.append((self.now, lane.label, describe(handle._callback)))

    def close(self) -> None:
        """Drop everything that waits. Coroutines are closed, so what they do in ``finally`` finds a dead world."""
        if self.is_closed():
            return
        self.dropping = True
        self.world.ready.clear()
        self._runnable.clear()
        self._heap.clear()
        asyncio._set_running_loop(self)
        try:
            dropped = 0
            for _ in range(DROP_ROUNDS):
                for task in self.tasks_of():
                    if task.serial > dropped:
                        self._drop_task(task)
                if dropped == self._tasks_made:
                    break
                dropped = self._tasks_made
        finally:
            asyncio._set_running_loop(None)
        super().close()

    def _drop_task(self, task: SimTask) -> None:
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        coro = task.get_coro()
        with contextlib.suppress(BaseException):
            coro.close()

    def _asyncgen_finalizer_hook(self, agen: Any) -> None:
        if not self.dropping:
            super()._asyncgen_finalizer_hook(agen)  # type: ignore[misc]
