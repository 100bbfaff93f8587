"""What drives one stream between attempts: find a worker, make an attempt, judge its failure, again.

Runs in a task of its own and sleeps while tokens flow. Knows what the stream has been through, and therefore
whether its parts fit together exactly. Must never touch tokens or write to the client.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from holdfast.base.errors import AcceptOverdue, CapacityExhausted, HandoffFault, HoldfastError, InternalError
from holdfast.requests.attempt import Attempt
from holdfast.requests.chain import Chain
from holdfast.requests.migration import Failure, History, MigrationType, judge, migration_type, record
from holdfast.requests.need import Need, Placed
from holdfast.requests.plan import Join, Move, Plan
from holdfast.requests.prefill import Prefilling
from holdfast.routing.claims import ANY_RANK
from holdfast.routing.kv import Decision
from holdfast.routing.policy import Candidate
from holdfast.routing.queue import Rank
from holdfast.telemetry.explain import Considered, Weighed

if TYPE_CHECKING:
    from holdfast.requests.generation import Generation
    from holdfast.requests.prefill_leg import PrefillLeg
    from holdfast.requests.service import Services

log = logging.getLogger(__name__)

CONSIDERED_SHOWN = 8
"""Workers whose load is remembered per placement."""


class Driver:
    """Belongs to one `Generation`, for its whole life."""

    __slots__ = (
        "_generation", "_interrupted", "_prefilling", "_services", "_stalled_at", "_task", "considered", "history",
        "join", "moves", "need", "overlap", "prefilled_by", "rank",
    )  # fmt: skip

    def __init__(self, generation: Generation, services: Services):
        self._generation = generation
        self._services = services
        self._task: asyncio.Task[None] | None = None
        self._interrupted = False
        self._stalled_at = 0.0
        self._prefilling: Prefilling | None = None
        """Made when there are prefill workers."""
        self.history = History()
        plan = generation.plan
        self.need = Need(plan.model, Rank(plan.strict_priority, plan.priority), plan.route)
        self.need.suspicion = services.inquest.open(generation.started_at)
        if services.router.kv is not None:
            self.need.chain = Chain(plan.prompt_ids, plan.cache_salt, plan.lora)
            self.need.generated = generation.generated_bytes
        self.join: Join = "none"
        self.moves: list[Move] = []
        self.rank = ANY_RANK
        """Data-parallel rank of the latest attempt; `ANY_RANK`: the engine chose."""
        self.prefilled_by: tuple[str, int] | None = None
        """Instance id and data-parallel rank of the prefill worker of the latest attempt, if it had one."""
        self.overlap: int | None = None
        """Blocks that the router found in the cache of its worker; None: it was not asked."""
        self.considered: list[Considered] = []
        """For each attempt, among how many workers it was placed and what the first of them had to do."""

    @property
    def migration_type(self) -> MigrationType:
        """Which kind of move the next attempt is."""
        return migration_type(self.history)

    async def run(self) -> None:
        """Drive the stream to its end; raises nothing but the caller's own cancellation."""
        generation = self._generation
        if generation.ended is not None:
            return
        task = self._task = asyncio.current_task()
        assert task is not None
        cancelling = task.cancelling()
        self._services.deadlines.add(generation)
        try:
            generation.enter("placing")
            while generation.ended is None:
                await self._one_attempt()
        except HoldfastError as error:
            generation.finish_with(error)
        except asyncio.CancelledError:
            if not self._interrupted or task.uncancel() > cancelling:
                generation.cancel("shutdown")
                raise
        except Exception:
            log.exception("request %s: fault in the request's driver", generation.plan.request_id)
            generation.finish_with(InternalError("The request failed because of a fault in Holdfast."))
        finally:
            if self._prefilling is not None:
                self._prefilling.close()
                self._prefilling = None
            self._services.deadlines.remove(generation)
            self._services.inquest.still(self.need.suspicion)
            self._task = None
            self.need.forget_tokens()
            del self._generation  # it holds this driver: nothing is left to the garbage collector

    def interrupt(self) -> None:
        """The stream has ended: whatever the driver waits for, it must not go on."""
        task = self._task
        if task is not None and not self._interrupted and task is not asyncio.current_task():
            self._interrupted = True
            task.cancel()

    async def _one_attempt(self) -> None:
        placement, plan = self._services.placement, self._generation.plan
        self.need.tokens = plan.prompt_length + self._generation.count
        prefilling = self._prefilling
        if prefilling is not None or self._services.prefills.concerns(self.need):
            prefilling = self._prefilling = prefilling or Prefilling(self._generation, self._services)
            prefilling.expect()
        placed = await placement.find(self.need, plan.deadlines.wait)
        attempt = None
        try:
            leg = await prefilling.leg(placed) if prefilling is not None else None
            if leg is None and self.need.remote:
                return  # chosen as one that would not have to compute it
            attempt = self._begin(placed, leg)
            try:
                error = await attempt.result
            finally:
                attempt.kill("superseded")
            if prefilling is not None:
                prefilling.attempted(attempt, error)
        finally:
            self.need.tokens = plan.prompt_length + self._generation.count
            placement.release(self.need, placed, worked=attempt is not None and attempt.accepted)
        if error is not None and self._generation.ended is None:
            await self._after_failure(attempt, error)

    def _begin(self, placed: Placed, leg: PrefillLeg | None) -> Attempt:
        generation = self._generation
        now = generation.loop.time()
        self.history.attempts += 1
        generation.worker = placed.worker.instance
        if not generation.count:
            self.need.fingerprint = placed.worker.fingerprint_of(generation.plan.model)
        attempt = generation.attempt = Attempt(generation, placed, self.history.attempts, now, leg)
        if leg is not None:
            leg.attempt = attempt
        candidates = self._services.policy.considered
        self.rank = placed.rank
        self.prefilled_by = (leg.placed.worker.instance, leg.placed.rank) if leg is not None else None
        self.overlap = placed.decision.overlap if placed.decision is not None else None
        if placed.decision is None:
            shown = tuple([(w.instance, w.in_flight, w.queued, None) for w in candidates[:CONSIDERED_SHOWN]])
            self.considered.append((len(candidates), shown))
        else:
            self.considered.append((len(placed.decision.terms), _weighed(placed.decision, candidates)))
        generation.note("attempt", placed.worker.instance)
        generation.enter("dispatched")
        observer, clock = self._services.observer, generation.flusher.clock
        observer.attempt_started(generation)
        began = clock()
        attempt.start()
        observer.attempt_sent((clock() - began) / 1e9)
        return attempt

    async def _after_failure(self, attempt: Attempt, error: HoldfastError) -> None:
        generation, services = self._generation, self._services
        now = asyncio.get_running_loop().time()
        self._stalled_at = self._stalled_at or now
        failure = Failure(error, attempt.sent, attempt.accepted)
        record(self.history, failure)
        generation.note("failed", f"{error.code} at token {generation.count}: {error.message}")
        if not isinstance(error, AcceptOverdue):
            attempt.placed.worker.report_failure(error)
        if not isinstance(error, HandoffFault):  # the same worker may do it without
            self.need.failed(attempt.placed.key, failure, now)
        suspicion = self.need.suspicion
        if suspicion.deaths and services.inquest.settle(suspicion):
            services.placement.wake()
        verdict = judge(
            self.history,
            failure,
            limit=services.settings.migration_limit,
            sequence_length=generation.plan.prompt_length + generation.count,
            max_length=services.settings.migration_max_seq_len,
            excused=min(suspicion.excused, services.settings.migration_limit),
            convicted=suspicion.convicted,
        )
        if verdict.error is not None:
            raise verdict.error
        generation.enter("migrating")
        log.info(
            "choice %d leaves worker %s at token %d: %s",
            generation.plan.choice,
            attempt.placed.worker.instance,
            generation.count,
            error.message,
            extra={"cause": error.code, "attempt": attempt.number},
        )
        self.moves.append(Move(error.code, generation.count, 0.0))
        services.observer.migration_started(generation, error)
        if self.history.accepted or error.fault != "capacity":
            await services.pacer.pass_through(generation.started_at)
        if not verdict.free:
            await self._budget(error)

    async def _budget(self, error: HoldfastError) -> None:
        loop = asyncio.get_running_loop()
        budget = self._services.budget
        until = loop.time() + self._generation.plan.deadlines.wait
        while not budget.withdraw(loop.time()):
            hint = budget.wait_hint(loop.time())
            if loop.time() + hint > until:
                raise CapacityExhausted(
                    "The fleet's budget of repeated attempts is used up: workers fail faster than work gets done.",
                    retry_after=hint + 1.0,
                    layer="frontend",
                    knob="retry budget",
                    last_error=error.code,
                )
            await asyncio.sleep(max(0.01, hint))

    # what the stream reports

    def was_accepted(self) -> bool:
        """A worker owns the stream; returns whether it is the first one."""
        first = not self.history.accepted
        self.history.accepted = True
        self.need.accepted()
        return first

    def prefill_accepted(self) -> None:
        """A prefill worker computes the prompt."""
        self.begun()
        self._generation.note("prefill accepted")

    def begun(self) -> None:
        """Work on the request has begun, though no decode worker has it: it is not turned away any more."""
        self.history.begun = True
        self.need.begun()

    def lost_prefill(self, leg: PrefillLeg) -> None:
        """The process that computed the prompt is lost; told for all of its legs before any driver runs."""
        generation = self._generation
        self._services.inquest.died(
            leg.placed.key,
            self.need.suspicion,
            tokens=0,
            index=generation.count,
            progressed=False,
            accepted=leg.accepted,
            now=generation.loop.time(),
        )

    def prompt_computed(self, attempt: Attempt) -> None:
        """The first token of an attempt has come: its worker has room for another prompt."""
        attempt.placed.claim.computed()
        if attempt.leg is not None:
            attempt.leg.taken()
        self._services.placement.line.offer(self.need.model)

    def lost_worker(self, attempt: Attempt) -> None:
        """The worker's process is lost; told for all of its streams before any driver runs."""
        generation = self._generation
        self._services.inquest.died(
            attempt.placed.key,
            self.need.suspicion,
            tokens=generation.count - attempt.base,
            index=generation.count,
            progressed=attempt.progressed,
            accepted=attempt.accepted,
            now=generation.loop.time(),
        )

    def moved_on(self, attempt: Attempt, tokens: int) -> None:
        """New tokens of any attempt but the first, told until there are enough to trust it.

        Args:
            attempt: the present one.
            tokens: how many it has brought, these included.
        """
        generation = self._generation
        if tokens >= attempt.proof:
            attempt.watched = False
            self.need.suspicion.proven()
            attempt.placed.end_trial()
        if generation.count > attempt.base:
            return
        self._judge_join(attempt)
        if not self._stalled_at:
            return
        gap = asyncio.get_running_loop().time() - self._stalled_at
        self._stalled_at = 0.0
        last = self.moves.pop()
        self.moves.append(Move(last.cause, attempt.base, gap))
        generation.note("resumed", f"{gap * 1000:.1f} ms after the failure")
        self._services.observer.migrated(generation, gap)

    def _judge_join(self, attempt: Attempt) -> None:
        """Note whether the tokens of this attempt continue those before it exactly."""
        if not attempt.base:
            return
        plan = self._generation.plan
        card = attempt.placed.worker.card(plan.model)
        kept = card is not None and (
            card.continuation == "exact" or (card.continuation == "greedy" and plan.sampling.temperature <= 0)
        )
        kept = kept and not (card is not None and card.not_restored and _uses(plan, card.not_restored))
        build = attempt.placed.worker.fingerprint_of(plan.model)
        same = build == self.need.fingerprint
        self.need.fingerprint = build
        if self.join != "declared":
            self.join = "exact" if same and kept else "declared"


def _uses(plan: Plan, parts: Sequence[str]) -> bool:
    """Return whether a stream depends on one of these (`engines.contract.Restored`)."""
    s = plan.sampling
    used = {
        "seed": s.temperature > 0,
        "penalties": s.repetition_penalty != 1 or bool(s.presence_penalty or s.frequency_penalty),
        "min_tokens": plan.stop.min_tokens > 0,
        "guided": s.guided is not None,
    }
    return any(used.get(part, True) for part in parts)


def _weighed(decision: Decision, workers: Sequence[Candidate]) -> tuple[tuple[str, int, int, Weighed | None], ...]:
    """Return how the cheapest ranks were weighed."""
    of = {worker.instance: worker for worker in workers}
    best = sorted(decision.terms, key=lambda one: (one.instance != decision.instance, one.cost))[:CONSIDERED_SHOWN]
    return tuple(
        (
            one.instance,
            of[one.instance].in_flight,
            of[one.instance].queued,
            (one.rank, one.overlap, one.prefill, one.decode, one.cost),
        )
        for one in best
    )
