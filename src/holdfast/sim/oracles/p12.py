"""P12: losing discovery alone fails no request.

Asserted for universes in which nothing but discovery was disturbed: every valid request whose client stayed and set no
deadline of its own has a complete answer without an error. (An engine that was told to fail by the prompt itself
is no exception: the stream moves.)
"""

from __future__ import annotations

from collections.abc import Iterator

from holdfast.sim.history import Violation
from holdfast.sim.oracles.facts import Facts


def check(facts: Facts) -> Iterator[Violation]:
    """Return the breaches."""
    history = facts.history
    if not history.fired or any(not fault.kind.startswith("discovery-") for fault in history.fired):
        return
    for call in history.calls:
        if not call.valid or call.ending == "left" or call.slow or any("timeout" in name for name in call.headers):
            continue
        answer = facts.answer(call)
        if call.ending != "complete" or call.status != 200 or answer.errors:
            code = answer.errors[0].get("code") if answer.errors else ""
            where = {"call": call.name, "ending": call.ending, "status": call.status, "error": code}
            yield Violation("P12", "a request failed although only discovery was away", where)
