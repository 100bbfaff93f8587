"""Overload: who is turned away and when, who waits, who is served first; never a stream that was accepted."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.base.errors import CapacityExhausted, Disconnected, HoldfastError, WorkerDraining, WorkerSaturated
from holdfast.routing.config import AdmissionSettings
from holdfast.wire.frames import Load, Pong, Progress
from tests.requests.fakes import Client, FakeStream, Fleet, settle
from tests.support.virtual_time import VirtualLoop, virtual

TOKENS: Literal["active_prefill_tokens_threshold"] = "active_prefill_tokens_threshold"
CROWD = 16


def fleet(workers: int = 2, **admission: Any) -> Fleet:
    return Fleet(workers, settings={"admission": AdmissionSettings(**admission)})


def rejection(client: Client) -> HoldfastError:
    assert client.ending.state == "rejected"
    error = client.ending.error
    assert isinstance(error, CapacityExhausted)
    assert {"layer", "knob", "threshold", "measured"} <= set(error.details)
    assert error.retry_after is not None
    assert error.retry_after >= 1.0
    return error


def accept_all(up: Fleet) -> None:
    for stream in up.attempts:
        if not stream.accepted and not stream.over:
            stream.accept()


def say(up: Fleet, index: int = 0, prefill_tokens: int = 0) -> None:
    """A pong that includes everything sent so far."""
    worker = up.workers[index]
    worker.pong = Pong(1, Progress(), Load(kv_total_blocks=100, prefill_tokens=prefill_tokens), len(worker.opened))
    up.tell("pong", worker)


@virtual
async def test_a_simultaneous_burst_cannot_slip_past() -> None:
    """Prompts of 4 tokens; a worker is saturated over 8 tokens to compute: three each, before any pong."""
    up = fleet(2, active_prefill_tokens_threshold=8)
    clients = [up.start() for _ in range(CROWD)]
    await settle()
    turned_away = [c for c in clients if c.sink.endings]
    assert len(turned_away) == CROWD - 6
    assert len(up.attempts) == 6, "P6: no worker was asked for those turned away"
    for client in turned_away:
        assert rejection(client).details["knob"] == "DYN_ACTIVE_PREFILL_TOKENS_THRESHOLD"
    accept_all(up)
    for stream in list(up.attempts):
        stream.emit(10).end("length")
    await settle()
    late = up.start()
    await settle()
    assert not late.sink.endings, "the prompts are computed: there is room again, without a pong"


@virtual
async def test_a_threshold_set_or_cleared_is_effective_at_once() -> None:
    up = fleet(1)
    first = up.start()
    await settle()
    up.services.thresholds.set("m", {TOKENS: 0})
    second = up.start()
    await settle()
    assert rejection(second).details["threshold"] == 0
    up.services.thresholds.set("m", {TOKENS: None})
    third = up.start()
    await settle()
    assert not first.sink.endings
    assert not third.sink.endings
    assert len(up.attempts) == 2


@virtual
async def test_choices_of_one_request_are_admitted_together() -> None:
    up = fleet(1, active_prefill_tokens_threshold=0)
    crowd = up.start(n=4)
    await settle()
    assert len(up.attempts) == 4, "the first one was admitted, and the others are its promise"
    refused = up.start(n=3)
    await settle()
    assert [sink.endings[0].state for sink in refused.sinks] == ["rejected"] * 3
    assert len(up.attempts) == 4
    assert not crowd.sink.endings


@virtual
async def test_a_moving_stream_is_never_turned_away_but_waits_for_room() -> None:
    up = fleet(2, active_prefill_tokens_threshold=8)
    moving = up.start(length=5)
    await settle()
    up.attempts[0].accept().emit(2)
    say(up, 0)
    say(up, 1, prefill_tokens=50)
    up.workers[0].die()
    await asyncio.sleep(1.0)
    assert not moving.sink.endings
    assert len(up.attempts) == 1, "it waits for room"
    newcomer = up.start()
    await settle()
    assert rejection(newcomer)
    say(up, 1, prefill_tokens=0)
    await settle()
    assert len(up.attempts) == 2, "the moment there is room it goes on"
    up.attempts[1].accept().emit(3).end("length")
    assert (await moving.done()).state == "done"


@virtual
async def test_a_moving_stream_goes_to_a_saturated_worker_rather_than_fail() -> None:
    up = fleet(2, active_prefill_tokens_threshold=8)
    moving = up.start(length=3)
    await settle()
    up.attempts[0].accept().emit(1)
    say(up, 1, prefill_tokens=50)
    up.workers[0].die()
    await asyncio.sleep(4.9)
    assert len(up.attempts) == 1
    await asyncio.sleep(0.2)
    up.attempts[1].accept().emit(2).end("length")
    assert (await moving.done()).state == "done"
    assert up.leases() == {}


@virtual
async def test_refused_by_all_workers_then_queued_then_served() -> None:
    """Workers' own limits: elsewhere first, then the queue; no refusal counts against a worker (P10)."""
    up = fleet(2, admission_queue_limit=4)
    client = up.start(length=1)
    await settle()
    for _ in range(2):
        up.attempts[-1].refuse(WorkerSaturated("full", knob="DYN_ENGINE_REQUEST_LIMIT", threshold=1, measured=1))
        await settle()
    assert up.leases() == {"request": 1, "stream": 1, "queued": 1}
    await asyncio.sleep(0.3)
    say(up, 0)
    await settle()
    up.attempts[-1].accept().emit(1).end("length")
    assert (await client.done()).state == "done"
    assert all(error.fault == "capacity" for worker in up.workers for error in worker.failures)
    assert up.leases() == {}


