"""P12: losing discovery alone fails no request, and moves none.

Asserted for universes in which nothing but discovery was disturbed: every valid request whose client stayed and set no
deadline of its own has a complete answer without an error. A prompt that makes engines fail is no exception, for its
stream moves; one that makes them refuse is: when the third worker is inhibited after another failure, "full" is true.
So is one that fails again wherever it goes.

And no connection is given up: no attempt fails for a fault of the transport, unless a prompt killed a worker.
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
        body = facts.body(call)
        if "[[mock:refuse" in body or body.count("[[mock:error-after") > 1:
            continue
        answer = facts.answer(call)
        if call.ending != "complete" or call.status != 200 or answer.errors:
            code = answer.errors[0].get("code") if answer.errors else ""
            where = {"call": call.name, "ending": call.ending, "status": call.status, "error": code}
            yield Violation("P12", "a request failed although only discovery was away", where)
    deadly = any("[[mock:crash" in facts.body(call) or "[[mock:freeze" in facts.body(call) for call in history.calls)
    for failure in history.failures if not deadly else ():
        if failure.fault == "transport":
            where = {"call": failure.label, "worker": facts.name_of(failure.worker), "code": failure.code}
            yield Violation("P12", "a stream lost its worker although only discovery was away", where)
