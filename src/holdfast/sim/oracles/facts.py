"""A history with what several oracles need of it, worked out once: answers, truths, times in which something was
disturbed.

Must never judge.
"""

from __future__ import annotations

import msgspec

from holdfast.sim.faults import Terminate
from holdfast.sim.history import Call, Ended, History, Life, Sequence
from holdfast.sim.oracles.answers import Answer, read
from holdfast.sim.oracles.truth import Truth
from holdfast.sim.plan import Plan, instance_of, worker_names

UNFAIR = frozenset({
    "freeze", "slow", "partition", "delay", "power-loss", "crash", "terminate", "reset", "out-of-memory",
    "rolling-restart",
})  # fmt: skip
"""Faults after which a frontend and a worker may need a while to hear each other."""


SILENCING = frozenset({"freeze", "slow", "partition", "delay", "power-loss"})
"""Those after which one side does not know at once what the other did: nothing is broken that either could see."""


class Facts(msgspec.Struct):
    """See the module."""

    history: History
    plan: Plan
    truths: dict[tuple[str, int], Truth] = {}
    """By call and choice; filled by the oracle of P1."""
    endings: dict[tuple[str, int], Ended] = {}
    """The frontends' last words, by call and choice."""
    answers: dict[str, Answer] = {}

    bodies: dict[str, str] = {}
    """What clients sent, as text, by the name of the call."""
    calls: dict[str, Call] = {}
    """By name."""
    stretch: float = 1.0
    """How much longer than in a simulation things may take: real processes share their machine with others."""

    @property
    def sequences(self) -> list[Sequence]:
        """Users' sequences; canaries are nobody's."""
        return [sequence for sequence in self.history.sequences if sequence.label]

    def answer(self, call: Call) -> Answer:
        """Return a call's answer."""
        found = self.answers.get(call.name)
        if found is None:
            found = self.answers[call.name] = read(call)
        return found

    def body(self, call: Call) -> str:
        """Return what a client sent as text: commands for the mock engine are found in it."""
        found = self.bodies.get(call.name)
        if found is None:
            found = self.bodies[call.name] = str(call.body)
        return found

    def choices(self, call: Call) -> int:
        """Return how many choices a call asks for."""
        return int(call.body.get("n") or 1)

    def given_up(self) -> dict[tuple[str, int, int, str], float]:
        """Return when attempts were given up: by call, choice, attempt, and for prefill legs the worker's name."""
        failures = self.history.failures
        found = {(f.label, f.choice, f.attempt, ""): f.at for f in failures}
        return found | {(f.label, f.choice, f.attempt, self.name_of(f.worker)): f.at for f in self.history.legs}

    def name_of(self, instance: str) -> str:
        """Return the name of a worker by its instance id; an id that is nobody's stays as it is."""
        return next((name for name in worker_names(self.plan.shape) if instance_of(name) == instance), instance)

    def life(self, name: str, incarnation: int) -> Life | None:
        """Return one start of a process."""
        return next((x for x in self.history.lives if x.name == name and x.incarnation == incarnation), None)

    def version(self, call: Call, sequence: Sequence) -> int:
        """Return the protocol version that a call's frontend and the worker of one of its attempts spoke."""
        asked = [life for life in self.history.lives if life.name == call.frontend and life.started <= call.sent]
        worker = self.life(sequence.worker, sequence.incarnation)
        return min(life.version for life in (*asked[-1:], worker) if life is not None)

    def disturbed(self, names: set[str], since: float, until: float, kinds: frozenset[str] = UNFAIR) -> float:
        """Return when the last disturbance of these processes within a time was over; 0: there was none.

        With `UNFAIR` kinds a new start of one of them counts too.
        """
        hits = [
            fault.until
            for fault in self.history.fired
            if fault.kind in kinds
            and (fault.target in names or fault.peer in names)
            and fault.at <= until
            and fault.until >= since
        ]
        hits += [
            life.ready or life.started
            for life in self.history.lives
            if kinds is UNFAIR and life.name in names and life.incarnation > 1 and since <= life.started <= until
        ]
        return max(hits, default=0.0)

    def stopped(self, name: str, since: float, until: float) -> float:
        """Return for how long a process stood still or was slow within a time, in seconds."""
        return sum(
            max(0.0, min(fault.until, until) - max(fault.at, since))
            for fault in self.history.fired
            if fault.target == name and fault.kind in ("freeze", "slow")
        )

    def hurried(self, life: Life) -> bool:
        """Return whether a process that leaves was told so twice: then it waits for nothing."""
        told = sum(
            fault.kind == "terminate" and fault.target == life.name
            for fault in self.history.fired
            if life.started <= fault.at and not (life.ended and fault.at > life.ended)
        )
        told += sum(  # a rollout that began before this start of it reaches it all the same
            life.started <= until and not (life.ended and began > life.ended) for began, until in self.history.rollouts
        )
        twice = any(
            isinstance(fault, Terminate) and fault.target == life.name and fault.signals > 1
            for fault in self.plan.faults
        )
        return told > 1 or twice


def attempt_of(sequence: Sequence) -> tuple[str, int, int, str]:
    """Return the key of a sequence in `Facts.given_up`."""
    request = sequence.request
    return sequence.label, request.choice, request.attempt, sequence.worker if request.leg == "prefill" else ""


def facts_of(history: History, plan: Plan, stretch: float = 1.0) -> Facts:
    """Return a history's facts; ``stretch`` as in `Facts`."""
    endings = {(ending.label, ending.choice): ending for ending in history.endings}
    calls = {call.name: call for call in history.calls}
    return Facts(history, plan, endings=endings, calls=calls, stretch=stretch)
