"""One killer among many streams: what it costs in workers and streams, and how long the innocent are delayed."""

from __future__ import annotations

import asyncio

import pytest

from holdfast.base.errors import PoisonRequest
from tests.requests.fakes import Client, FakeStream, Fleet, truth
from tests.requests.machine import STEP, KillsAt, machines
from tests.support.virtual_time import virtual

KILLER = 13_000


def is_killer(stream: FakeStream) -> bool:
    return stream.request.prompt_ids.startswith(KILLER.to_bytes(4, "little"))


def at_prefill(stream: FakeStream) -> bool:
    return is_killer(stream) and len(stream.ids) == stream.begin


def at_token(index: int) -> KillsAt:
    return lambda stream: is_killer(stream) and len(stream.ids) >= index


def each_time_after(tokens: int) -> KillsAt:
    return lambda stream: is_killer(stream) and len(stream.ids) - stream.begin >= tokens


async def crowd(
    fleet: Fleet, *, streams: int = 100, killer_at: int = 50, spread: float = 0.0, length: int = 30
) -> list[Client]:
    clients = []
    for i in range(streams):
        prompt = (KILLER, i) if i == killer_at else (i, i)
        clients.append(fleet.start(prompt=prompt, length=length))
        if spread:
            await asyncio.sleep(spread)
    for client in clients:
        await client.done()
    assert fleet.leases() == {}
    return clients


def lost(clients: list[Client]) -> list[int]:
    return [i for i, c in enumerate(clients) if c.ending.state != "done"]


@pytest.mark.parametrize("restart", [0.5, None])
@pytest.mark.parametrize("spread", [0.0, 0.001, 0.01])
@pytest.mark.parametrize("killer_at", [0, 49, 50, 99])
@virtual
async def test_a_killer_prompt_costs_two_workers_and_one_stream(
    killer_at: int, spread: float, restart: float | None
) -> None:
    fleet = Fleet(workers=2 if restart else 3)
    fleet_machines = machines(fleet, kills=at_prefill, restart_after=restart)
    clients = await crowd(fleet, killer_at=killer_at, spread=spread)
    assert lost(clients) == [killer_at]
    assert isinstance(clients[killer_at].ending.error, PoisonRequest)
    assert sum(m.deaths for m in fleet_machines) == 2
    for client in clients[:killer_at] + clients[killer_at + 1 :]:
        assert client.sink.tokens == truth(client.plans[0].prompt_ids, 30)


@pytest.mark.parametrize("batch", [1, 8, 100])
@virtual
async def test_the_innocent_are_not_kept_waiting_longer_than_the_trials_take(batch: int) -> None:
    fleet = Fleet(workers=2)
    machines(fleet, kills=at_prefill, restart_after=0.3, prefill_batch=batch)
    clients = await crowd(fleet, killer_at=20)
    gaps = [m.gap_seconds for c in clients for m in c.ending.moves if c.ending.state == "done"]
    assert gaps
    assert max(gaps) < 50 * (STEP + 0.002) + 0.3 + 1.0


@virtual
async def test_streams_that_had_tokens_move_at_once_and_untried() -> None:
    fleet = Fleet(workers=2)
    first, _ = machines(fleet, restart_after=None, prefill_batch=100)
    clients = [fleet.start(prompt=(i,), length=50) for i in range(60)]
    await asyncio.sleep(0.2)
    first.die()
    for client in clients:
        await client.done()
    gaps = [m.gap_seconds for c in clients for m in c.ending.moves]
    assert len(gaps) == 30
    assert max(gaps) < 4 * STEP
    assert fleet.leases() == {}


