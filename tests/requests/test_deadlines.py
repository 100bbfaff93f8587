"""Every stage has a bound, nobody is judged by time in which we or the client stood still."""

from __future__ import annotations

import asyncio

import pytest

from holdfast.base.errors import ClientStalled, DeadlineExceeded, NoWorkers
from holdfast.engines.contract import Sampling
from holdfast.requests.deadlines import SWEEP
from tests.requests.fakes import Fleet, settle, truth
from tests.support.virtual_time import jump, virtual

SLACK = 3 * SWEEP


def now() -> float:
    return asyncio.get_running_loop().time()


@virtual
async def test_no_accept_another_worker_is_tried() -> None:
    fleet = Fleet()
    client = fleet.start(length=1)
    await asyncio.sleep(0.5 - SWEEP)
    assert len(fleet.attempts) == 1
    await asyncio.sleep(SLACK)
    assert len(fleet.attempts) == 2
    first, second = fleet.attempts
    assert first.over
    assert second.worker is not first.worker
    assert first.worker.failures == [], "it may just be slow"
    second.accept().emit(1).end("length")
    ending = await client.done()
    assert ending.moves[0].cause == "accept_overdue"


@virtual
async def test_hedging_asks_each_worker_once_then_is_patient() -> None:
    fleet = Fleet(workers=3)
    client = fleet.start(length=1)
    await asyncio.sleep(9)
    assert len(fleet.attempts) == 3 + 0
    assert len({s.worker.instance for s in fleet.attempts}) == 3
    fleet.attempts[-1].accept().emit(1).end("length")
    assert (await client.done()).attempts == 3


@virtual
async def test_the_only_worker_gets_the_whole_time_and_the_limit_counts() -> None:
    fleet = Fleet(workers=1, settings={"migration_limit": 1})
    client = fleet.start(length=1, wait=100)
    await asyncio.sleep(9.9)
    assert len(fleet.attempts) == 1
    ending = await client.done()
    assert now() - 1_000 == pytest.approx(20.4, abs=0.5)
    assert ending.attempts == 2
    assert ending.error is not None
    assert (ending.error.code, ending.error.details["last_error"]) == ("migration_exhausted", "accept_overdue")
    assert fleet.leases() == {}


@virtual
async def test_a_worker_that_never_accepts_costs_no_more_than_the_wait() -> None:
    fleet = Fleet(workers=1)
    ending = await fleet.start(length=1, wait=15.0).done()
    assert isinstance(ending.error, NoWorkers)
    assert now() - 1_000 == pytest.approx(30, abs=1)


@virtual
async def test_a_long_prompt_is_given_time_to_travel() -> None:
    fleet = Fleet()
    client = fleet.start(length=1, prompt_length=5_000_000)
    await asyncio.sleep(2.4)
    assert len(fleet.attempts) == 1
    await asyncio.sleep(0.3)
    assert len(fleet.attempts) == 2
    client.request.cancel("test")
    await client.done()


@pytest.mark.parametrize(
    ("tokens", "by_header", "knob"),
    [
        (0, (), "DYN_FIRST_TOKEN_TIMEOUT"),
        (2, (), "DYN_INTER_TOKEN_TIMEOUT"),
        (0, ("first_token", "total"), "header x-holdfast-first-token-timeout-ms"),
        (2, ("first_token",), "DYN_INTER_TOKEN_TIMEOUT"),
        (2, ("inter_token",), "header x-holdfast-inter-token-timeout-ms"),
    ],
)
@virtual
async def test_no_token(tokens: int, by_header: tuple[str, ...], knob: str) -> None:
    fleet = Fleet()
    client = fleet.start(length=5, first_token=8.0, inter_token=3.0, by_header=frozenset(by_header))
    await settle()
    first = fleet.attempts[-1].accept()
    await asyncio.sleep(5.0)
    if tokens:
        first.emit(tokens)
    await asyncio.sleep(3.0 - SLACK)
    assert len(fleet.attempts) == 1
    await asyncio.sleep(2 * SLACK)
    second = fleet.attempts[-1]
    assert second is not first
    assert first.over
    assert [e.details["knob"] for e in first.worker.failures] == [knob]
    assert knob in first.worker.failures[0].message
    second.accept().emit(5 - tokens).end("length")
    ending = await client.done()
    assert ending.moves[0].cause == "worker_stalled"
    assert client.sink.tokens == truth(client.plans[0].prompt_ids, 5)


@virtual
async def test_tokens_at_the_edge_of_the_bound_are_in_time() -> None:
    fleet = Fleet()
    client = fleet.start(length=20, first_token=2.0, inter_token=1.0)
    await settle()
    stream = fleet.attempts[-1].accept()
    await asyncio.sleep(1.9)
    for _ in range(20):
        stream.emit()
        await asyncio.sleep(0.93)
    assert len(fleet.attempts) == 1
    stream.end("length")
    await client.done()


