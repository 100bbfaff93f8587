"""Cause: no worker is blamed for what it did not do.

Not one of the thirteen promises, but what slow-is-not-dead means: every failed attempt must have a cause among the
faults that were injected, of a kind that can lead to that error, on the worker, its frontend or the way between them,
not longer ago than `AFTER` seconds. So a detector that suspects healthy workers, a drain that forgets a request until
its accept is overdue, or a connection that is dropped without need is noticed, although the stream survives it.

Prompts that make an engine fail, and clients' own bounds between tokens, are causes too.
"""

from __future__ import annotations

from collections.abc import Iterator

from holdfast.sim.history import Failed, Violation
from holdfast.sim.oracles.facts import Facts

AFTER = 8.0
"""Seconds: silence is noticed within a few, and a machine that lost its power keeps its peers waiting that long."""

_GONE = frozenset({"crash", "power-loss", "terminate", "rolling-restart", "out-of-memory", "reset"})
_SILENT = frozenset({"freeze", "slow", "partition", "delay", "power-loss"})
CAUSES: dict[str, frozenset[str]] = {
    "disconnected": _GONE | _SILENT,
    "cannot_connect": _GONE | _SILENT,
    "peer_silent": _SILENT,
    "accept_overdue": _SILENT,
    "worker_stalled": _SILENT | {"engine-hang", "engine-slow"},
    "worker_draining": _GONE,
    "engine_failed": frozenset({"engine-error", "out-of-memory", "crash", "terminate", "rolling-restart"}),
    "stream_incomplete": frozenset({"engine-abort", "engine-miscount"}),
}
"""By code of the error; codes that are not here (refusals, mistakes) blame nobody."""
_STANDING = frozenset({"engine-error", "engine-abort", "engine-miscount"})
"""Orders that wait for a sequence to come, however long."""
_BY_PROMPT = {"engine_failed": "[[mock:error", "stream_incomplete": "[[mock:abort"}


def check(facts: Facts) -> Iterator[Violation]:
    """Return the breaches."""
    calls = {call.name: call for call in facts.history.calls}
    for failed in facts.history.failures:
        kinds = CAUSES.get(failed.code)
        if kinds is None or _caused(facts, failed, kinds):
            continue
        call = calls.get(failed.label)
        mark = _BY_PROMPT.get(failed.code)
        if call is not None and mark is not None and mark in facts.body(call):
            continue
        if call is not None and failed.code == "worker_stalled" and any("-token-" in name for name in call.headers):
            continue
        where = {
            "call": failed.label,
            "code": failed.code,
            "worker": facts.name_of(failed.worker),
            "frontend": failed.frontend,
            "at": round(failed.at, 3),
            "phase": failed.phase,
        }
        yield Violation("cause", "an attempt failed without a cause", where)


def _caused(facts: Facts, failed: Failed, kinds: frozenset[str]) -> bool:
    names = {facts.name_of(failed.worker), failed.frontend, "worker", "frontend"}
    return any(
        fault.kind in kinds and (fault.target in names or fault.peer in names)
        for fault in facts.history.fired
        if fault.at <= failed.at and (failed.at <= fault.until + AFTER or fault.kind in _STANDING)
    ) or (bool(kinds & _GONE) and _restarted(facts, failed, names))


def _restarted(facts: Facts, failed: Failed, names: set[str]) -> bool:
    """Whether the worker ended lately: a rolling restart takes its time over all of them."""
    return any(
        life.name in names and life.role == "worker" and over and over <= failed.at <= over + AFTER
        for life in facts.history.lives
        for over in (life.draining, life.ended)
    )