@virtual
async def test_the_queue_serves_by_priority_and_then_in_order() -> None:
    up = fleet(1, active_prefill_tokens_threshold=0, admission_queue_limit=10)
    first = up.start(length=1, prompt=[1])
    await settle()
    order = {"low": {}, "low2": {}, "high": {"priority": 5}, "strict": {"strict_priority": 1}, "high2": {"priority": 5}}
    waiting = {name: up.start(length=1, prompt=[i + 2], **how) for i, (name, how) in enumerate(order.items())}
    await settle()
    assert up.leases() == {"request": 6, "stream": 6, "attempt": 1, "queued": 5}
    served = []
    for _ in range(6):
        stream = up.attempts[-1]
        stream.accept().emit(1).end("length")
        await settle()
        served += [n for n, c in waiting.items() if c.sink.endings and n not in served]
    assert served == ["strict", "high", "high2", "low", "low2"]
    assert (await first.done()).state == "done"
    assert up.leases() == {}


@virtual
async def test_a_newcomer_does_not_overtake_the_queue() -> None:
    """Room appears and a new request comes in the same turn of the loop: the one that waits gets it."""
    up = fleet(1, active_prefill_tokens_threshold=0, admission_queue_limit=10)
    up.start(prompt=[1])
    await settle()
    patient = up.start(prompt=[2])
    await settle()
    up.attempts[0].accept().emit(1)
    newcomer = up.start(prompt=[3])
    say(up, 0)
    await settle()
    assert [s.request.prompt_ids for s in up.attempts[1:]] == [patient.plans[0].prompt_ids]
    assert not newcomer.sink.endings


@virtual
async def test_the_queue_is_bounded_in_number_and_time() -> None:
    up = fleet(1, active_prefill_tokens_threshold=0, admission_queue_limit=2, admission_queue_timeout=7.0)
    up.start()
    await settle()
    waiting = [up.start() for _ in range(2)]
    await settle()
    crowded = up.start()
    await settle()
    assert rejection(crowded).details["knob"] == "DYN_ADMISSION_QUEUE_LIMIT"
    important = up.start(priority=1)
    await settle()
    assert rejection(waiting[1]).details["knob"] == "DYN_ADMISSION_QUEUE_LIMIT", "the least important, newest goes"
    began = asyncio.get_running_loop().time()
    await waiting[0].done()
    await important.done()
    assert asyncio.get_running_loop().time() - began == pytest.approx(7.0, abs=0.3)
    late = rejection(waiting[0])
    assert late.details["knob"] == "DYN_ADMISSION_QUEUE_TIMEOUT_SECS"
    assert late.details["threshold"] == 7.0
    assert len(up.attempts) == 1


@virtual
async def test_important_models_requests_are_shed_last() -> None:
    up = fleet(1, active_prefill_tokens_threshold=0, admission_queue_limit=1, model_priorities=("m=-3", "vip=5"))
    up.workers[0].cards["vip"] = up.workers[0].cards["m"]
    up.start()
    await settle()
    plain = up.start(priority=4)
    await settle()
    important = up.start(model="vip")
    await settle()
    assert rejection(plain)
    assert not important.sink.endings


@virtual
async def test_the_choices_of_a_request_leave_the_queue_together() -> None:
    up = fleet(1, active_prefill_tokens_threshold=0, admission_queue_limit=3)
    up.start()
    await settle()
    trio = up.start(n=3)
    await settle()
    up.start(priority=1)
    await settle()
    assert [sink.endings[0].state for sink in trio.sinks] == ["rejected"] * 3, "all or none"
    pair = up.start(n=2, priority=1)
    await settle()
    for _ in range(2):
        up.attempts[-1].accept().emit(1)
        await settle()
    assert len([s for s in up.attempts if s.request.request_id in {p.request_id for p in pair.plans}]) == 2