@virtual
async def test_a_new_attempt_has_a_new_clock() -> None:
    fleet = Fleet()
    client = fleet.start(length=5, first_token=3.0, inter_token=1.0)
    await settle()
    fleet.attempts[-1].accept().emit(2)
    await asyncio.sleep(0.9)
    fleet.attempts[-1].breaks()
    await settle()
    fleet.attempts[-1].accept()
    await asyncio.sleep(2.8)
    assert len(fleet.attempts) == 2
    fleet.attempts[-1].emit(3).end("length")
    await client.done()


@virtual
async def test_what_came_before_the_stream_counts_for_the_whole_request() -> None:
    """It may have waited for its model's files (simulated seed 15895)."""
    fleet = Fleet()
    client = fleet.start(length=500, total=2.0, prepared_seconds=1.5)
    await settle()
    assert fleet.attempts[-1].headers.remaining_ms == 500
    fleet.attempts[-1].accept().emit(2)
    ending = await client.done()
    assert now() == pytest.approx(1_000.5, abs=SLACK)
    assert isinstance(ending.error, DeadlineExceeded)
    assert "took 2." in ending.error.message


@virtual
async def test_total() -> None:
    fleet = Fleet()
    client = fleet.start(length=500, total=2.0, n=2)
    await settle()
    for stream in fleet.attempts:
        assert stream.headers.remaining_ms == 2_000
        stream.accept()
    while client.task is not None and not client.task.done():
        for stream in fleet.attempts:
            if not stream.over:
                stream.emit()
        await asyncio.sleep(0.02)
    assert now() == pytest.approx(1_002, abs=SLACK)
    assert all(s.over for s in fleet.attempts)
    for sink in client.sinks:
        assert sink.endings[0].state == "expired"
        assert isinstance(sink.endings[0].error, DeadlineExceeded)
    await client.done()
    assert fleet.leases() == {}


@virtual
async def test_the_time_left_travels_with_each_attempt() -> None:
    fleet = Fleet()
    client = fleet.start(length=5, total=10.0)
    await settle()
    fleet.attempts[-1].accept().emit(1)
    await asyncio.sleep(4)
    fleet.attempts[-1].breaks()
    await settle()
    assert fleet.attempts[-1].headers.remaining_ms == pytest.approx(6_000, abs=5)
    client.request.cancel("test")
    await client.done()


@virtual
async def test_zero_switches_a_deadline_off() -> None:
    fleet = Fleet()
    client = fleet.start(
        length=2, accept_hedge=0.0, accept=0.0, first_token=0.0, inter_token=0.0, total=0.0, client_stall=0.0
    )
    await asyncio.sleep(5_000)
    fleet.attempts[-1].accept()
    assert fleet.attempts[-1].headers.remaining_ms == 0
    await asyncio.sleep(5_000)
    fleet.attempts[-1].emit()
    await asyncio.sleep(5_000)
    client.sink.blocked_since = now()
    await asyncio.sleep(5_000)
    client.sink.blocked_since = None
    fleet.attempts[-1].emit().end("length")
    assert (await client.done()).attempts == 1


@pytest.mark.parametrize("stage", ["accept", "first token", "next token", "client"])
@virtual
async def test_our_own_standstill_is_charged_to_nobody(stage: str) -> None:
    fleet = Fleet()
    client = fleet.start(length=9, first_token=5.0, inter_token=5.0, client_stall=5.0)
    await settle()
    stream = fleet.attempts[-1]
    if stage != "accept":
        stream.accept()
    if stage == "next token":
        stream.emit(1)
    if stage == "client":
        client.sink.blocked_since = now()
    await asyncio.sleep(0.4)
    jump(30.0)
    await asyncio.sleep(0.4)
    assert len(fleet.attempts) == 1
    assert not client.sink.endings
    if stage == "client":
        await asyncio.sleep(4.8)
        assert client.sink.endings
    else:
        await asyncio.sleep(0.3 if stage == "accept" else 4.9)
        assert len(fleet.attempts) == 2, "afterwards it is judged again"
        client.request.cancel("test")
    await client.done()


@virtual
async def test_a_blocked_client_stops_the_workers_clock_and_starts_its_own() -> None:
    fleet = Fleet()
    client = fleet.start(length=9, inter_token=2.0, client_stall=20.0)
    await settle()
    stream = fleet.attempts[-1].accept().emit(2)
    client.sink.blocked_since = now()
    stream.emit(3)
    await asyncio.sleep(15)
    assert len(fleet.attempts) == 1, "the worker has no credit and is not to blame"
    client.sink.blocked_since = None
    client.stream.deliver()
    assert client.sink.tokens == truth(client.plans[0].prompt_ids, 5)
    await asyncio.sleep(1.8)
    assert len(fleet.attempts) == 1, "its clock starts anew"
    client.sink.blocked_since = now()
    await asyncio.sleep(20 + SLACK)
    ending = await client.done()
    assert isinstance(ending.error, ClientStalled)
    assert (ending.state, ending.error.code) == ("cancelled", "client_stalled")
    assert stream.killed == "cancelled"
    assert stream.worker.failures == []
    assert fleet.leases() == {}


