"""The shutdown machine: its table, its one deadline, what signals mean, and the exit code."""

from __future__ import annotations

import itertools

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.base.settings import load
from holdfast.runtime.shutdown import EXIT_CODES, NEXT, Shutdown, ShutdownBudget, Stage, diagram

ORDER: tuple[Stage, ...] = ("unregistered", "draining", "migrating", "cleanup")


def budget(total: float = 30.0, **parts: float | None) -> ShutdownBudget:
    return ShutdownBudget(shutdown_total_timeout=total, **{f"shutdown_{name}": value for name, value in parts.items()})


def walk(machine: Shutdown, now: float) -> list[tuple[Stage, float]]:
    """Every stage lasts as long as it may; returns when each one ends."""
    ends = []
    for stage in ORDER:
        machine.enter(stage, now)
        now = max(now, machine.until())
        ends.append((stage, now))
    machine.enter("exited", now)
    return ends


def test_the_defaults_share_thirty_seconds():
    machine = Shutdown(ShutdownBudget())
    assert walk(machine, 100.0) == [
        ("unregistered", 105.0),
        ("draining", 123.0),
        ("migrating", 125.0),
        ("cleanup", 130.0),
    ]
    assert machine.took == {"unregistered": 5.0, "draining": 18.0, "migrating": 2.0, "cleanup": 5.0}


def test_quick_stages_leave_their_time_to_the_streams():
    machine = Shutdown(ShutdownBudget())
    machine.enter("unregistered", 0.0)
    machine.enter("draining", 0.01)
    assert machine.until() == 23.0
    machine.enter("migrating", 4.0)
    assert machine.until() == 6.0
    assert machine.remaining(4.0) == 26.0


def test_streams_may_get_less_than_the_total_allows():
    machine = Shutdown(budget(inflight_timeout=3.0))
    machine.enter("unregistered", 0.0)
    machine.enter("draining", 1.0)
    assert machine.until() == 4.0


def test_a_small_total_still_leaves_half_of_it_to_the_streams():
    assert walk(Shutdown(budget(0.4, router_grace=0.0)), 0.0) == [
        ("unregistered", 0.0),
        ("draining", pytest.approx(0.2)),
        ("migrating", pytest.approx(0.3)),
        ("cleanup", pytest.approx(0.4)),
    ]


def test_no_time_at_all():
    assert [end for _, end in walk(Shutdown(budget(0.0)), 7.0)] == [7.0] * 4


@given(
    total=st.floats(0, 1e6),
    router=st.floats(0, 1e6),
    inflight=st.none() | st.floats(0, 1e6),
    handover=st.floats(0, 1e6),
    cleanup=st.floats(0, 1e6),
    start=st.floats(0, 1e6),
    hurry_at=st.none() | st.integers(0, 3),
)
def test_nothing_outlives_the_deadline(total, router, inflight, handover, cleanup, start, hurry_at):
    machine = Shutdown(
        budget(
            total,
            router_grace=router,
            inflight_timeout=inflight,
            handover_timeout=handover,
            cleanup_timeout=cleanup,
        )
    )
    now = start
    for number, stage in enumerate(ORDER):
        machine.enter(stage, now)
        if number == hurry_at:
            machine.hurry(now)
        until = machine.until()
        assert until <= start + total + 1e-6 * (1 + start + total)
        if hurry_at is not None and number <= 1 and number >= hurry_at:
            assert until <= now, "a hurried worker waits for no stream"
        now = max(now, until)


def test_signals_begin_hurry_and_end_it():
    machine = Shutdown(ShutdownBudget())
    assert not machine.asked
    assert [machine.signal() for _ in range(5)] == ["begin", "hurry", "now", "ignore", "ignore"]
    assert machine.asked
    assert machine.abrupt


def test_a_hurried_worker_hands_over_at_once_and_keeps_time_for_it():
    machine = Shutdown(ShutdownBudget())
    machine.enter("unregistered", 0.0)
    machine.enter("draining", 0.1)
    machine.hurry(2.0)
    assert machine.until() <= 2.0
    machine.enter("migrating", 2.0)
    assert machine.until() == 4.0
    machine.enter("cleanup", 2.1)
    assert machine.until() == 7.1


@pytest.mark.parametrize(("before", "after"), [p for p in itertools.product(NEXT, NEXT) if p[1] not in NEXT[p[0]]])
def test_steps_that_the_table_does_not_have(before, after):
    machine = Shutdown(ShutdownBudget())
    machine.stage = before
    with pytest.raises(AssertionError, match="table"):
        machine.enter(after, 0.0)


def test_the_exit_code_tells_the_worst_that_happened():
    machine = Shutdown(ShutdownBudget())
    assert machine.exit_code == 0
    machine.ended("handed over")
    machine.ended("finished")
    assert machine.exit_code == 4
    machine.ended("cut")
    machine.ended("handed over")
    assert machine.exit_code == 3
    machine.ended("engine died")
    assert machine.exit_code == 1
    assert len(set(EXIT_CODES.values())) == len(EXIT_CODES)


@pytest.mark.parametrize(
    ("env", "field", "value"),
    [
        ({"DYN_WORKER_GRACEFUL_SHUTDOWN_TIMEOUT": "12"}, "shutdown_total_timeout", 12.0),
        ({"DYN_WORKER_SHUTDOWN_TOTAL_TIMEOUT_SECS": "8", "DYN_WORKER_GRACEFUL_SHUTDOWN_TIMEOUT": "12"},
         "shutdown_total_timeout", 8.0),
        ({"DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS": "1.5"}, "shutdown_router_grace", 1.5),
        ({"DYN_WORKER_SHUTDOWN_INFLIGHT_TIMEOUT_SECS": "0"}, "shutdown_inflight_timeout", 0.0),
        ({}, "shutdown_inflight_timeout", None),
        ({"DYN_WORKER_SHUTDOWN_CLEANUP_TIMEOUT_SECS": "7"}, "shutdown_cleanup_timeout", 7.0),
    ],
)  # fmt: skip
def test_names_of_the_settings_old_ones_included(env, field, value):
    assert msgspec.structs.asdict(load(ShutdownBudget, {}, env).config)[field] == value


def test_the_diagram_has_every_step():
    text = diagram()
    assert all(f"{a} --> {b}" in text for a, following in NEXT.items() for b in following)
