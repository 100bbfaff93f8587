"""P3: usage and budgets are right after migration.

Asserted for every answer that ended with finish reasons for all choices: where usage was given, ``prompt_tokens`` is
the number of prompt tokens (each prompt once), ``completion_tokens`` the number of true tokens of all choices up to
the one that ended each, ``total_tokens`` their sum; where the client asked for usage, it was given. For every choice
of every answer, complete or not: no engine sequence was asked to go beyond the client's bound, and none made more
tokens than the bound leaves after those that it was given.

No tolerance.
"""

from __future__ import annotations

from collections.abc import Iterator

from holdfast.sim.history import Call, Violation
from holdfast.sim.oracles.facts import Facts


def check(facts: Facts) -> Iterator[Violation]:
    """Return the breaches; needs the truths of `p01`."""
    for call in facts.history.calls:
        answer = facts.answer(call)
        choices = facts.choices(call)
        complete = call.ending == "complete" and not answer.errors and len(answer.choices) == choices
        if complete and call.status == 200:
            yield from _usage(facts, call, answer.usage)
    for sequence in facts.sequences:
        request = sequence.request
        room = request.stop.max_tokens - len(request.generated_ids) // 4
        if sequence.tokens > room:
            where = {"call": sequence.label, "worker": sequence.worker, "made": sequence.tokens, "room": room}
            yield Violation("P3", "an engine made more tokens than were left", where)


def _usage(facts: Facts, call: Call, usage: dict[str, int] | None) -> Iterator[Violation]:
    truths = [facts.truths.get((call.name, choice)) for choice in range(facts.choices(call))]
    options = call.body.get("stream_options") or {}
    wanted = not call.body.get("stream") or options.get("include_usage")
    if usage is None:
        if wanted:
            yield Violation("P3", "usage was asked for and did not come", {"call": call.name})
        return
    known = [truth for truth in truths if truth is not None]
    if len(known) != len(truths):
        yield Violation("P3", "an answer is complete and no engine has seen it", {"call": call.name})
        return
    prompt = len(known[0].request.prompt_ids) // 4
    made = sum(truth.used for truth in known)
    got = (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"])
    if got != (prompt, made, prompt + made):
        yield Violation("P3", "usage is wrong", {"call": call.name, "got": got, "true": (prompt, made, prompt + made)})
