"""What happened in a universe, as a timeline that a person can read: clients, workers, faults, verdicts, evidence.

Must never judge, and never show text of prompts or answers.
"""

from __future__ import annotations

import bisect
from collections.abc import Collection, Iterator

from holdfast.engines.contract import unpack_ids
from holdfast.sim.faults import AnyFault
from holdfast.sim.history import Call, Fired, History, Life, Sequence, Violation
from holdfast.sim.oracles.answers import first_error, read
from holdfast.sim.plan import Plan, instance_of, worker_names

_QUIET = ("unknown", "probing")
"""States of workers that say little."""
_EXITS = {"exited": "has left", "crashed": "is dead", "failed": "ended with an error"}
Line = tuple[float, str, str]
"""When (virtual seconds), about what (a request or a process), what happened."""


def involved(violations: Collection[Violation]) -> set[str]:
    """Return the names of the requests that evidence speaks of."""
    named: set[str] = set()
    for violation in violations:
        evidence = violation.evidence
        named.update(str(name) for name in evidence.get("calls") or ())
        if "call" in evidence:
            named.add(str(evidence["call"]))
    return named


def tell(history: History, plan: Plan, violations: Collection[Violation], *, only: Collection[str] = ()) -> str:
    """Return the timeline.

    Args:
        history: what happened.
        plan: what was to happen.
        violations: what was wrong with it.
        only: requests to speak of; none named: all but the probes at the end.
    """
    told = sorted(_lines(history, plan, set(only)), key=lambda line: line[0])
    began = history.began or (told[0][0] if told else 0.0)
    rows = [f"{at - began:9.4f}  {who:<12} {what}" for at, who, what in told]
    shape = plan.shape
    head = f"{shape.frontends} frontends, {shape.workers} workers, {len(plan.wishes)} requests, profile {plan.profile}"
    if only:
        head += f"; only {', '.join(sorted(only))} shown"
    return "\n".join([head, "  seconds  who          what", *rows, "", *_verdict(violations)])


def _verdict(violations: Collection[Violation]) -> list[str]:
    return [f"VIOLATION {violation}" for violation in violations] or ["every promise was kept"]


def _lines(history: History, plan: Plan, only: set[str]) -> Iterator[Line]:
    calls = [call for call in history.calls if (call.name in only if only else not call.probe)]
    shown = {call.name for call in calls}
    for call in calls:
        yield from _call(call)
    for sequence in history.sequences:
        if sequence.label in shown:
            yield from _sequence(sequence)
    yield from _frontends(history, plan, shown)
    for life in history.lives:
        yield from _life(life)
    yield from _faults(history, plan.faults)
    for at, what in (
        (history.began, "the cluster is ready: requests and faults begin"),
        (history.healed, "all faults are over"),
        (history.answered, "every request has ended"),
        (history.converged, "every frontend uses every worker again"),
        (history.finished, "the end"),
    ):
        if at:
            yield at, "--", what


def _call(call: Call) -> Iterator[Line]:
    body = call.body
    traits = [call.surface, f"{body.get('max_tokens', '?')} tokens at most"]
    traits += ["streamed"] if body.get("stream") else ["whole"]
    traits += [f"n={body['n']}"] if "n" in body else []
    traits += ["stop strings"] if "stop" in body else []
    traits += [] if call.valid else ["a mistake"]
    traits += ["reads slowly"] if call.slow else []
    traits += [f"{name.removeprefix('x-holdfast-')} {value}" for name, value in call.headers.items()]
    yield call.sent, call.name, f"asks {call.frontend}: {', '.join(traits)}"
    if call.ended:
        answer = read(call)
        chars = sum(len(choice.text) for choice in answer.choices.values())
        error = first_error(call)
        said = f", error {error.get('code')}" if error else ""
        yield call.ended, call.name, f"client: {call.ending}, status {call.status or '-'}, {chars} characters{said}"


