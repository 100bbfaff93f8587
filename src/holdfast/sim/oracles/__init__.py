"""The promises P1 to P13 as questions to a history: one module each, which says what it asserts and how exactly.

P10 (a caller's mistake never counts against a worker) is checked while it happens (`sim.watching`). Must never look
at anything but the history and the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from holdfast.sim.history import History, Violation
from holdfast.sim.oracles import (
    cause,
    kept,
    noticed,
    p01,
    p01_handoffs,
    p02,
    p03,
    p04,
    p05,
    p06,
    p07,
    p08,
    p09,
    p11,
    p12,
    p13,
    p13_caches,
)
from holdfast.sim.oracles.facts import Facts, facts_of
from holdfast.sim.plan import Plan

Oracle = Callable[[Facts], Iterator[Violation]]
ORACLES: dict[str, Oracle] = {
    "P1": p01.check,
    "P1 hand-offs": p01_handoffs.check,
    "P2": p02.check,
    "P3": p03.check,
    "P4": p04.check,
    "P5": p05.check,
    "P6": p06.check,
    "P7": p07.check,
    "P8": p08.check,
    "P9": p09.check,
    "P11": p11.check,
    "P12": p12.check,
    "P13": p13.check,
    "P13 caches": p13_caches.check,
    "kept": kept.check,
    "cause": cause.check,
    "noticed": noticed.check,
}
"""In this order: P3 needs what P1 works out."""


def check_all(history: History, plan: Plan, stretch: float = 1.0) -> list[Violation]:
    """Return every broken promise.

    Args:
        history: what happened.
        plan: what was asked for.
        stretch: bounds on time are multiplied by it; 1 in a simulation, more on a machine shared with others.
    """
    facts = facts_of(history, plan, stretch)
    return [violation for oracle in ORACLES.values() for violation in oracle(facts)]
