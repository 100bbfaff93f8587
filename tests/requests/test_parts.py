"""The small parts alone: states, leases, budget, pacer, seeds, flusher, the inquest."""

from __future__ import annotations

import asyncio
import random
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.base.errors import Disconnected, EngineFailed, InvalidRequest, PeerSilent, StreamIncomplete, WorkerStalled
from holdfast.requests import seeds
from holdfast.requests.budget import Pacer, RetryBudget
from holdfast.requests.flusher import Flusher
from holdfast.requests.leases import KINDS, LeaseBook
from holdfast.requests.poison import TRUSTED, YOUNG, Inquest, Record, is_death
from holdfast.requests.states import NEXT, TERMINAL, State, check, diagram
from tests.support.virtual_time import virtual

STATES = get_args(State)


def test_the_table_of_states_is_whole() -> None:
    assert set(NEXT) == set(STATES)
    assert all(following <= set(STATES) for following in NEXT.values())
    assert {state for state, following in NEXT.items() if not following} == TERMINAL
    reached, todo = {"received"}, ["received"]
    while todo:
        for state in NEXT[todo.pop()] - reached:  # type: ignore[index]
            reached.add(state)
            todo.append(state)
    assert reached == set(STATES)
    for state in set(STATES) - TERMINAL:
        assert {"cancelled", "expired", "failed"} <= NEXT[state], "cancel and deadlines come at any time"


def test_rejected_is_never_after_accept() -> None:
    for state in ("accepted", "streaming"):
        with pytest.raises(AssertionError, match="went from"):
            check(state, "rejected")  # type: ignore[arg-type]


def test_the_diagram_has_every_step() -> None:
    lines = diagram().splitlines()
    assert lines[0] == "stateDiagram-v2"
    assert len(lines) == 2 + sum(map(len, NEXT.values())) + len(TERMINAL)


@given(st.lists(st.tuples(st.sampled_from(KINDS), st.sampled_from(["", "a", "b"]), st.integers(1, 3)), max_size=40))
def test_leases_sum_up_and_come_back_once(taken: list[tuple[str, str, int]]) -> None:
    book = LeaseBook()
    leases = [(book.take(kind, owner), times) for kind, owner, times in taken]  # type: ignore[arg-type]
    for kind in KINDS:
        assert book.held(kind) == sum(k == kind for k, _, _ in taken)
        for owner in ("a", "b"):
            assert book.held(kind, owner) == sum((k, o) == (kind, owner) for k, o, _ in taken)
    for lease, times in leases:
        for _ in range(times):
            lease.release()
    assert set(book.sums().values()) == {0}
    assert not book._owners


def test_the_budget_earns_by_traffic_and_time_up_to_a_bound() -> None:
    budget = RetryBudget(ratio=0.5, floor_per_second=1.0, burst=2.0)
    assert budget.withdraw(100.0)
    assert budget.withdraw(100.0)
    assert not budget.withdraw(100.0)
    assert budget.wait_hint(100.0) == 1.0
    budget.deposit()
    assert not budget.withdraw(100.0)
    budget.deposit()
    assert budget.withdraw(100.0)
    assert budget.withdraw(101.0)
    assert [budget.withdraw(1_000.0) for _ in range(3)] == [True, True, False]


@virtual
async def test_the_pacer_keeps_its_rate() -> None:
    pacer = Pacer(rate=10.0, burst=5)
    loop = asyncio.get_running_loop()
    passed: list[tuple[float, int]] = []

    async def go(age: int) -> None:
        await pacer.pass_through(float(age))
        passed.append((loop.time() - 1_000.0, age))

    async with asyncio.TaskGroup() as group:
        for age in range(25):
            group.create_task(go(100 - age))
    assert [t for t, _ in passed[:5]] == [0.0] * 5
    assert passed[-1][0] == pytest.approx(2.0, abs=0.01)
    waited = [age for _, age in passed[5:]]
    assert waited == sorted(waited), "oldest first"


@virtual
async def test_a_cancelled_turn_in_the_pacer_costs_nobody_anything() -> None:
    pacer = Pacer(rate=10.0, burst=1)
    await pacer.pass_through(0.0)
    loop = asyncio.get_running_loop()
    first, second = (loop.create_task(pacer.pass_through(age)) for age in (1.0, 2.0))
    await asyncio.sleep(0)
    first.cancel()
    await second
    assert loop.time() - 1_000.0 == pytest.approx(0.1, abs=0.01)
    assert not pacer._queue


def test_seeds_differ_by_choice_and_stay_for_the_first() -> None:
    assert seeds.mix(42, 0) == 42
    assert len({seeds.mix(42, c) for c in range(128)}) == 128
    assert len({seeds.mix(s, 1) for s in range(1_000)}) == 1_000
    assert all(0 <= seeds.mix(s, c) < 1 << 64 for s in (0, -1, 1 << 80) for c in range(4))
    assert 0 <= seeds.draw(random.Random(1)) < 1 << 53


class Part:
    def __init__(self, fails: bool = False):
        self.fails = fails
        self.calls = 0

    def deliver(self) -> None:
        self.calls += 1
        if self.fails:
            raise ValueError("cannot")

    push = deliver


@virtual
async def test_a_flush_serves_everybody_once_and_contains_faults(caplog: pytest.LogCaptureFixture) -> None:
    flusher = Flusher()
    streams, writers = [Part(), Part(fails=True), Part()], [Part(fails=True), Part()]
    flusher.streams += streams
    flusher.writers += writers
    flusher.flush()
    flusher.flush()
    assert [p.calls for p in streams + writers] == [1] * 5
    assert len(caplog.records) == 2


W1, W2, W3 = ("w1", 1), ("w2", 1), ("w3", 1)


