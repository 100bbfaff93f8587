"""The small parts alone: states, leases, budget, pacer, seeds, flusher."""

from __future__ import annotations

import asyncio
import random
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.requests import seeds
from holdfast.requests.budget import Pacer, RetryBudget
from holdfast.requests.flusher import Flusher
from holdfast.requests.leases import KINDS, LeaseBook
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
