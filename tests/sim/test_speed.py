"""How fast universes are: processor time, not wall time, so that other work on the machine counts little.

The bounds are far below what an undisturbed machine does (docs/explanation/simulation.md): they notice a simulation
that has become several times slower.
"""

from __future__ import annotations

import time

from bench.sim import steady

from holdfast.sim.universe import Outcome, run_universe


def told(name: str, outcomes: list[Outcome], seconds: float) -> tuple[float, float]:
    """Print and return callbacks and virtual seconds per second of processor time."""
    callbacks = sum(o.callbacks for o in outcomes) / seconds
    virtual = sum(o.seconds for o in outcomes) / seconds
    print(f"{name}: {callbacks:,.0f} callbacks, {virtual:.1f} virtual seconds per second of processor time")
    return callbacks, virtual


def test_ten_workers_with_fifty_streams() -> None:
    run_universe(1, plan=steady(2, 2, 4))  # reads the model's files
    began = time.process_time()
    outcome = run_universe(1, plan=steady(10, 50, 400))
    callbacks, virtual = told("10 workers, 50 streams", [outcome], time.process_time() - began)
    assert outcome.violations == []
    assert sum(sequence.tokens for sequence in outcome.history.sequences) >= 50 * 400
    assert callbacks > 15_000
    assert virtual > 3


def test_universes_of_the_default_size() -> None:
    run_universe(0)
    began = time.process_time()
    outcomes = [run_universe(seed) for seed in range(2_000, 2_012)]
    callbacks, virtual = told("12 universes", outcomes, time.process_time() - began)
    assert callbacks > 8_000
    assert virtual > 15
