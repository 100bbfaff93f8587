"""The promises P1 to P13 as questions to a history: one module each, which says what it asserts and how exactly.

Must never look at anything but the history and the plan.
"""

from __future__ import annotations

from holdfast.sim.history import History, Violation
from holdfast.sim.plan import Plan


def check_all(history: History, plan: Plan) -> list[Violation]:
    """Return every broken promise."""
    del history, plan
    return []