def test_one_suspect_with_two_deaths_is_convicted_and_clears_the_others() -> None:
    inquest, killer, other, fresh = Inquest(), Record(), Record(), Record()
    for record in (killer, other):
        inquest.died(W1, record, tokens=0, progressed=False, accepted=True)
    assert not inquest.settle(killer)
    assert killer.suspect
    assert other.suspect
    inquest.died(W2, killer, tokens=0, progressed=False, accepted=True)
    inquest.died(W2, fresh, tokens=0, progressed=False, accepted=True)
    assert inquest.settle(fresh), "whoever is judged first settles it for all"
    assert not inquest.settle(killer)
    assert (killer.convicted, other.convicted, fresh.convicted) == (True, False, False)
    assert not other.suspect
    assert not fresh.suspect
    assert (other.excused, fresh.excused) == (1, 1)


def test_two_who_may_have_done_it_are_tried_again() -> None:
    inquest, one, two = Inquest(), Record(), Record()
    for worker in (W1, W2):
        for record in (one, two):
            inquest.died(worker, record, tokens=0, progressed=False, accepted=True)
        assert not inquest.settle(one)
    assert not one.convicted
    assert not two.convicted
    assert one.suspect
    two.proven()
    inquest.died(W3, one, tokens=0, progressed=False, accepted=True)
    assert inquest.settle(one)
    assert one.convicted


def test_progress_proves_innocence_of_what_was_before() -> None:
    inquest, record = Inquest(), Record()
    inquest.died(W1, record, tokens=0, progressed=False, accepted=True)
    record.proven()
    assert not record.suspect
    inquest.died(W2, record, tokens=0, progressed=False, accepted=True)
    assert not inquest.settle(record)
    assert record.suspect
    assert record.proof == TRUSTED


def test_dead_connections_alone_convict_nobody_soon() -> None:
    inquest, record = Inquest(), Record()
    inquest.died(W1, record, tokens=0, progressed=False, accepted=False)
    assert not record.suspect
    inquest.died(W2, record, tokens=0, progressed=False, accepted=False)
    assert not inquest.settle(record)
    assert record.suspect
    inquest.died(W3, record, tokens=0, progressed=False, accepted=False)
    assert inquest.settle(record)


def test_who_was_not_accepted_is_suspected_when_its_worker_was_at_work() -> None:
    inquest, sent, taken = Inquest(), Record(), Record()
    inquest.died(W1, sent, tokens=0, progressed=False, accepted=False)
    assert not sent.suspect
    inquest.died(W1, taken, tokens=5, progressed=True, accepted=True)
    assert sent.suspect
    assert not taken.suspect


def test_two_workers_killed_together_convict_nobody_who_was_between_them() -> None:
    inquest, record = Inquest(), Record()
    inquest.died(W1, record, tokens=0, progressed=False, accepted=True)
    inquest.died(W2, record, tokens=0, progressed=False, accepted=False)
    assert not inquest.settle(record)
    inquest.died(W3, record, tokens=0, progressed=False, accepted=True)
    assert inquest.settle(record)


def test_deaths_that_do_not_look_alike_convict_only_after_a_third() -> None:
    inquest, record = Inquest(), Record()
    inquest.died(W1, record, tokens=0, progressed=False, accepted=True)
    inquest.died(W2, record, tokens=1, progressed=False, accepted=True)
    assert not inquest.settle(record)
    inquest.died(W3, record, tokens=1, progressed=False, accepted=True)
    assert inquest.settle(record)


@pytest.mark.parametrize(("tokens", "proof"), [(0, TRUSTED), (1, YOUNG), (7, YOUNG), (8, TRUSTED), (500, TRUSTED)])
def test_how_many_tokens_prove_innocence(tokens: int, proof: int) -> None:
    inquest, record = Inquest(), Record()
    assert record.proof == 1
    inquest.died(W1, record, tokens=tokens, progressed=tokens > 0, accepted=True)
    assert record.proof == proof


def test_trials_wait_until_everybody_else_has_moved() -> None:
    inquest, calls = Inquest(), []
    inquest.on_still = lambda: calls.append(1)
    mover, suspect = Record(), Record()
    for _ in range(2):
        inquest.died(W1, mover, tokens=9, progressed=True, accepted=True)
    inquest.died(W1, suspect, tokens=0, progressed=False, accepted=True)
    inquest.still(suspect)
    inquest.still(suspect)
    assert inquest.moving
    assert not calls
    inquest.still(mover)
    assert not inquest.moving
    assert calls == [1]


def test_a_restarted_worker_dies_another_death() -> None:
    inquest, record = Inquest(), Record()
    inquest.died(("w", 1), record, tokens=0, progressed=False, accepted=True)
    inquest.died(("w", 2), record, tokens=0, progressed=False, accepted=True)
    assert record.blamed == 2


def test_deaths_are_forgotten_with_their_victims() -> None:
    inquest, record = Inquest(), Record()
    inquest.died(W1, record, tokens=9, progressed=True, accepted=True)
    assert len(inquest._deaths) == 1
    del record
    assert len(inquest._deaths) == 0


@pytest.mark.parametrize(
    ("error", "whole_stream", "death"),
    [
        (Disconnected(""), True, True),
        (PeerSilent(""), True, True),
        (WorkerStalled(""), True, True),
        (StreamIncomplete(""), True, False),
        (InvalidRequest(""), True, False),
        (EngineFailed(""), False, False),
        (EngineFailed("", engine_died=True), False, True),
        (WorkerStalled(""), False, False),
    ],
)
def test_what_counts_as_a_death(error: Exception, whole_stream: bool, death: bool) -> None:
    assert is_death(error, whole_stream=whole_stream) is death  # type: ignore[arg-type]