@virtual
async def test_a_conviction_frees_the_other_suspects_at_once() -> None:
    """The killer is tried first or early; those behind it do not go through trials of their own."""
    fleet = Fleet(workers=3)
    fleet_machines = machines(fleet, kills=at_prefill, restart_after=None, prefill_batch=1)
    for machine in fleet_machines[1:]:
        machine.step = 0.2
    clients = await crowd(fleet, streams=60, killer_at=0, length=3)
    assert lost(clients) == [0]
    assert sum(m.deaths for m in fleet_machines) == 2
    convicted = clients[0].ending.attempts
    assert convicted == 2
    moved = [c for c in clients[1:] if c.ending.moves]
    waits = sorted(m.gap_seconds for c in moved for m in c.ending.moves)
    assert waits[len(waits) // 2] < 20 * 0.2 * 2


@pytest.mark.parametrize("at", [1, 5, 20])
@virtual
async def test_a_killer_that_dies_at_a_fixed_token_costs_three_workers_and_one_stream(at: int) -> None:
    fleet = Fleet(workers=2)
    fleet_machines = machines(fleet, kills=at_token(at))
    clients = await crowd(fleet, killer_at=30)
    assert lost(clients) == [30]
    assert isinstance(clients[30].ending.error, PoisonRequest)
    assert len(clients[30].sink.tokens) == at
    assert sum(m.deaths for m in fleet_machines) <= 3


@pytest.mark.parametrize(
    "kills", [at_token(1), at_token(5), at_token(20), each_time_after(1), each_time_after(3), each_time_after(7)]
)
@virtual
async def test_where_all_with_few_tokens_are_tried_a_killer_that_waits_costs_two_workers(kills: KillsAt) -> None:
    fleet = Fleet(workers=2, settings={"migration_trial_tokens": 32})
    fleet_machines = machines(fleet, kills=kills, prefill_batch=100)
    clients = await crowd(fleet, killer_at=30)
    assert lost(clients) == [30]
    assert isinstance(clients[30].ending.error, PoisonRequest)
    assert sum(m.deaths for m in fleet_machines) == 2


@pytest.mark.parametrize(("trial_tokens", "median", "longest"), [(1, 1.1, 1.1), (32, 5.1, 9.1)])
@virtual
async def test_what_it_costs_to_try_all_with_few_tokens(trial_tokens: int, median: float, longest: float) -> None:
    """Five streams that move to one worker, in steps: each waits until the one before has two tokens."""
    fleet = Fleet(workers=2, settings={"migration_trial_tokens": trial_tokens})
    first, _ = machines(fleet, restart_after=None, prefill_batch=100)
    clients = [fleet.start(prompt=(i,), length=60) for i in range(10)]
    await asyncio.sleep(0.2)
    first.die()
    for client in clients:
        await client.done()
    gaps = sorted(m.gap_seconds / STEP for c in clients for m in c.ending.moves)
    assert len(gaps) == 5
    assert gaps[2] == pytest.approx(median, abs=0.5)
    assert gaps[-1] == pytest.approx(longest, abs=0.5)


@pytest.mark.parametrize(("trial_tokens", "convicted"), [(1, False), (32, True)])
@virtual
async def test_a_stream_that_went_from_one_killed_worker_to_the_next(trial_tokens: int, convicted: bool) -> None:
    """The price of two: somebody who kills both workers, the second within the stream's turn, looks like the stream."""
    fleet = Fleet(workers=3, settings={"migration_trial_tokens": trial_tokens})
    fleet_machines = machines(fleet, restart_after=None)
    client = fleet.start(prompt=(1,), length=60)
    await asyncio.sleep(20.5 * STEP)
    for _ in range(2):
        next(m for m in fleet_machines if m.running).die()
        await asyncio.sleep(STEP / 2)
    await client.done()
    assert isinstance(client.ending.error, PoisonRequest) is convicted


@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize("tokens", [1, 3, 7])
@virtual
async def test_a_killer_that_makes_a_little_progress_each_time_costs_three_workers_and_one_stream(
    tokens: int, workers: int
) -> None:
    fleet = Fleet(workers=workers)
    fleet_machines = machines(fleet, kills=each_time_after(tokens))
    clients = await crowd(fleet, killer_at=30, streams=100)
    assert lost(clients) == [30]
    assert sum(m.deaths for m in fleet_machines) <= 3


@virtual
async def test_a_killer_that_makes_much_progress_each_time_is_stopped_by_the_limit() -> None:
    fleet = Fleet(workers=4)
    fleet_machines = machines(fleet, kills=each_time_after(25))
    clients = await crowd(fleet, killer_at=30, streams=100, length=200)
    assert 30 in lost(clients)
    assert sum(m.deaths for m in fleet_machines) <= 4


@virtual
async def test_a_killer_at_the_door() -> None:
    """It kills before the worker can say accept."""
    fleet = Fleet(workers=2)
    fleet_machines = machines(fleet, kills=is_killer, kills_at_door=True)
    clients = await crowd(fleet, killer_at=50, spread=0.001)
    assert lost(clients) == [50]
    assert isinstance(clients[50].ending.error, PoisonRequest)
    assert sum(m.deaths for m in fleet_machines) <= 3


@virtual
async def test_two_killers() -> None:
    fleet = Fleet(workers=3)
    fleet_machines = machines(fleet, kills=at_prefill)
    clients = []
    for i in range(100):
        clients.append(fleet.start(prompt=(KILLER if i in (10, 60) else i, i), length=20))
        await asyncio.sleep(0.001)
    for client in clients:
        await client.done()
    assert lost(clients) == [10, 60]
    assert sum(m.deaths for m in fleet_machines) <= 5
    assert fleet.leases() == {}


@virtual
async def test_six_killers_do_not_use_up_the_limit_of_the_innocent() -> None:
    fleet = Fleet(workers=3)
    machines(fleet, kills=at_prefill, restart_after=0.1)
    killers = [10, 11, 40, 60, 61, 90]
    clients = []
    for i in range(100):
        clients.append(fleet.start(prompt=(KILLER if i in killers else i, i), length=200))
        await asyncio.sleep(0.03)
    for client in clients:
        await client.done(within=1000)
    assert lost(clients) == killers
    assert fleet.leases() == {}


@virtual
async def test_the_burst_after_the_death_of_an_idle_worker_is_not_tried_one_by_one() -> None:
    fleet = Fleet(workers=2)
    first, _ = machines(fleet, restart_after=None, prefill_batch=1000)
    clients = [fleet.start(prompt=(i,), length=3) for i in range(240)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    first.die()
    for client in clients:
        await client.done()
    assert lost(clients) == []
    assert asyncio.get_running_loop().time() - 1_000 < 0.2


@virtual
async def test_a_slow_trial_keeps_nobody_for_long() -> None:
    fleet = Fleet(workers=2)
    first, second = machines(fleet, restart_after=None, prefill_batch=1000)
    clients = [fleet.start(prompt=(i,), length=3) for i in range(20)]
    await asyncio.sleep(0.005)
    second.step = 12.0
    first.die()
    for client in clients:
        await client.done()
    assert lost(clients) == []
    assert asyncio.get_running_loop().time() - 1_000 < 12 * 5
    gaps = sorted(m.gap_seconds for c in clients for m in c.ending.moves)
    assert gaps[-1] < 5 + 12 * 2 + 0.5


@virtual
async def test_a_worker_killed_twice_under_different_streams_convicts_nobody() -> None:
    fleet = Fleet(workers=2)
    fleet_machines = machines(fleet, restart_after=0.2)
    clients = [fleet.start(prompt=(i,), length=100) for i in range(40)]
    for turn in range(6):
        await asyncio.sleep(0.6)
        fleet_machines[turn % 2].die()
    for client in clients:
        await client.done()
    assert not [c for c in clients if isinstance(c.ending.error, PoisonRequest)]
