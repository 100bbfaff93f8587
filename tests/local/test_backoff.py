"""Restart delays and the point at which restarting is given up."""

from __future__ import annotations

from holdfast.local.backoff import RestartBudget, RestartPolicy


def test_the_first_restart_comes_at_once_and_later_ones_wait_longer() -> None:
    budget = RestartBudget(RestartPolicy(intensity=10, longest_delay=1.0))
    assert [budget.crashed(now=float(i), uptime=1.0) for i in range(5)] == [0.0, 0.25, 0.5, 1.0, 1.0]


def test_too_many_crashes_within_the_window_end_it() -> None:
    budget = RestartBudget(RestartPolicy(intensity=3, window=30))
    delays = [budget.crashed(now=i * 2.0, uptime=1.0) for i in range(4)]
    assert delays[:3] == [0.0, 0.25, 0.5]
    assert delays[3] is None


def test_crashes_older_than_the_window_do_not_count() -> None:
    budget = RestartBudget(RestartPolicy(intensity=2, window=10))
    assert all(budget.crashed(now=i * 6.0, uptime=1.0) is not None for i in range(20))


def test_a_child_that_was_stable_starts_with_a_clean_sheet() -> None:
    budget = RestartBudget(RestartPolicy(stable=30, window=10))
    assert budget.crashed(0.0, uptime=1.0) == 0.0
    assert budget.crashed(1.0, uptime=1.0) == 0.25
    assert budget.crashed(50.0, uptime=40.0) == 0.0