def _sequence(sequence: Sequence) -> Iterator[Line]:
    request = sequence.request
    carried = len(unpack_ids(request.generated_ids))
    who = f"{sequence.label}/{request.choice}" if request.choice else sequence.label
    what = f"{sequence.worker}'s engine gets attempt {request.attempt}, {carried} tokens in hand"
    if sequence.ending == "refused":
        yield sequence.received, who, f"{what}, and refuses it: {sequence.error}"
        return
    yield sequence.received, who, what
    if sequence.ended:
        error = f", error {sequence.error}" if sequence.error else ""
        yield (
            sequence.ended,
            who,
            f"{sequence.worker}'s engine: {sequence.ending} after {sequence.tokens} tokens{error}",
        )


def _frontends(history: History, plan: Plan, shown: set[str]) -> Iterator[Line]:
    names: dict[str, str] = {instance_of(name): name for name in worker_names(plan.shape)}
    for failure in history.failures:
        if failure.label in shown:
            worker = names.get(failure.worker, failure.worker)
            why = f"{failure.code} ({failure.fault}), {failure.phase}"
            yield failure.at, failure.label, f"{failure.frontend}: attempt {failure.attempt} on {worker} failed: {why}"
    for ending in history.endings:
        if ending.label in shown:
            why = ending.finish or f"{ending.code}{' ' if ending.knob else ''}{ending.knob}"
            what = f"{ending.frontend}: {ending.state}, {why}, {ending.tokens} tokens, {ending.attempts} attempts"
            yield ending.at, ending.label, what
    held: dict[tuple[str, str], str] = {}
    for verdict in history.verdicts:
        pair = verdict.frontend, verdict.worker
        if verdict.state not in _QUIET and held.get(pair) != verdict.state:
            held[pair] = verdict.state
            cause = f" ({verdict.cause})" if verdict.cause and verdict.state not in ("usable", "gone") else ""
            worker = names.get(verdict.worker, verdict.worker)
            yield verdict.at, verdict.frontend, f"holds {worker} for {verdict.state}{cause}"


def _life(life: Life) -> Iterator[Line]:
    if life.incarnation > 1:
        yield life.started, life.name, f"starts again (start {life.incarnation})"
        if life.ready:
            yield life.ready, life.name, "is ready"
    if life.draining:
        yield life.draining, life.name, "drains: it accepts nothing more"
    if life.ended:
        yield life.ended, life.name, f"{_EXITS.get(life.how, 'ended')} (code {life.code})"


def _faults(history: History, planned: tuple[AnyFault, ...]) -> Iterator[Line]:
    for fired in history.fired:
        between = f", {fired.peer}" if fired.peer else ""
        whom = f" of {fired.target}{between}" if fired.target else ""
        hurt = f"; {fired.live} live" if fired.live else ""
        yield fired.at, "FAULT", f"{fired.kind}{whom}{_details(fired, history.began, planned)}{hurt}"
        if fired.until > fired.at and fired.kind not in ("crash", "power-loss", "terminate", "out-of-memory"):
            yield fired.until, "FAULT", f"{fired.kind}{whom} is over"


def _details(fired: Fired, began: float, planned: tuple[AnyFault, ...]) -> str:
    """Return what the plan says about a fault beyond kind and target."""
    same = [f for f in planned if f.kind == fired.kind and f.target == fired.target and f.at <= fired.at - began + 1e-6]
    if not same:
        return ""
    fault = same[bisect.bisect_right([f.at for f in same], fired.at - began + 1e-6) - 1]
    told = [f"for {fault.duration:.3g} s"] if fault.duration else []
    told += [
        f"{name} {getattr(fault, name)}" for name in ("factor", "seconds", "times", "shift") if hasattr(fault, name)
    ]
    told += ["one way"] if getattr(fault, "one_way", False) else []
    return f" {', '.join(told)}" if told else ""
