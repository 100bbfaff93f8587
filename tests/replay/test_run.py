"""Requests go out when they are due, no more at once than allowed, and every end is recorded."""

import asyncio
import random
from collections.abc import Callable, Iterator

import pytest

from holdfast.base.errors import Disconnected
from holdfast.replay.arrivals import Arrivals
from holdfast.replay.driver import Events, Job
from holdfast.replay.record import Histogram, Recording
from holdfast.replay.run import replay
from holdfast.replay.trace import BadTrace, TraceRequest
from tests.support.virtual_time import virtual


def trace(*times: float, tokens: int = 3) -> list[TraceRequest]:
    return [TraceRequest(at * 1e3, 100, tokens, (1,)) for at in times]


class Slow:
    """A driver that takes a second to the first token and a tenth for each further one."""

    def __init__(self, also: Callable[[Job], None] | None = None):
        self.sent: list[float] = []
        self.at_once = 0
        self.most = 0
        self._also = also

    async def submit(self, job: Job, events: Events) -> None:
        self.sent.append(asyncio.get_running_loop().time())
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        try:
            if self._also is not None:
                self._also(job)
            events.worker(f"w{job.index % 2}")
            await asyncio.sleep(1.0)
            events.tokens()
            for _ in range(job.request.output_length - 1):
                await asyncio.sleep(0.1)
                events.tokens()
            events.usage(100, job.request.output_length, 64)
        finally:
            self.at_once -= 1


async def go(driver: Slow, arrivals: Arrivals, requests: list[TraceRequest], **more: float) -> Recording:
    return await replay(requests, driver, arrivals, random.Random(1), **more)  # type: ignore[arg-type]


@virtual
async def test_time_stamps_are_kept_to():
    driver = Slow()
    recording = await go(driver, Arrivals(speedup=2.0), trace(10, 12, 12, 30))
    begin = driver.sent[0]
    assert [at - begin for at in driver.sent] == [0.0, 1.0, 1.0, 10.0]
    first = recording.records[1]
    assert (first.due, first.sent, first.first, first.end) == pytest.approx((1.0, 1.0, 2.0, 2.2))
    assert (first.generated, first.cached, first.worker, first.outcome) == (3, 64, "w1", "ok")
    assert first.time_to_first_token == pytest.approx(1.0)
    assert first.time_per_token == pytest.approx(0.1)
    assert recording.in_flight == 0


@virtual
async def test_a_closed_loop_keeps_so_many_under_way():
    driver = Slow()
    recording = await go(driver, Arrivals(concurrency=3), trace(*range(12)))
    assert driver.most == 3
    assert [round(at - driver.sent[0], 6) for at in driver.sent] == [0.0] * 3 + [1.2] * 3 + [2.4] * 3 + [3.6] * 3
    assert all(record.sent == record.due for record in recording.records)


@virtual
async def test_who_waits_for_a_seat_is_late():
    recording = await go(Slow(), Arrivals(speedup=1.0, concurrency=1), trace(0, 0.2))
    late = recording.records[1]
    assert late.sent - late.due == pytest.approx(1.0)


@virtual
async def test_every_way_to_end_is_recorded():
    def trouble(job: Job) -> None:
        if job.index == 1:
            raise Disconnected("gone")

    recording = await go(Slow(trouble), Arrivals(), [*trace(0, 0), *trace(0, tokens=1000)], patience=5.0)
    assert [(r.outcome, r.reason) for r in recording.records] == [
        ("ok", ""), ("failed", "disconnected"), ("timeout", "deadline_exceeded"),
    ]  # fmt: skip
    assert recording.records[2].generated in {40, 41}  # the last one and the deadline fall together


@virtual
async def test_the_first_end_counts():
    class Says(Slow):
        async def submit(self, job: Job, events: Events) -> None:
            events.ended("rejected", "overloaded")

    recording = await go(Says(), Arrivals(), trace(0))
    assert (recording.records[0].outcome, recording.records[0].reason, recording.in_flight) == (
        "rejected", "overloaded", 0,
    )  # fmt: skip


@virtual
async def test_a_bad_line_ends_it_and_nothing_is_left_behind():
    def lines() -> Iterator[TraceRequest]:
        yield from trace(0, 0.5)
        raise BadTrace("line 3")

    driver = Slow()
    with pytest.raises(BadTrace, match="line 3"):
        await replay(lines(), driver, Arrivals(), random.Random(1))
    assert driver.at_once == 0


@virtual
async def test_a_fault_of_a_driver_is_not_hidden():
    def fault(job: Job) -> None:
        raise ZeroDivisionError

    with pytest.raises(ExceptionGroup):
        await go(Slow(fault), Arrivals(), trace(0))


@virtual
async def test_what_there_is_survives_a_cancel():
    recording = Recording(asyncio.get_running_loop().time)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1.55):
            await replay(trace(0, 1.5, 100), Slow(), Arrivals(), random.Random(1), recording=recording)
    assert [(r.outcome, r.generated) for r in recording.records] == [("ok", 3), ("unfinished", 0)]


def test_a_histogram_is_a_hundredth_exact():
    histogram, rng = Histogram(), random.Random(3)
    values = sorted(rng.lognormvariate(-4, 1.5) for _ in range(5_000))
    for value in values:
        histogram.add(value)
    for share in (0.01, 0.5, 0.9, 0.99, 1.0):
        exact = values[max(0, int(share * 5_000) - 1)]
        assert histogram.quantile(share) == pytest.approx(exact, rel=0.011)
    assert histogram.highest == values[-1]
    assert histogram.total == pytest.approx(sum(values))


def test_a_histogram_takes_anything():
    histogram = Histogram()
    assert histogram.quantile(0.5) == 0.0
    for value in (0.0, 1e-9, 1e12):
        histogram.add(value)
    assert histogram.count == 3
    assert histogram.quantile(1.0) > 1e5
