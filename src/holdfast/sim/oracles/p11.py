"""P11: after a cancel the engine stops within a bound.

Asserted for every sequence that an engine took: when its stream has ended at the frontend, for whatever reason (the
client left, the deadline passed, it went on elsewhere and finished there), the engine lets go of it within `PROMPT`:
the latency of the network and one step. Where the worker, its frontend or the way between them was disturbed in that
time, within `SILENCE` after the disturbance: a worker gives up a caller from whom it has heard nothing for 5 s, and a
connection that breaks takes its streams with it at once. A worker that died has let go; so has an engine whose
frontend died, within `SILENCE`.

At the end of the universe no engine has anything in hand (its own canaries aside).
"""

from __future__ import annotations

from collections.abc import Iterator

from holdfast.sim.history import Sequence, Violation
from holdfast.sim.oracles.facts import Facts

PROMPT = 0.3
"""Seconds: a few milliseconds of network, a step of 25 ms, and the slowest link's jitter many times over."""
SILENCE = 7.0
"""Seconds: 5 s of silence, looked at every half a second, and what the network retransmits after a partition."""


def check(facts: Facts) -> Iterator[Violation]:
    """Return the breaches."""
    for sequence in facts.sequences:
        over = _over(facts, sequence)
        if over is None:
            continue
        name, at = over
        life = facts.life(sequence.worker, sequence.incarnation)
        ended = sequence.ended or (life.ended if life is not None and life.ended else facts.history.finished)
        if ended - at <= PROMPT:
            continue
        disturbed = facts.disturbed({name, sequence.worker}, at - 1.0, ended)
        if not disturbed or ended > max(disturbed, at) + SILENCE:
            where = {
                "call": sequence.label,
                "worker": sequence.worker,
                "stream ended": round(at, 4),
                "engine stopped": round(ended, 4) if sequence.ended else "never",
            }
            yield Violation("P11", "an engine went on after its stream had ended", where)
    for residue in facts.history.residues:
        if residue.engine:
            where = {"process": residue.name, "sequences": residue.engine}
            yield Violation("P11", "an engine had sequences in hand when everything was over", where)


def _over(facts: Facts, sequence: Sequence) -> tuple[str, float] | None:
    """Return whose stream it was and when that had ended; None: nobody knows."""
    ending = facts.endings.get((sequence.label, sequence.request.choice))
    return None if ending is None or not sequence.accepted else (ending.frontend, ending.at)