@virtual
async def test_cancelled_while_queued() -> None:
    up = fleet(1, active_prefill_tokens_threshold=0, admission_queue_limit=3)
    up.start(length=1)
    await settle()
    gone, next_one = up.start(), up.start(length=1)
    await settle()
    gone.request.cancel("client_disconnected")
    await gone.done()
    up.attempts[0].accept().emit(1).end("length")
    await settle()
    up.attempts[-1].accept().emit(1).end("length")
    assert (await next_one.done()).state == "done"
    assert len(up.attempts) == 2
    assert up.leases() == {}


@virtual
async def test_the_requests_own_deadline_ends_the_wait() -> None:
    up = fleet(1, active_prefill_tokens_threshold=0, admission_queue_limit=3)
    up.start()
    await settle()
    hurried = up.start(total=2.0)
    ending = await hurried.done()
    assert (ending.state, ending.error and ending.error.details["knob"]) == ("expired", "DYN_REQUEST_TIMEOUT")


@virtual
async def test_queued_while_the_last_worker_leaves_for_good() -> None:
    up = fleet(1, active_prefill_tokens_threshold=0, admission_queue_limit=3)
    up.start()
    await settle()
    queued = up.start()
    await settle()
    up.workers[0].usable = False
    up.expected = False
    up.tell("removed", up.workers[0])
    await settle()
    assert queued.ending.error is not None
    assert queued.ending.error.code == "no_workers"


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(
            ["new", "accept", "token", "end", "refuse", "break", "drain", "pong", "sleep", "cancel", "knob"]
        ),
        st.integers(0, 99),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(ACTIONS, st.integers(0, 3), st.sampled_from([None, 0, 8]))
def test_whatever_happens(actions: list[tuple[str, int]], limit: int, threshold: int | None) -> None:
    """P2, P4, P6, P10 under random load, refusals, moves, cancels and changing thresholds; at rest nothing is held."""

    async def play() -> None:
        up = fleet(
            2, active_prefill_tokens_threshold=threshold, admission_queue_limit=limit, admission_queue_timeout=9.0
        )
        clients: list[Client] = []
        for what, number in actions:
            await _act(up, clients, what, number)
            await settle()
            _check(up, clients, limit)
        for client in clients:
            client.request.cancel("end of the test")
        for client in clients:
            await client.done()
        assert up.leases() == {}
        assert up.services.admission.ledger.held() == 0
        assert not any(error.fault != "capacity" and isinstance(error, CapacityExhausted) for error in _failures(up))

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(play())


async def _act(up: Fleet, clients: list[Client], what: str, number: int) -> None:
    live = [s for s in up.attempts if not s.over]
    stream: FakeStream | None = live[number % len(live)] if live else None
    if what == "new":
        clients.append(up.start(length=4, priority=number % 3, n=1 + number % 2))
    elif what == "knob":
        up.services.thresholds.set("m", {TOKENS: [None, 0, 8, 100][number % 4]})
    elif what == "pong":
        say(up, number % 2, prefill_tokens=number % 10)
    elif what == "sleep":
        await asyncio.sleep(number / 20)
    elif what == "cancel" and clients:
        clients[number % len(clients)].request.cancel("gone")
    elif stream is not None and not stream.accepted:
        stream.refuse(
            WorkerSaturated("full", knob="K", threshold=1, measured=1)
        ) if what == "refuse" else stream.accept()
    elif stream is not None:
        _act_on(stream, what)


def _act_on(stream: FakeStream, what: str) -> None:
    if what == "break":
        stream.breaks(Disconnected("reset"))
    elif what == "drain":
        stream.end("error", WorkerDraining("leaving"))
    elif len(stream.ids) < 4:
        stream.emit(1)
        if len(stream.ids) == 4:
            stream.end("length")


def _check(up: Fleet, clients: list[Client], limit: int) -> None:
    leases = up.services.leases
    assert leases.held("queued") <= limit
    assert leases.held("attempt") == up.services.admission.ledger.held()
    rejected = [c for c in clients if any(e.state == "rejected" for s in c.sinks for e in s.endings)]
    for client in rejected:
        ids = {plan.prompt_ids + plan.request_id.encode() for plan in client.plans}
        accepted = [
            s for s in up.attempts if s.accepted and s.request.prompt_ids + s.request.request_id.encode() in ids
        ]
        assert not accepted, "P6: a worker had accepted what was rejected"


def _failures(up: Fleet) -> list[HoldfastError]:
    return [error for worker in up.workers for error in worker.failures]
