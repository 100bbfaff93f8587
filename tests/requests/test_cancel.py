"""A cancel ends everything, at every moment: no attempt starts after it, one terminal event, nothing is held."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from holdfast.base.errors import Cancelled, Disconnected, EngineFailed, InvalidRequest, WorkerSaturated
from tests.requests.fakes import Client, Fleet, settle, truth
from tests.support.virtual_time import virtual


async def nobody(fleet: Fleet, client: Client) -> None:
    """Cancelled while it is queued: its task has not even begun."""


async def waiting_for_the_first(fleet: Fleet, client: Client) -> None:
    await settle()
    assert fleet.services.leases.held("waiting") == 1


async def dispatched(fleet: Fleet, client: Client) -> None:
    await settle()


async def accepted(fleet: Fleet, client: Client) -> None:
    await settle()
    fleet.attempts[-1].accept()


async def streaming(fleet: Fleet, client: Client) -> None:
    await accepted(fleet, client)
    fleet.attempts[-1].emit(2)


async def failed_this_instant(fleet: Fleet, client: Client) -> None:
    await streaming(fleet, client)
    fleet.attempts[-1].breaks()


async def refused_this_instant(fleet: Fleet, client: Client) -> None:
    await settle()
    fleet.attempts[-1].refuse(WorkerSaturated("full"))


async def in_the_pacer(fleet: Fleet, client: Client) -> None:
    fleet.services.pacer._saved = fleet.services.pacer._burst = 0.0
    fleet.services.pacer._rate = 1e-6
    await failed_this_instant(fleet, client)
    await settle()


async def paying(fleet: Fleet, client: Client) -> None:
    await streaming(fleet, client)
    fleet.attempts[-1].end("error", EngineFailed("one"))
    await settle()
    budget = fleet.services.budget
    budget.withdraw(asyncio.get_running_loop().time())
    budget._saved, budget._floor = 0.0, 0.1
    fleet.attempts[-1].accept().end("error", EngineFailed("two"))
    await settle()
    assert len(fleet.attempts) == 2


async def waiting_for_a_replacement(fleet: Fleet, client: Client) -> None:
    await streaming(fleet, client)
    for worker in fleet.workers:
        worker.die()
    await asyncio.sleep(1)
    assert fleet.services.leases.held("waiting") == 1


async def called_this_instant(fleet: Fleet, client: Client) -> None:
    await waiting_for_a_replacement(fleet, client)
    fleet.workers[0].restart()


async def second_attempt(fleet: Fleet, client: Client) -> None:
    await failed_this_instant(fleet, client)
    await settle()
    assert len(fleet.attempts) == 2


Moment = Callable[[Fleet, Client], Awaitable[None]]
MOMENTS: list[tuple[Moment, int]] = [
    (nobody, 2),
    (waiting_for_the_first, 0),
    (dispatched, 2),
    (accepted, 2),
    (streaming, 2),
    (failed_this_instant, 2),
    (refused_this_instant, 2),
    (in_the_pacer, 2),
    (paying, 2),
    (waiting_for_a_replacement, 2),
    (called_this_instant, 2),
    (second_attempt, 2),
]


@pytest.mark.parametrize(("moment", "workers"), MOMENTS, ids=[m.__name__ for m, _ in MOMENTS])
@virtual
async def test_cancel(moment: Moment, workers: int) -> None:
    fleet = Fleet(workers=workers)
    client = fleet.start(length=10)
    await moment(fleet, client)
    began = len(fleet.attempts)
    at = asyncio.get_running_loop().time()
    client.request.cancel("client_disconnected")
    client.request.cancel("again")
    assert len(client.sink.endings) == 1, "the terminal event does not wait"
    assert all(s.over for s in fleet.attempts), "the worker is told at once"
    ending = await client.done()
    assert asyncio.get_running_loop().time() == at
    assert (ending.state, type(ending.error)) == ("cancelled", Cancelled)
    assert ending.error is not None
    assert ending.error.details["reason"] == "client_disconnected"
    for worker in fleet.workers:
        worker.usable = True
        fleet.tell("state", worker)
    await asyncio.sleep(60)
    assert len(fleet.attempts) == began, "an attempt started after the cancel"
    assert fleet.leases() == {}
    assert len(fleet.seen.all("ended")) == 1


@virtual
async def test_a_cancel_before_run_makes_run_return() -> None:
    fleet = Fleet()
    client = fleet.start(run=False)
    client.request.cancel("early")
    await client.request.run()
    assert [e.state for e in client.sink.endings] == ["cancelled"]
    assert fleet.attempts == []
    assert fleet.leases() == {}


@pytest.mark.parametrize("order", ["end first", "cancel first"])
@virtual
async def test_a_cancel_races_with_the_end(order: str) -> None:
    fleet = Fleet()
    client = fleet.start(length=3)
    await settle()
    stream = fleet.attempts[-1].accept().emit(2)
    with fleet.read():
        if order == "cancel first":
            client.request.cancel("gone")
        stream.emit(1)
        stream.handler.on_end("length", None, 0)
        if order == "end first":
            client.request.cancel("gone")
    ending = await client.done()
    assert ending.state == "cancelled"
    assert client.sink.tokens == truth(client.plans[0].prompt_ids, 2)
    assert fleet.leases() == {}


@virtual
async def test_a_cancel_after_the_end_changes_nothing() -> None:
    fleet = Fleet()
    client = fleet.start(length=1)
    await settle()
    fleet.attempts[-1].accept().emit(1).end("length")
    client.request.cancel("late")
    assert (await client.done()).state == "done"


@virtual
async def test_the_client_goes_while_it_is_written_to() -> None:
    fleet = Fleet()
    client = fleet.start(length=9)
    deliver = client.sink.deliver

    def goes(tokens: list[int], logprobs: object) -> int:
        result = deliver(tokens, None)
        client.request.cancel("client_disconnected")
        return result

    client.sink.deliver = goes  # type: ignore[method-assign,assignment]
    await settle()
    stream = fleet.attempts[-1].accept().emit(2)
    assert stream.killed == "cancelled"
    ending = await client.done()
    assert (ending.state, ending.completion_tokens) == ("cancelled", 2)


@virtual
async def test_the_client_goes_at_accept() -> None:
    fleet = Fleet()
    client = fleet.start(length=9)
    client.sink.accepted = lambda worker: client.request.cancel("client_disconnected")  # type: ignore[method-assign]
    await settle()
    stream = fleet.attempts[-1].accept()
    assert stream.killed == "cancelled"
    assert (await client.done()).state == "cancelled"


@virtual
async def test_all_choices_are_cancelled_together() -> None:
    fleet = Fleet()
    client = fleet.start(length=9, n=4)
    await settle()
    fleet.attempts[0].accept().emit(2)
    fleet.attempts[1].breaks()
    client.request.cancel("gone")
    await client.done()
    assert [s.endings[0].state for s in client.sinks] == ["cancelled"] * 4
    assert all(s.over for s in fleet.attempts)
    assert fleet.leases() == {}


@virtual
async def test_shutdown_of_the_task_is_a_cancel_and_is_passed_on() -> None:
    for moment, workers in MOMENTS[1:]:
        fleet = Fleet(workers=workers)
        client = fleet.start(length=10)
        await moment(fleet, client)
        assert client.task is not None
        client.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await client.task
        assert [e.state for e in client.sink.endings] == ["cancelled"], moment.__name__
        assert fleet.leases() == {}, moment.__name__


@virtual
async def test_both_at_once_the_callers_cancel_is_not_swallowed() -> None:
    fleet = Fleet(workers=0)
    client = fleet.start(length=10)
    await settle()
    client.request.cancel("gone")
    assert client.task is not None
    client.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await client.task
    assert len(client.sink.endings) == 1


@virtual
async def test_the_callers_task_is_left_clean() -> None:
    """A timeout around or after the request must not be confused by the driver's own interruption."""
    fleet = Fleet(workers=0)
    client = fleet.start(run=False)
    asyncio.get_running_loop().call_later(1, client.request.cancel, "gone")
    async with asyncio.timeout(5):
        await client.request.run()
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            await asyncio.sleep(2)


