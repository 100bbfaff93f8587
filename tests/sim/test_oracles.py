"""Every oracle notices a mistake planted in production code, within a few universes; without it all is quiet."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from holdfast.base.errors import InvalidRequest
from holdfast.engines.contract import GenerateRequest, Sampling, StopRules
from holdfast.frontend.answers import Answer, StreamedAnswer
from holdfast.local.rolling import Rolling
from holdfast.openai.encode import DONE
from holdfast.requests import driver
from holdfast.requests.attempt import Attempt
from holdfast.requests.budget import RetryBudget
from holdfast.requests.deadlines import Deadlines
from holdfast.requests.migration import Verdict, judge
from holdfast.requests.placement import Placement
from holdfast.requests.service import Services
from holdfast.runtime.detector import FailureDetector
from holdfast.runtime.inhibition import Inhibition
from holdfast.runtime.pool import WorkerPool
from holdfast.runtime.server import WorkerServer
from holdfast.sim.engine import SimEngine
from holdfast.sim.history import Fired, History, Life, Sequence
from holdfast.sim.oracles import p06
from holdfast.sim.oracles.facts import facts_of
from holdfast.sim.plan import Plan, Shape
from holdfast.sim.universe import run_universe
from holdfast.worker.host import EngineHost

SEEDS = 12
"""Universes in which a planted mistake has to show."""

Patch = pytest.MonkeyPatch


def seed_lost_on_migration(patch: Patch) -> None:
    start = Attempt.start

    def planted(self: Attempt) -> None:
        plan = self.generation.plan
        if self.number > 1:
            sampling = msgspec.structs.replace(plan.sampling, seed=plan.sampling.seed + 1)
            self.generation.plan = msgspec.structs.replace(plan, sampling=sampling)
        start(self)

    patch.setattr(Attempt, "start", planted)


def stale_attempt_writes_into_the_live_stream(patch: Patch) -> None:
    on_tokens = Attempt.on_tokens

    def planted(self: Attempt, index: int, tokens: list[int], logprobs: object) -> None:
        generation = self.generation
        if generation.attempt is not None and generation.attempt is not self:
            index = generation.count
            generation.attempt.on_tokens(index, tokens, None)
            return
        on_tokens(self, index, tokens, logprobs)  # type: ignore[arg-type]

    patch.setattr(Attempt, "on_tokens", planted)
    patch.setattr(Attempt, "kill", lambda self, reason: None)


def done_twice(patch: Patch) -> None:
    complete = StreamedAnswer._complete

    def planted(self: StreamedAnswer) -> None:
        complete(self)
        self.reply.write(DONE)

    patch.setattr(StreamedAnswer, "_complete", planted)


def usage_counts_moves(patch: Patch) -> None:
    counts = Answer.counts

    def planted(self: Answer) -> object:  # type: ignore[type-arg]
        usage = counts(self)
        moves = sum(len(choice.ending.moves) for choice in self.choices)
        return msgspec.structs.replace(usage, completion_tokens=usage.completion_tokens + moves)

    patch.setattr(Answer, "counts", planted)


def attempts_that_nobody_accepted_are_not_given_back(patch: Patch) -> None:
    release = Placement.release

    def planted(self: Placement, need: object, placed: object, *, worked: bool) -> None:
        if worked:
            release(self, need, placed, worked=worked)  # type: ignore[arg-type]

    patch.setattr(Placement, "release", planted)


def total_deadline_is_forgotten(patch: Patch) -> None:
    look = Deadlines._look

    def planted(self: Deadlines, generation: object, now: float) -> None:
        generation.expires = 0.0  # type: ignore[attr-defined]
        look(self, generation, now)  # type: ignore[arg-type]

    patch.setattr(Deadlines, "_look", planted)
    patch.setattr(EngineHost, "_expire", lambda self, sequence: None)


def accepted_work_is_refused(patch: Patch) -> None:
    def planted(self: EngineHost, key: object, call: object, story: object, **_: object) -> None:
        call.refuse(InvalidRequest("planted"))  # type: ignore[attr-defined]

    accept = EngineHost._accept

    def sometimes(self: EngineHost, key: int, call: object, story: object, **more: bool) -> None:
        act = planted if key % 7 == 0 else accept
        act(self, key, call, story, **more)  # type: ignore[arg-type]

    patch.setattr(EngineHost, "_accept", sometimes)


def the_budget_refuses_first_moves(patch: Patch) -> None:
    def planted(*args: object, **kwargs: object) -> Verdict:
        return Verdict(judge(*args, **kwargs).error, free=False)  # type: ignore[arg-type]

    patch.setattr(driver, "judge", planted)
    patch.setattr(RetryBudget, "withdraw", lambda self, now: False)
    patch.setattr(RetryBudget, "wait_hint", lambda self, now: 1e9)


def draining_is_not_heeded(patch: Patch) -> None:
    patch.setattr(WorkerServer, "drain", lambda self, reason, remaining_ms: None)
    patch.setattr(EngineHost, "drain", lambda self: None)


def the_breaker_is_fed_by_callers_mistakes(patch: Patch) -> None:
    def planted(self: Inhibition, error: object, now: float) -> bool:
        self.until, self.failures = now + 1.0, self.failures + 1
        return True

    patch.setattr(Inhibition, "report", planted)


def cancels_do_not_reach_the_engine(patch: Patch) -> None:
    patch.setattr(SimEngine, "cancel", lambda self, key: None)


def unknown_is_taken_for_dead(patch: Patch) -> None:
    on_discovery = WorkerPool._on_discovery

    def planted(self: WorkerPool, event: object) -> None:
        on_discovery(self, event)  # type: ignore[arg-type]
        if event.kind == "unknown":  # type: ignore[attr-defined]
            for worker in self.all_workers():
                self._forget(worker, purposeful=True)

    patch.setattr(WorkerPool, "_on_discovery", planted)


def suspects_never_return(patch: Patch) -> None:
    patch.setattr(FailureDetector, "_judge_return", lambda self, instance, watched, delay, at: None)


def a_workers_fault_is_final(patch: Patch) -> None:
    def planted(history: object, failure: object, **_: object) -> Verdict:
        return Verdict(failure.error)  # type: ignore[attr-defined]

    patch.setattr(driver, "judge", planted)


def a_rollout_waits_for_nobody(patch: Patch) -> None:
    async def planted(self: Rolling, condition: object, name: str, when: str) -> None:
        return

    patch.setattr(Rolling, "_until", planted)


def slow_is_taken_for_dead(patch: Patch) -> None:
    bounds = Services.bounds

    def planted(self: Services, **wanted: float | None) -> object:
        return msgspec.structs.replace(bounds(self, **wanted), first_token=0.3)

    patch.setattr(Services, "bounds", planted)


CRASHES = Shape(only=("crash", "reset"), faults=4)
FREEZES = Shape(only=("freeze",), faults=5)
PLANTED: list[tuple[str, Callable[[Patch], None], Shape]] = [
    ("P1", seed_lost_on_migration, CRASHES),
    ("P1", stale_attempt_writes_into_the_live_stream, FREEZES),
    ("P2", done_twice, CRASHES),
    ("P3", usage_counts_moves, CRASHES),
    ("P4", attempts_that_nobody_accepted_are_not_given_back, CRASHES),
    ("P5", total_deadline_is_forgotten, FREEZES),
    ("P6", accepted_work_is_refused, CRASHES),
    ("P7", the_budget_refuses_first_moves, CRASHES),
    ("P8", draining_is_not_heeded, Shape(only=("terminate",), faults=4)),
    (
        "P9",
        a_rollout_waits_for_nobody,
        Shape(only=("rolling-restart",), faults=2, more_faults=0),
    ),
    ("P10", the_breaker_is_fed_by_callers_mistakes, CRASHES),
    ("P11", cancels_do_not_reach_the_engine, CRASHES),
    ("P12", unknown_is_taken_for_dead, Shape(only=("discovery-outage",), faults=2)),
    ("P13", suspects_never_return, FREEZES),
    ("cause", slow_is_taken_for_dead, Shape(only=("engine-refuse",))),
    ("kept", a_workers_fault_is_final, CRASHES),
]


@pytest.mark.parametrize(("promise", "plant", "shape"), PLANTED, ids=[plant.__name__ for _, plant, _ in PLANTED])
def test_a_planted_mistake_is_noticed(
    promise: str, plant: Callable[[Patch], None], shape: Shape, monkeypatch: Patch
) -> None:
    plant(monkeypatch)
    for seed in range(SEEDS):
        if promise in {violation.promise for violation in run_universe(seed, shape).violations}:
            return
    raise AssertionError(f"{plant.__name__} was not noticed by {promise} in {SEEDS} universes")


@pytest.mark.parametrize("shape", {plant[2] for plant in PLANTED}, ids=lambda shape: shape.only[0])
def test_the_same_universes_are_quiet_without_it(shape: Shape) -> None:
    for seed in range(3):
        assert [str(v) for v in run_universe(seed, shape).violations] == []


@pytest.mark.parametrize(("arrived", "found"), [((2, 1), []), ((1, 2), ["a mistake was tried again"])], ids=str)
def test_a_mistake_is_tried_again_only_by_an_attempt_that_was_made_later(
    arrived: tuple[int, int], found: list[str]
) -> None:
    """A slow worker read the first attempt after another one had refused the second (seed 10013)."""
    request = GenerateRequest(
        request_id="x", model="m", prompt_ids=b"", sampling=Sampling(), stop=StopRules(max_tokens=8)
    )
    sequences = [
        Sequence(
            f"worker-{number}",
            1,
            "r1",
            msgspec.structs.replace(request, attempt=number),
            at,
            ending="refused",
            error="invalid_request",
        )
        for at, number in enumerate(arrived)
    ]
    facts = facts_of(History(sequences=sequences), Plan(Shape(), "mixed", (), ()))
    assert [violation.what for violation in p06.check(facts)] == found


def test_a_rollout_that_began_before_a_worker_did_tells_it_to_leave_too() -> None:
    """A second word makes a worker that leaves hand over at once; that is no breach of P8 (seed 8281)."""
    life = Life("worker-1", "worker", 2, started=5.7, ended=6.2)
    asked = Fired(at=5.9, until=5.9, kind="terminate", target="worker-1", live=1)
    rolling = Fired(at=3.0, until=3.0, kind="rolling-restart", target="worker", live=1)
    plan = Plan(Shape(), "mixed", (), ())
    for rollouts, hurried in (([], False), ([(1.0, 5.0)], False), ([(3.1, 6.9)], True), ([(6.5, 6.9)], False)):
        history = History(lives=[life], fired=[asked, rolling], rollouts=rollouts)
        assert facts_of(history, plan).hurried(life) is hurried, rollouts


def test_a_crowd_of_probes_that_is_larger_than_the_limits_is_no_breach_of_p13() -> None:
    """Two frontends with ten probes at once, three decode workers with places for nine (seed 15595)."""
    outcome = run_universe(15595)
    assert [str(violation) for violation in outcome.violations] == []
