"""Sends the requests of a trace to a driver at the right moments.

Holds one request of the trace ahead, and as many under way as `Arrivals` allows. When that many are under way a
request waits and is sent late, which the report shows: a load generator that falls behind must say so.

Must never know whether the clock is real.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable

from holdfast.base.errors import HoldfastError
from holdfast.replay.arrivals import Arrivals, due_times
from holdfast.replay.driver import Driver, Job
from holdfast.replay.record import Note, Recording
from holdfast.replay.trace import TraceRequest

REQUEST_SECONDS = 3600.0


async def replay(
    requests: Iterable[TraceRequest],
    driver: Driver,
    arrivals: Arrivals,
    rng: random.Random,
    *,
    recording: Recording | None = None,
    patience: float = REQUEST_SECONDS,
) -> Recording:
    """Send all requests and return what happened when the last one is over.

    Args:
        requests: read one at a time.
        driver: serves them.
        arrivals: when they are sent.
        rng: of the random arrivals.
        recording: to be filled, for who wants to watch, or to keep what is there when this is cancelled.
        patience: seconds that one request may take.

    Raises:
        BadTrace: a bad line; what was sent until then is cancelled.
    """
    seats = asyncio.Semaphore(arrivals.seats)
    recording = Recording(asyncio.get_running_loop().time) if recording is None else recording

    async def one(job: Job, note: Note) -> None:
        try:
            await serve(driver, job, note, patience)
        finally:
            seats.release()

    try:
        async with asyncio.TaskGroup() as tasks:
            for index, (due, request) in enumerate(due_times(requests, arrivals, rng)):
                await seats.acquire()
                wait = due - recording.now()
                if wait > 0:
                    await asyncio.sleep(wait)
                job = Job(index, request)
                note = recording.open(job, None if arrivals.closed else due)
                tasks.create_task(one(job, note))
    except ExceptionGroup as group:
        raise what_happened(group) from None
    return recording


def what_happened(group: ExceptionGroup) -> Exception:
    """Return the error for people in a group, if there is one, otherwise the group: a fault of ours."""
    found = group.subgroup(HoldfastError)
    while isinstance(found, ExceptionGroup):
        found = found.exceptions[0]  # type: ignore[assignment]
    return found or group


async def serve(driver: Driver, job: Job, note: Note, patience: float) -> None:
    """Send one job and write down how it ended.

    Args:
        driver: serves it.
        job: what is sent.
        note: takes the events.
        patience: seconds that it may take.
    """
    try:
        async with asyncio.timeout(patience):
            await driver.submit(job, note)
        note.ended("ok")
    except TimeoutError:
        note.ended("timeout", "deadline_exceeded")
    except HoldfastError as error:
        note.ended("failed", error.code)
