"""P1, second part: nothing is generated from somebody else's blocks, and no blocks are used twice.

Asserted for every decode leg that an engine took with a hand-off: the hand-off stands for exactly the tokens of its own
prompt and output so far, it came from a prefill worker, and no other decode leg started from it. Garbage and foreign
text would be P1's to notice; this one notices also what happens to look right.
"""

from __future__ import annotations

from collections.abc import Iterator

from holdfast.engines.handoff import digest_of
from holdfast.sim.history import Violation
from holdfast.sim.oracles.facts import Facts


def check(facts: Facts) -> Iterator[Violation]:
    """Return the breaches."""
    split = facts.plan.split
    used: dict[tuple[str, str], str] = {}
    for sequence in facts.sequences:
        request = sequence.request
        handoff = request.handoff
        if handoff is None or request.leg == "prefill" or not sequence.accepted:
            continue
        where = {"call": sequence.label, "worker": sequence.worker, "attempt": request.attempt}
        if handoff.digest != digest_of(request.prompt_ids, request.generated_ids):
            yield Violation("P1", "an engine started from the blocks of other tokens", where)
        source = facts.name_of(handoff.source)
        if split is None or split.role(source) != "prefill":
            yield Violation("P1", "a hand-off came from nobody who hands over", {**where, "source": source})
        key = (handoff.source, f"{sorted(handoff.params.items())} {handoff.digest}")
        name = f"{sequence.label}/{request.choice}/{request.attempt}"
        if handoff.phase == "rendezvous" and used.setdefault(key, name) != name:
            yield Violation("P1", "two decode legs had one room", {**where, "other": used[key]})
