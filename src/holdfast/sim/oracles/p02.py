"""P2: exactly one terminal event.

Asserted for every answer that came to its end (the response was complete):

* a stream has one finish reason per choice and no error, or one error and no choice that ended after it; then exactly
  one ``[DONE]`` and nothing behind it; no content of a choice after its finish reason;
* a whole answer is an error or has a finish reason for every choice;
* everything can be read as JSON of the API's form.

And for every call: its answer was complete, or its client left, or the connection broke for a reason: the frontend
died, or was told to leave and is out of grace (or was told to hurry), or the client took nothing for longer than its
bound. A request that nobody answers at all has ``ending == ""`` when the universe is over.

During the run the frontends' own streams are watched: a second terminal event, or bytes after the end of a response,
is a breach at once. No tolerance.
"""

from __future__ import annotations

from collections.abc import Iterator

from holdfast.sim.history import Call, Violation
from holdfast.sim.oracles.answers import Answer
from holdfast.sim.oracles.facts import Facts


def check(facts: Facts) -> Iterator[Violation]:
    """Return the breaches."""
    for call in facts.history.calls:
        answer = facts.answer(call)
        where = {"call": call.name, "frontend": call.frontend, "status": call.status}
        if answer.malformed:
            yield Violation("P2", "an answer cannot be read", {**where, "first": answer.malformed[0]})
        if call.ending == "":
            yield Violation("P2", "a request was never answered", {**where, "sent": round(call.sent, 3)})
        elif call.ending == "broken" and not _excused(facts, call):
            yield Violation("P2", "a connection broke without a reason", {**where, "at": round(call.ended, 3)})
        elif call.ending == "complete":
            for what in _wrong(facts, call, answer):
                yield Violation("P2", what, where)
        if any(choice.finishes > 1 or choice.after_finish for choice in answer.choices.values()):
            yield Violation("P2", "a choice went on after its end", where)
        if answer.done > 1 or answer.after_done:
            yield Violation("P2", "a stream went on after its end", where)


def _wrong(facts: Facts, call: Call, answer: Answer) -> Iterator[str]:
    finished = sum(1 for choice in answer.choices.values() if choice.finishes)
    if len(answer.errors) > 1:
        yield "an answer has several errors"
    if call.status != 200:
        if len(answer.errors) != 1:
            yield "an answer with an error status has no error"
        return
    if answer.errors and finished == facts.choices(call):
        yield "an answer has an error after all of its ends"
    if not answer.errors and finished != facts.choices(call):
        yield f"an answer is over with {finished} of {facts.choices(call)} ends"
    if call.body.get("stream") and not answer.done:
        yield "a stream is over without [DONE]"


def _excused(facts: Facts, call: Call) -> bool:
    """Whether there was nobody left to answer, or nobody to take it."""
    for life in facts.history.lives:
        grace = 0.0 if facts.hurried(life) else facts.plan.grace
        over = min(life.ended or call.ended + 1, life.draining + grace if life.draining else call.ended + 1)
        if life.name == call.frontend and life.started <= call.ended and over <= call.ended:
            return True
    ending = facts.endings.get((call.name, 0))
    stalled = ending is not None and ending.code == "client_stalled"
    return call.slow and (stalled or call.ended - call.sent >= facts.plan.client_stall)
