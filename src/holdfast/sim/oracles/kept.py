"""Kept: a request fails only for a reason that its client, its frontend or the whole fleet gave.

Not one of the thirteen promises, but what they are for: no stream is let go while a worker could go on with it. Every
terminal event that is no success must be explained by one of these, read from the history alone:

* a mistake of the client, its leaving, its stalling, its own deadline (which must have passed); the frontend's bound of
  40 s on every request is for those who read slowly, for nobody else waits as long as that;
* another choice of the same request failed;
* lack of room in a universe that is made to lack it, a full waiting line, or refusals on command;
* the frontend was told to leave, and the grace for its requests is over (or it was told to hurry);
* the migration limit: at least that many attempts failed by somebody's fault;
* a prompt that kills: at least two workers died under the stream;
* no worker: none had been ready, staying and undisturbed for the last `CALM` seconds.

A fault of a worker, an engine or the network as the last word, or an internal error, is a breach.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from holdfast.sim.history import Call, Ended, Violation
from holdfast.sim.oracles.facts import Facts

CALM = 6.0
"""Seconds: a frontend needs about 5 to use a worker again after it has seen it fail."""
DEATHS = 2
"""Workers that may die under a stream before it is convicted."""
EARLY = 0.001
"""Seconds by which a deadline may seem to be missed: times are rounded to milliseconds on their way."""


def check(facts: Facts) -> Iterator[Violation]:
    """Return the breaches."""
    calls = {call.name: call for call in facts.history.calls}
    for ending in facts.history.endings:
        call = calls.get(ending.label)
        if call is None or ending.state == "done":
            continue
        explained = _EXPLAINED.get(ending.code)
        if explained is None or not explained(facts, call, ending):
            where = {
                "call": call.name,
                "choice": ending.choice,
                "code": ending.code,
                "knob": ending.knob,
                "state": ending.state,
                "at": round(ending.at, 3),
                "frontend": ending.frontend,
            }
            yield Violation("kept", "a request failed without a reason of its own", where)


def _cancelled(facts: Facts, call: Call, ending: Ended) -> bool:
    others = [e for e in facts.history.endings if e.label == call.name and e.choice != ending.choice]
    return call.ending == "left" or any(other.state != "done" for other in others) or _leaving(facts, call, ending)


def _stalled(_: Facts, call: Call, __: Ended) -> bool:
    return call.slow


def _overdue(facts: Facts, call: Call, ending: Ended) -> bool:
    own = call.headers.get("x-holdfast-timeout-ms", "")
    bound = int(own) / 1000 if own else facts.plan.request_timeout
    return bool(own or call.slow) and ending.at - call.sent >= bound - EARLY


def _mistaken(_: Facts, call: Call, __: Ended) -> bool:
    return not call.valid


def _crowded(facts: Facts, call: Call, ending: Ended) -> bool:
    refused = any(f.label == call.name and f.choice == ending.choice and f.orderly for f in facts.history.failures)
    return facts.plan.profile == "overload" or refused or _leaving(facts, call, ending)


def _leaving(facts: Facts, call: Call, ending: Ended) -> bool:
    for life in facts.history.lives:
        if life.name == call.frontend and life.draining and life.draining <= ending.at:
            over = ending.at - life.draining >= facts.plan.grace - EARLY
            if over or ending.state == "rejected" or facts.hurried(life):
                return True
    return False


def _exhausted(facts: Facts, call: Call, ending: Ended) -> bool:
    failed = [f for f in facts.history.failures if f.label == call.name and f.choice == ending.choice]
    return sum(not f.orderly for f in failed) >= facts.plan.migration_limit


def _deadly(facts: Facts, call: Call, ending: Ended) -> bool:
    failed = [*facts.history.failures, *facts.history.legs]
    lost = [f for f in failed if f.label == call.name and f.choice == ending.choice and not f.orderly]
    return len(lost) + 1 >= DEATHS


def _deserted(facts: Facts, call: Call, ending: Ended) -> bool:
    since = ending.at - CALM * facts.stretch
    for life in facts.history.lives:
        there = life.role == "worker" and life.ready and life.ready <= since
        stays = not (life.ended and life.ended <= ending.at) and not (life.draining and life.draining <= ending.at)
        if there and stays and not facts.disturbed({life.name, call.frontend}, since, ending.at):
            return False
    return True


_EXPLAINED: dict[str, Callable[[Facts, Call, Ended], bool]] = {
    "cancelled": _cancelled,
    "client_stalled": _stalled,
    "deadline_exceeded": _overdue,
    "invalid_request": _mistaken,
    "context_length_exceeded": _mistaken,
    "unsupported_feature": _mistaken,
    "capacity_exhausted": _crowded,
    "worker_saturated": _crowded,
    "shutting_down": _leaving,
    "migration_exhausted": _exhausted,
    "poison_request": _deadly,
    "no_workers": _deserted,
}
