"""When no worker is left: wait for a replacement within bounds, resume the moment it comes, never wait in vain."""

from __future__ import annotations

import asyncio

import pytest

from holdfast.base.errors import CapacityExhausted, DeadlineExceeded, NoWorkers, PeerSilent
from tests.requests.fakes import Fleet, settle, truth
from tests.support.virtual_time import virtual


def now() -> float:
    return asyncio.get_running_loop().time()


@virtual
async def test_resumes_the_moment_a_worker_comes() -> None:
    fleet = Fleet(workers=1)
    client = fleet.start(length=5)
    await settle()
    fleet.attempts[-1].accept().emit(2)
    fleet.workers[0].die()
    await asyncio.sleep(7.1)
    assert fleet.leases() == {"request": 1, "stream": 1, "waiting": 1}
    came = now()
    fleet.workers[0].restart()
    await settle()
    assert now() == came
    stream = fleet.attempts[-1]
    assert stream.ids == truth(client.plans[0].prompt_ids, 2)
    stream.accept().emit(3).end("length")
    ending = await client.done()
    assert (ending.state, ending.join, ending.attempts) == ("done", "exact", 2)
    assert ending.moves[0].gap_seconds == pytest.approx(7.1, abs=0.01)
    assert fleet.leases() == {}


@virtual
async def test_new_requests_wait_too() -> None:
    fleet = Fleet(workers=0)
    client = fleet.start(length=1)
    await asyncio.sleep(3)
    fleet.add("w1")
    await settle()
    fleet.attempts[-1].accept().emit(1).end("length")
    assert (await client.done()).attempts == 1


@virtual
async def test_the_wait_is_bounded() -> None:
    fleet = Fleet(workers=1)
    client = fleet.start(length=5)
    await settle()
    fleet.attempts[-1].accept().emit(2)
    fleet.workers[0].die()
    began = now()
    ending = await client.done()
    assert now() - began == pytest.approx(30, abs=0.3)
    assert isinstance(ending.error, NoWorkers)
    assert "DYN_MIGRATION_WAIT_SECS" in ending.error.message
    assert (ending.state, ending.completion_tokens) == ("failed", 2)
    assert fleet.leases() == {}


@virtual
async def test_the_total_deadline_ends_the_wait_and_says_so() -> None:
    fleet = Fleet(workers=1)
    client = fleet.start(length=5, total=4.0)
    await settle()
    fleet.attempts[-1].accept().emit(2)
    fleet.workers[0].die()
    ending = await client.done()
    assert now() == pytest.approx(1_004, abs=0.15)
    assert isinstance(ending.error, DeadlineExceeded)
    assert ending.error.details["knob"] == "DYN_REQUEST_TIMEOUT"
    assert ending.state == "expired"
    assert fleet.leases() == {}


@virtual
async def test_no_wait_at_all() -> None:
    fleet = Fleet(workers=2)
    client = fleet.start(length=5, wait=0.0)
    await settle()
    fleet.attempts[-1].breaks()
    await settle()
    fleet.attempts[-1].accept().emit(1)
    fleet.workers[0].usable = False
    fleet.workers[1].die()
    ending = await client.done()
    assert isinstance(ending.error, NoWorkers)
    assert now() == pytest.approx(1_000, abs=0.01)


@pytest.mark.parametrize("tell", [True, False])
@virtual
async def test_ends_at_once_when_none_can_come(tell: bool) -> None:
    fleet = Fleet(workers=1)
    client = fleet.start(length=5)
    await settle()
    fleet.attempts[-1].accept().emit(2)
    fleet.workers[0].die()
    await asyncio.sleep(2)
    fleet.expected = False
    if tell:
        fleet.tell("removed", fleet.workers[0])
    began = now()
    ending = await client.done()
    assert now() - began <= (0.0 if tell else 0.3)
    assert isinstance(ending.error, NoWorkers)
    assert "left for good" in ending.error.message
    assert fleet.leases() == {}


@virtual
async def test_none_can_come_from_the_start() -> None:
    fleet = Fleet(workers=0)
    fleet.expected = False
    client = fleet.start()
    ending = await client.done()
    assert isinstance(ending.error, NoWorkers)
    assert (ending.state, now()) == ("rejected", 1_000.0)


@virtual
async def test_the_number_of_waiters_is_bounded() -> None:
    fleet = Fleet(workers=0, settings={"migration_max_waiting": 3})
    clients = [fleet.start(length=1) for _ in range(5)]
    await settle()
    assert fleet.services.leases.held("waiting") == 3
    for client in clients[3:]:
        ending = await client.done()
        assert isinstance(ending.error, CapacityExhausted)
        assert ending.error.details["knob"] == "DYN_MIGRATION_MAX_WAITING"
        assert ending.error.details["measured"] == 3
    fleet.add("w1")
    await settle()
    assert [s.request.request_id for s in fleet.attempts] == [c.plans[0].request_id for c in clients[:3]]
    for stream in list(fleet.attempts):
        stream.accept().emit(1).end("length")
    for client in clients[:3]:
        assert (await client.done()).state == "done"
    assert fleet.leases() == {}


@virtual
async def test_waiters_are_served_in_order_of_arrival() -> None:
    fleet = Fleet(workers=0)
    clients = []
    for _ in range(40):
        clients.append(fleet.start(length=1))
        await asyncio.sleep(0.013)
    fleet.add("w1")
    await settle()
    order = [s.request.request_id for s in fleet.attempts]
    assert sorted(order) == sorted(c.plans[0].request_id for c in clients)
    for stream in list(fleet.attempts):
        stream.accept().emit(1).end("length")
    for client in clients:
        await client.done()


@virtual
async def test_a_pong_wakes_nobody() -> None:
    fleet = Fleet(workers=0)
    client = fleet.start(length=1)
    await settle()
    looks = 0
    usable = fleet.usable

    def counted(model: str) -> object:
        nonlocal looks
        looks += 1
        return usable(model)

    fleet.usable = counted  # type: ignore[method-assign,assignment]
    for _ in range(100):
        fleet.tell("pong", object())  # type: ignore[arg-type]
        await settle(2)
    assert looks == 0
    client.request.cancel("test")
    await client.done()


@virtual
async def test_all_streams_of_a_frozen_fleet_wait_and_go_on() -> None:
    fleet = Fleet(workers=2)
    clients = [fleet.start(length=4) for _ in range(10)]
    await settle()
    for stream in fleet.attempts:
        stream.accept().emit(2)
    for worker in fleet.workers:
        worker.die(PeerSilent("silent"))
    await asyncio.sleep(5)
    assert fleet.services.leases.held("waiting") == 10
    for worker in fleet.workers:
        worker.usable = True
        fleet.tell("state", worker)
    await settle()
    for stream in fleet.attempts[10:]:
        stream.accept().emit(2).end("length")
    for client in clients:
        assert (await client.done()).state == "done"
    assert fleet.leases() == {}