@virtual
async def test_a_blocked_client_survives_its_workers_death() -> None:
    """Tokens that wait for the client are part of what the next worker continues."""
    fleet = Fleet(workers=3)
    client = fleet.start(length=9)
    await settle()
    fleet.attempts[-1].accept().emit(2)
    client.sink.blocked_since = now()
    fleet.attempts[-1].emit(2)
    fleet.workers[0].die()
    await settle()
    second = fleet.attempts[-1]
    assert second.ids == truth(client.plans[0].prompt_ids, 4)
    client.sink.blocked_since = None
    client.stream.deliver()
    assert len(client.sink.tokens) == 4, "delivered while the next attempt is not even accepted"
    client.sink.blocked_since = now()
    second.accept().emit(5).end("length", cached=2)
    await asyncio.sleep(1)
    assert not client.sink.endings
    client.sink.blocked_since = None
    client.stream.deliver()
    ending = await client.done()
    assert (ending.state, ending.cached_tokens, ending.join) == ("done", 2, "exact")


@virtual
async def test_a_stop_string_found_between_attempts_ends_the_stream() -> None:
    fleet = Fleet()
    client = fleet.start(length=9)
    client.sink.stop_at = 3
    await settle()
    fleet.attempts[-1].accept().emit(2)
    client.sink.blocked_since = now()
    fleet.attempts[-1].emit(2).breaks()
    await settle()
    client.sink.blocked_since = None
    client.stream.deliver()
    ending = await client.done()
    assert (ending.state, ending.finish, ending.completion_tokens) == ("done", "stop", 3)
    assert fleet.attempts[-1].killed == "done"
    assert fleet.leases() == {}


@virtual
async def test_credit_follows_what_the_client_takes() -> None:
    fleet = Fleet()
    client = fleet.start(length=20_000, context_length=100_000)
    await settle()
    stream = fleet.attempts[-1].accept()
    stream.emit(1_000)
    assert stream.credits == []
    stream.emit(25)
    assert stream.credits == [2048]
    client.sink.blocked_since = now()
    while len(stream.ids) < stream.allowed:
        stream.emit(min(500, stream.allowed - len(stream.ids)))
    assert stream.credits == [2048], "a client that takes nothing earns nothing"
    assert len(client.stream.pending) == 4096 - 1025
    client.sink.blocked_since = None
    client.stream.deliver()
    assert stream.credits == [2048, 2048]
    stream.breaks()
    await settle()
    moved = fleet.attempts[-1].accept()
    assert moved.begin == 4096
    moved.emit(1_000)
    assert moved.credits == []
    moved.emit(30)
    assert moved.credits == [2048], "credit of a new attempt counts from where it begins"
    client.request.cancel("test")
    await client.done()


@virtual
async def test_heavy_tokens_get_less_credit_and_never_run_dry() -> None:
    fleet = Fleet()
    client = fleet.start(length=3_000, sampling=Sampling(logprobs=20))
    await settle()
    stream = fleet.attempts[-1].accept()
    assert stream.allowed == 2048 // 21
    while len(stream.ids) < 3_000:
        assert stream.allowed > len(stream.ids)
        stream.emit(min(7, stream.allowed - len(stream.ids), 3_000 - len(stream.ids)))
    stream.end("length")
    await client.done()
    assert set(stream.credits) == {2048 // 21}


@virtual
async def test_a_worker_that_sends_everything_but_the_end() -> None:
    fleet = Fleet()
    client = fleet.start(length=3)
    await settle()
    fleet.attempts[-1].accept().emit(3)
    ending = await client.done()
    assert now() - 1_000 < 4 * SWEEP
    assert (ending.state, ending.finish, ending.attempts) == ("done", "length", 1)
    assert fleet.leases() == {}


@virtual
async def test_one_faulty_stream_does_not_stop_the_keeper() -> None:
    fleet = Fleet()
    bad, good = fleet.start(length=1, total=1.0), fleet.start(length=1, total=1.0)
    await settle()
    del bad.sink.blocked_since
    await good.done()
    assert good.ending.state == "expired"
    bad.sink.blocked_since = None
    await bad.done()


def test_a_request_names_the_bounds_that_it_has_set_itself() -> None:
    services = Fleet().services
    assert services.bounds().by_header == frozenset()
    patient = services.bounds(accept=9.0, total=5.0)
    assert patient.by_header == {"accept", "total"}
    assert patient.knob("total") == "header x-holdfast-timeout-ms"
    assert patient.knob("accept_hedge") == "DYN_ACCEPT_HEDGE_TIMEOUT", "the setting is below what the request allows"
    assert services.bounds(accept=0.1).knob("accept_hedge") == "header x-holdfast-accept-timeout-ms"
