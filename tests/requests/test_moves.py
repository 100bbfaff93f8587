"""How often and why a stream moves: limits, orderly moves, refusals, budget, pacing."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from holdfast.base.errors import (
    CannotConnect,
    CapacityExhausted,
    ContextLengthExceeded,
    Disconnected,
    EngineFailed,
    HoldfastError,
    InternalError,
    InvalidRequest,
    MigrationExhausted,
    NoWorkers,
    StreamIncomplete,
    WorkerDraining,
    WorkerSaturated,
)
from tests.requests.fakes import Client, FakeStream, Fleet, settle
from tests.support.virtual_time import virtual

LENGTH = 40


async def fail_repeatedly(fleet: Fleet, client: Client, times: int, error: HoldfastError) -> None:
    for _ in range(times):
        stream = fleet.attempts[-1]
        stream.accept().emit(1)
        stream.end("error", error)
        await settle()
        assert fleet.attempts[-1] is not stream or client.sink.endings


@virtual
async def test_the_limit_counts_moves() -> None:
    fleet = Fleet(workers=3)
    client = fleet.start(length=LENGTH)
    await settle()
    await fail_repeatedly(fleet, client, 4, EngineFailed("boom"))
    ending = await client.done()
    assert (ending.attempts, ending.completion_tokens, len(ending.moves)) == (4, 4, 3)
    assert isinstance(ending.error, MigrationExhausted)
    assert "3 migrations" in ending.error.message
    assert "boom" in ending.error.message
    assert ending.error.details["last_error"] == "engine_failed"
    assert fleet.leases() == {}


@virtual
async def test_limit_zero_passes_the_error_on() -> None:
    fleet = Fleet(settings={"migration_limit": 0})
    client = fleet.start(length=LENGTH)
    await settle()
    error = Disconnected("reset")
    fleet.attempts[-1].accept().emit(1).breaks(error)
    ending = await client.done()
    assert ending.error is error
    assert (ending.state, ending.attempts) == ("failed", 1)


@virtual
async def test_limit_zero_still_looks_for_room() -> None:
    fleet = Fleet(settings={"migration_limit": 0})
    client = fleet.start(length=1)
    await settle()
    fleet.attempts[-1].refuse(WorkerSaturated("full"))
    await settle()
    fleet.attempts[-1].accept().emit(1).end("length")
    assert (await client.done()).state == "done"


@pytest.mark.parametrize(("longest", "state"), [(0, "done"), (10, "done"), (9, "failed")])
@virtual
async def test_long_sequences_stay(longest: int, state: str) -> None:
    fleet = Fleet(settings={"migration_max_seq_len": longest})
    client = fleet.start(length=8)
    await settle()
    fleet.attempts[-1].accept().emit(6).breaks()
    await settle()
    if state == "done":
        fleet.attempts[-1].accept().emit(2).end("length")
    ending = await client.done()
    assert ending.state == state
    if ending.error is not None:
        assert isinstance(ending.error, MigrationExhausted)
        assert "DYN_MIGRATION_MAX_SEQ_LEN=9" in ending.error.message
        assert ending.error.details["sequence_length"] == 10


@pytest.mark.parametrize("error", [WorkerDraining("leaving"), WorkerSaturated("full"), CapacityExhausted("full here")])
@virtual
async def test_orderly_moves_do_not_count_against_the_limit(error: HoldfastError) -> None:
    fleet = Fleet(workers=8, settings={"migration_limit": 1})
    client = fleet.start(length=20)
    await settle()
    for i in range(6):
        stream = fleet.attempts[-1]
        if i % 2:
            stream.accept().emit(1).end("error", error)
        else:
            stream.refuse(error)
        await settle()
    fleet.attempts[-1].accept().emit(1).breaks()
    await settle()
    last = fleet.attempts[-1]
    last.accept().emit(20 - len(last.ids)).end("length")
    ending = await client.done()
    assert (ending.state, ending.attempts) == ("done", 8)
    for one, following in itertools.pairwise(fleet.attempts):
        assert one.worker is not following.worker


@virtual
async def test_orderly_moves_of_accepted_streams_have_an_end() -> None:
    fleet = Fleet(workers=2)
    client = fleet.start(length=100)
    await settle()
    for _ in range(33):
        fleet.attempts[-1].accept().emit(1).end("error", WorkerDraining("leaving"))
        await settle()
    ending = await client.done()
    assert isinstance(ending.error, MigrationExhausted)
    assert ending.attempts == 33


@virtual
async def test_engine_errors_at_the_door_count() -> None:
    fleet = Fleet(workers=5)
    client = fleet.start()
    await settle()
    for _ in range(4):
        fleet.attempts[-1].refuse(EngineFailed("not ready"))
        await settle()
    ending = await client.done()
    assert isinstance(ending.error, MigrationExhausted)
    assert (ending.state, ending.attempts) == ("rejected", 4)


@pytest.mark.parametrize("error", [InvalidRequest("bad"), ContextLengthExceeded("long"), InternalError("fault")])
@virtual
async def test_the_callers_mistake_is_not_tried_elsewhere(error: HoldfastError) -> None:
    fleet = Fleet()
    client = fleet.start()
    await settle()
    fleet.attempts[-1].refuse(error)
    ending = await client.done()
    assert ending.error is error
    assert (ending.state, ending.attempts) == ("rejected", 1)


@virtual
async def test_a_new_request_is_rejected_when_every_worker_is_full() -> None:
    fleet = Fleet(workers=3)
    client = fleet.start()
    await settle()
    for i in range(3):
        fleet.attempts[-1].refuse(WorkerSaturated(f"full {i}", retry_after=float(i), knob="K", threshold=4, measured=4))
        await settle()
    ending = await client.done()
    assert isinstance(ending.error, WorkerSaturated)
    assert ending.state == "rejected"
    assert "All 3 usable workers" in ending.error.message
    assert (ending.error.retry_after, ending.error.details["knob"]) == (2.0, "K")
    assert {s.worker.instance for s in fleet.attempts} == {"w1", "w2", "w3"}
    assert asyncio.get_running_loop().time() == 1_000.0, "it was not kept waiting"
    assert fleet.leases() == {}


@virtual
async def test_a_stream_that_was_accepted_waits_for_room() -> None:
    fleet = Fleet(workers=1)
    client = fleet.start(length=3)
    await settle()
    fleet.attempts[-1].accept().emit(1).breaks()
    await settle()
    began = asyncio.get_running_loop().time()
    while asyncio.get_running_loop().time() < began + 20:
        assert len(fleet.attempts) < 90, "a full worker is asked about four times a second"
        if not fleet.attempts[-1].over:
            fleet.attempts[-1].refuse(WorkerSaturated("full"))
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.3)
    fleet.attempts[-1].accept().emit(2).end("length")
    ending = await client.done()
    assert (ending.state, ending.join) == ("done", "exact")


@virtual
async def test_but_not_for_ever() -> None:
    fleet = Fleet(workers=2)
    client = fleet.start(length=3, wait=30)
    await settle()
    fleet.attempts[-1].accept().emit(1).breaks()
    began = asyncio.get_running_loop().time()
    assert client.task is not None
    while not client.task.done():
        if not fleet.attempts[-1].over:
            fleet.attempts[-1].refuse(WorkerSaturated("full"))
        await asyncio.sleep(0.01)
    assert asyncio.get_running_loop().time() - began == pytest.approx(30, abs=0.5)
    ending = await client.done()
    assert isinstance(ending.error, NoWorkers)
    assert "DYN_MIGRATION_WAIT_SECS" in ending.error.message
    assert "worker_saturated" in ending.error.message
    assert ending.state == "failed"
    assert fleet.leases() == {}


@pytest.mark.parametrize("error", [CannotConnect("no way"), Disconnected("gone"), WorkerDraining("leaving")])
@virtual
async def test_no_way_to_a_worker_is_no_move_and_no_busy_loop(error: HoldfastError) -> None:
    fleet = Fleet(workers=1)
    fleet.workers[0].open_error = error
    client = fleet.start(length=2)
    await asyncio.sleep(8.1)
    assert client.stream.driver.history.attempts < 40
    assert not client.sink.endings
    fleet.workers[0].open_error = None
    await asyncio.sleep(0.3)
    fleet.attempts[-1].accept().emit(2).end("length")
    ending = await client.done()
    assert ending.state == "done"
    assert len(fleet.attempts) == 1


@virtual
async def test_the_first_worker_without_a_way_costs_no_time() -> None:
    fleet = Fleet(workers=2)
    fleet.workers[0].open_error = Disconnected("gone")
    client = fleet.start(length=1)
    await settle()
    assert fleet.attempts[-1].worker is fleet.workers[1]
    fleet.attempts[-1].accept().emit(1).end("length")
    await client.done()


@virtual
async def test_a_refusal_is_forgotten_once_somebody_accepted() -> None:
    fleet = Fleet(workers=2)
    client = fleet.start(length=3)
    await settle()
    fleet.attempts[-1].refuse(WorkerSaturated("full"))
    await settle()
    fleet.attempts[-1].accept().emit(1)
    fleet.workers[1].die()
    await settle()
    assert len(fleet.attempts) == 3, "no waiting: the other worker may have room again"
    assert fleet.attempts[-1].worker is fleet.workers[0]
    fleet.attempts[-1].accept().emit(2).end("length")
    await client.done()


@virtual
async def test_failures_are_reported_once_and_callers_mistakes_too() -> None:
    fleet = Fleet()
    client = fleet.start(length=2)
    await settle()
    one, two = fleet.workers
    fleet.attempts[-1].accept().breaks()
    await settle()
    fleet.attempts[-1].accept().emit(2).end("length")
    await client.done()
    assert [e.code for e in one.failures] == ["disconnected"]
    assert (one.successes, two.failures, two.successes) == (0, [], 1)


@virtual
async def test_the_first_move_is_free_even_when_the_budget_is_empty() -> None:
    fleet = Fleet()
    fleet.services.budget.withdraw(asyncio.get_running_loop().time())
    fleet.services.budget._saved = 0.0
    fleet.services.budget._floor = fleet.services.budget._ratio = 0.0
    clients = [fleet.start(length=2) for _ in range(50)]
    await settle()
    for stream in fleet.workers[0].die():
        assert stream.over
    await settle()
    assert len(fleet.attempts) == 75
    assert asyncio.get_running_loop().time() == 1_000.0
    for stream in fleet.attempts:
        if not stream.over:
            stream.accept().emit(2).end("length")
    await asyncio.gather(*(c.done() for c in clients))
    assert all(c.ending.state == "done" for c in clients)


@virtual
async def test_later_moves_pay_and_wait_and_are_refused_at_last() -> None:
    fleet = Fleet(workers=3)
    budget = fleet.services.budget
    client = fleet.start(length=9, wait=1.0)
    await settle()
    budget.withdraw(asyncio.get_running_loop().time())
    budget._saved, budget._floor = 0.0, 2.0
    fleet.attempts[-1].accept().emit(1).end("error", EngineFailed("one"))
    await settle()
    assert len(fleet.attempts) == 2
    fleet.attempts[-1].accept().emit(1).end("error", EngineFailed("two"))
    await settle()
    assert len(fleet.attempts) == 2
    await asyncio.sleep(0.55)
    assert len(fleet.attempts) == 3
    budget._floor = 0.001
    fleet.attempts[-1].accept().emit(1).end("error", EngineFailed("three"))
    ending = await client.done()
    assert isinstance(ending.error, CapacityExhausted)
    assert ending.error.retry_after is not None
    assert fleet.leases() == {}


@virtual
async def test_pacing_lets_the_oldest_go_first() -> None:
    fleet = Fleet()
    fleet.services.pacer._burst = fleet.services.pacer._saved = 1.0
    fleet.services.pacer._rate = 10.0
    clients = []
    for _ in range(6):
        clients.append(fleet.start(length=2))
        await asyncio.sleep(0.01)
    victims = [s for s in fleet.attempts if s.worker is fleet.workers[0]]
    for stream in fleet.attempts:
        stream.accept().emit(1)
    started = len(fleet.attempts)
    for stream in reversed(victims):
        stream.breaks()
    await asyncio.sleep(1.0)
    order = [s.request.request_id for s in fleet.attempts[started:]]
    oldest_first = [s.request.request_id for s in victims]
    assert order[1:] == [r for r in oldest_first if r != order[0]]
    for stream in fleet.attempts:
        if not stream.over:
            stream.accept() if not stream.accepted else None
            stream.emit(2 - len(stream.ids)).end("length")
    for client in clients:
        await client.done()


@virtual
async def test_a_move_that_is_cancelled_in_the_pacer_takes_no_turn() -> None:
    fleet = Fleet()
    pacer = fleet.services.pacer
    pacer._burst = pacer._saved = 0.0
    pacer._rate = 0.0001
    client = fleet.start(length=2)
    await settle()
    fleet.attempts[-1].accept().emit(1).breaks()
    await settle()
    client.request.cancel("gone")
    await client.done()
    assert len(fleet.attempts) == 1
    assert fleet.leases() == {}


def _events(fleet: Fleet) -> list[str]:
    return [name for name, _ in fleet.seen.events if name != "first token"]


@virtual
async def test_the_observer_hears_everything_once() -> None:
    fleet = Fleet()
    client = fleet.start(length=3)
    await settle()
    first = fleet.attempts[-1]
    first.breaks()
    await settle()
    fleet.attempts[-1].accept().emit(1).breaks()
    await asyncio.sleep(0.3)
    last: FakeStream = fleet.attempts[-1]
    await asyncio.sleep(0.2)
    last.accept().emit(2).end("length")
    await client.done()
    assert _events(fleet) == [
        "attempt", "new_request", "attempt", "accepted", "migrated", "ongoing_request", "attempt", "accepted",
        "migrated", "ended",
    ]  # fmt: skip
    assert fleet.seen.all("accepted") == [True, False]
    assert fleet.seen.all("migrated") == [pytest.approx(0.0, abs=0.01), pytest.approx(0.5, abs=0.01)]
    assert [(m.cause, m.at, round(m.gap_seconds, 1)) for m in client.ending.moves] == [
        ("disconnected", 0, 0.0),
        ("disconnected", 1, 0.5),
    ]


@virtual
async def test_a_gap_spans_all_failures_until_the_next_token() -> None:
    fleet = Fleet(workers=4)
    client = fleet.start(length=3)
    await settle()
    fleet.attempts[-1].accept().emit(1).end("error", StreamIncomplete("one"))
    await asyncio.sleep(0.2)
    fleet.attempts[-1].accept().end("error", StreamIncomplete("two"))
    await asyncio.sleep(0.2)
    fleet.attempts[-1].accept().emit(2).end("length")
    await client.done()
    assert fleet.seen.all("migrated") == [pytest.approx(0.4, abs=0.01)]
