"""The loop's lateness is measured against a clock, and only real stalls count as such."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from holdfast.telemetry.loop_delay import watch_loop


async def test_a_late_timer_is_a_stall_and_a_punctual_one_is_not() -> None:
    moments = iter([0, 10_000_000, 10_000_000, 40_000_000, 40_000_000, 54_999_000, 54_999_000])
    late: list[float] = []
    stalls: list[int] = []
    done = asyncio.Event()

    def clock(source: Iterator[int] = moments) -> int:
        return next(source)

    def note(delay: float) -> None:
        late.append(round(delay, 6))
        if len(late) == 3:
            done.set()

    task = asyncio.ensure_future(watch_loop(clock, note, lambda: stalls.append(1)))
    async with asyncio.timeout(5):
        await done.wait()
    task.cancel()
    await asyncio.wait([task])
    assert late == [0.0, 0.02, 0.004999]
    assert len(stalls) == 1
