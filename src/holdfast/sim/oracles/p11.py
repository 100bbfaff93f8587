"""P11: after a cancel the engine stops within a bound.

Asserted for every sequence that an engine took. Nobody wants it any more from the first of these on: its stream has
ended at the frontend, for whatever reason; its attempt was given up, and the stream goes on elsewhere; its client left;
its frontend was killed. Then the engine lets go of it within `PROMPT`: the latency of the network and one step. Where
the worker, its frontend or the way between them was silenced in that time (frozen, parted, slow), within `SILENCE`
after that: a worker gives up a caller from whom it has heard nothing for 5 s. A connection that breaks takes its
streams with it at once, and so does the death of either process. While nothing but a partition or the frontend's loss
of power silences it, the time counts from its beginning, not from its end.

At the end of the universe no engine has anything in hand (its own canaries aside).
"""

from __future__ import annotations

from collections.abc import Iterator

from holdfast.sim.history import Sequence, Violation
from holdfast.sim.oracles.facts import SILENCING, Facts, attempt_of

PROMPT = 0.3
"""Seconds: a few milliseconds of network, a step of 25 ms, and the slowest link's jitter many times over."""
SILENCE = 7.0
"""Seconds: 5 s of silence, looked at every half a second, and what the network retransmits after a partition."""
PARTED = 6.2
"""Seconds: the same without retransmissions."""

Attempt = tuple[str, int, int, str]


def check(facts: Facts) -> Iterator[Violation]:
    """Return the breaches."""
    given_up = {key: (at, "its attempt was given up") for key, at in facts.given_up().items()}
    for sequence in facts.sequences:
        unwanted = _unwanted(facts, sequence, given_up)
        if unwanted is None:
            continue
        name, at, why = unwanted
        life = facts.life(sequence.worker, sequence.incarnation)
        ended = sequence.ended or (life.ended if life is not None and life.ended else facts.history.finished)
        if ended - at <= PROMPT * facts.stretch:
            continue
        if ended > _allowed(facts, name, sequence.worker, at, ended):
            where = {
                "call": sequence.label,
                "worker": sequence.worker,
                "why": why,
                "at": round(at, 4),
                "engine stopped": round(ended, 4) if sequence.ended else "never",
            }
            yield Violation("P11", "an engine went on with what nobody wanted any more", where)
    for residue in facts.history.residues:
        if residue.engine:
            where = {"process": residue.name, "sequences": residue.engine}
            yield Violation("P11", "an engine had sequences in hand when everything was over", where)


def _allowed(facts: Facts, frontend: str, worker: str, at: float, ended: float) -> float:
    """Return until when an engine may go on with what nobody has wanted since ``at``."""
    names = {frontend, worker}
    troubles = [
        fault
        for fault in facts.history.fired
        if fault.kind in SILENCING
        and {fault.target, fault.peer} & names
        and fault.at <= ended
        and fault.until >= at - 10
    ]
    if not any(fault.until >= at - 1.0 for fault in troubles):
        return at + PROMPT * facts.stretch
    if all(f.kind == "partition" or (f.kind == "power-loss" and f.target == frontend) for f in troubles):
        return max(at, *(fault.at for fault in troubles)) + PARTED * facts.stretch
    return max(at, *(fault.until for fault in troubles)) + SILENCE * facts.stretch


def _unwanted(
    facts: Facts, sequence: Sequence, given_up: dict[Attempt, tuple[float, str]]
) -> tuple[str, float, str] | None:
    """Return whose sequence it was, since when nobody wanted it, and why; None: somebody did, or nobody knows."""
    call = facts.calls.get(sequence.label)
    if call is None or not sequence.accepted:
        return None
    choice = sequence.request.choice
    reasons = []
    ending = facts.endings.get((sequence.label, choice))
    if ending is not None:
        reasons.append((ending.at, "its stream had ended"))
    failed = given_up.get(attempt_of(sequence))
    earlier = sequence.request.leg == "prefill" and failed is not None and failed[0] < sequence.received
    if failed is not None and not earlier:  # a prompt may go to a later start of the same worker again
        reasons.append(failed)
    if call.ending == "left":
        reasons.append((call.ended, "its client had left"))
    reasons += [
        (life.ended, "its frontend had died")
        for life in facts.history.lives
        if life.name == call.frontend and life.how == "crashed" and life.started <= sequence.received <= life.ended
    ]
    if not reasons:
        return None
    at, why = min(reasons)
    return call.frontend, max(at, sequence.received), why