@virtual
async def test_an_output_that_fails_ends_only_its_own_stream(caplog: pytest.LogCaptureFixture) -> None:
    fleet = Fleet(workers=1)
    bad, good = fleet.start(length=4), fleet.start(length=4)
    await settle()
    for stream in fleet.attempts:
        stream.accept().emit(1)
    bad.sink.fault = ValueError("cannot encode")
    with fleet.read():
        for stream in fleet.attempts:
            stream.emit(1)
    assert fleet.attempts[0].killed
    ending = bad.sink.endings[0]
    assert (ending.state, ending.error and ending.error.code) == ("failed", "internal")
    bad.sink.fault = None
    fleet.attempts[0].emit(1)
    fleet.attempts[1].emit(2).end("length")
    assert (await good.done()).state == "done"
    assert bad.task is not None
    await bad.task
    assert len(bad.sink.tokens) == 1
    assert fleet.leases() == {}


@pytest.mark.parametrize("where", ["accepted", "ended"])
@virtual
async def test_other_faults_of_an_output_are_contained(where: str) -> None:
    fleet = Fleet()
    client, other = fleet.start(length=2), fleet.start(length=2)

    def fails(*_: object) -> None:
        raise ValueError(where)

    setattr(client.sink, where, fails)
    await settle()
    for stream in fleet.attempts:
        stream.accept()
        if not stream.over:
            stream.emit(2).end("length")
    assert client.task is not None
    await asyncio.wait_for(client.task, 1)
    assert client.stream.ended is not None
    assert client.stream.ended.state == ("failed" if where == "accepted" else "done")
    assert (await other.done()).state == "done"
    assert fleet.leases() == {}


@virtual
async def test_a_fault_in_the_driver_ends_the_stream() -> None:
    fleet = Fleet()

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    fleet.workers[0].open = broken  # type: ignore[method-assign,assignment]
    client = fleet.start()
    ending = await client.done()
    assert ending.error is not None
    assert ending.error.code == "internal"
    assert fleet.leases() == {}


@virtual
async def test_callbacks_inside_open() -> None:
    """A worker may answer before `open` returns."""
    fleet = Fleet(workers=2)
    original = fleet.workers[0].open

    def eager(*args: object, **kwargs: object) -> object:
        stream = original(*args, **kwargs)  # type: ignore[arg-type]
        stream.accept().emit(1)
        stream.breaks(Disconnected("at once"))
        return stream

    fleet.workers[0].open = eager  # type: ignore[method-assign,assignment]
    client = fleet.start(length=3)
    await settle()
    assert len(fleet.attempts) == 2
    fleet.attempts[-1].accept().emit(2).end("length")
    assert (await client.done()).attempts == 2


@virtual
async def test_a_mistake_of_the_caller_found_after_accept() -> None:
    fleet = Fleet()
    client = fleet.start()
    await settle()
    fleet.attempts[-1].accept().end("error", InvalidRequest("bad grammar"))
    ending = await client.done()
    assert (ending.state, ending.error and ending.error.code) == ("failed", "invalid_request")
