"""The prefill side of one stream: before each of its attempts a prefill worker may compute the prompt.

Its driver asks for a leg when a decode worker is found. What comes back is a leg whose prompt is computed (or, in the
style ``rendezvous``, under way), or nothing, and then the decode worker computes the prompt itself. Every failure leads
to another prefill worker, within the budget of repeated attempts, or to the decode worker; `DYN_ENFORCE_DISAGG` turns
the second into a typed error. A leg whose decode worker did not take the stream is kept for the next one.

Some decode workers cannot compute prompts (SGLang's); their cards say so, and they never get a stream without a leg.
What nobody computes for them goes to a worker that can do the whole, if there is one; else the stream waits, within the
bound of every wait for a worker, for a prefill worker, and then ends with an error that says so. One whose card is too
old to say it refuses with `NoWorkers`, and from then on its stream is treated in the same way.

Runs in the stream's own task, so that no leg outlives its stream. Must never touch tokens.
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import TYPE_CHECKING

from holdfast.base.errors import AcceptOverdue, HandoffFault, HoldfastError, NoWorkers, WorkerDraining
from holdfast.models.pairing import mismatch
from holdfast.requests.disagg import Reason
from holdfast.requests.migration import poisoned
from holdfast.requests.need import Placed, computes
from holdfast.requests.prefill_leg import PrefillLeg

if TYPE_CHECKING:
    from holdfast.requests.attempt import Attempt
    from holdfast.requests.generation import Generation
    from holdfast.requests.service import Services

log = logging.getLogger(__name__)

TRIES = 3
"""Prefill workers that one attempt asks at most."""
HANDOFFS = 3
"""Hand-offs that may fail under one stream; afterwards it asks for no other."""
LOOK_AGAIN = 0.25
"""Seconds between two looks for a prefill worker where nobody else computes prompts."""
_PASSING: tuple[Reason, ...] = ("no_prefill_worker", "saturated", "failed")
_WHY: dict[Reason, str] = {
    "no_prefill_worker": "none is usable",
    "incompatible": "none fits the decode worker (engine, KV transfer protocol)",
    "saturated": "all are saturated",
    "failed": "all that were asked failed",
    "budget": "the budget of repeated attempts is used up",
    "suspect": "workers were lost under it before",
    "handoff": "its hand-offs failed",
}


class Prefilling:
    """Of one stream; its driver makes it when there is something to decide.

    Args:
        generation: the stream.
        services: of the process.
    """

    __slots__ = (
        "_avoid", "_dependent", "_failed_handoffs", "_generation", "_last", "_leg", "_local", "_services", "_stuck",
        "_until",
    )  # fmt: skip

    def __init__(self, generation: Generation, services: Services):
        self._generation, self._services = generation, services
        self._leg: PrefillLeg | None = None
        """Computed, and not used up."""
        self._local: Reason | None = None
        """Why the next attempt computes the prompt itself."""
        self._avoid: set[tuple[str, int]] = set()
        self._dependent = False
        """A decode worker has said that it computes no prompts, by refusing one."""
        self._stuck = False
        """Only a prefill worker can compute the prompt of the attempt that is prepared."""
        self._until: float | None = None
        """How long it may wait for one."""
        self._failed_handoffs = 0
        self._last: HoldfastError | None = None

    def expect(self) -> None:
        """Say in the stream's need whether its next decode worker will find the prompt computed, or has to do it.

        Raises:
            NoWorkers: this new stream names a prefill worker that nobody knows.
        """
        need, prefills = self._generation.need, self._services.prefills
        prefills.check_named(need)
        dependent = self._dependent or prefills.only_apart(need.model)
        if self._failed_handoffs >= HANDOFFS and self._local is None:
            self._local = "handoff"  # it would go on like this
        if need.suspicion.suspect and self._local is None and not dependent:
            self._drop("suspect")
            self._local = "suspect"
        if self._leg is not None and self._leg.lost_at:
            self._drop("lost")
        need.remote = self._local is None and (self._leg is not None or prefills.likely(need.model))
        alone = self._local is not None or prefills.none_usable(need.model)
        need.whole = self._leg is None and alone and not dependent

    async def leg(self, placed: Placed) -> PrefillLeg | None:
        """Return the leg from which the attempt on that decode worker starts; None: it computes the prompt itself.

        When it was chosen in the belief that it would not have to, the driver chooses again.

        Raises:
            NoWorkers: no prefill worker could do it, and nobody else may.
            PoisonRequest: this stream is known to kill workers.
            InvalidRequest: the prefill worker's engine says that it is a mistake.
        """
        need, prefills = self._generation.need, self._services.prefills
        if self._leg is not None and not _fits(self._leg, placed, need.model):
            self._drop("does not fit")
        if self._leg is not None:
            return self._leg
        self._stuck = self._dependent or (
            not computes(placed.worker, need.model) and (need.whole or prefills.only_apart(need.model))
        )
        if self._stuck and self._failed_handoffs < HANDOFFS:
            self._local = None  # whatever spoke against a prefill worker, there is nobody else
        reason = self._local if self._stuck else self._local or prefills.keeps_local(need, placed)
        if reason is None:
            reason = await self._compute(placed)
        if self._stuck and reason in _PASSING:
            reason = await self._wait(placed, reason)
        if reason == "remote":
            return self._leg
        if (prefills.settings.enforce_disagg or self._stuck) and reason not in ("short", "cached"):
            self._services.observer.prefill_decided(self._generation, reason)
            raise self._refusal(reason)
        again = need.remote or not computes(placed.worker, need.model)
        if again or (reason == "suspect" and self._local is None):
            need.remote, self._local = True, reason
            return None
        self._decided(reason)
        self._local = None
        return None

    async def _wait(self, placed: Placed, reason: Reason) -> Reason:
        """Wait for somebody who computes prompts; returns what came of it."""
        generation, prefills = self._generation, self._services.prefills
        now = generation.loop.time
        if self._until is None:
            self._until = now() + generation.plan.deadlines.wait
            generation.note("waits for a prefill worker", _WHY.get(reason, reason))
        while reason in _PASSING and now() < self._until:
            await asyncio.sleep(LOOK_AGAIN)
            if not self._dependent and not generation.need.whole and not prefills.only_apart(generation.need.model):
                self._stuck = False  # one that does the whole has come
                return reason
            self._avoid.clear()
            reason = await self._compute(placed)
        return reason

    async def _compute(self, placed: Placed) -> Reason:
        """Let a prefill worker compute the prompt; afterwards the leg is kept here."""
        for number in range(TRIES):
            if number and not self._services.budget.withdraw(self._generation.loop.time()):
                return "budget"
            found = self._services.prefills.find(self._generation.need, placed.worker, self._avoid)
            if not isinstance(found, Placed):
                return found
            if await self._one(found):
                self._decided("remote")
                return "remote"
            if self._generation.need.suspicion.suspect and not self._stuck:
                return "suspect"
        return "failed"

    async def _one(self, placed: Placed) -> bool:
        """Let one prefill worker compute the prompt; returns whether it did."""
        generation = self._generation
        leg = PrefillLeg(generation, placed, generation.driver.history.attempts + 1, generation.loop.time())
        try:
            if generation.state != "prefilling":
                generation.enter("prefilling")
            generation.note("prefill", placed.worker.instance)
            card = placed.worker.card(generation.plan.model)
            if card is not None and card.handoff_phase == "rendezvous":
                leg.meet(card, *self._services.prefills.meeting(card, placed.rank))
                leg.begin = partial(self._open, leg)
                self._leg = leg
                return True
            self._open(leg)
            error = await leg.result
            if error is None:
                self._leg = leg
                self._computed(leg)
                return True
        finally:
            if self._leg is not leg:
                leg.close("given up")
        self._failed(leg, error)
        return False

    def _open(self, leg: PrefillLeg) -> None:
        self._services.observer.prefill_started(self._generation, leg)
        leg.open(*self._bounds(leg.placed))

    def _bounds(self, placed: Placed) -> tuple[float, float, str]:
        """Return the bounds on accept and hand-off in seconds, and what the first was set by."""
        bounds, prefills = self._generation.plan.deadlines, self._services.prefills
        total = prefills.settings.prefill_timeout
        if "first_token" in bounds.by_header and bounds.first_token:
            total = min(total or bounds.first_token, bounds.first_token)
        local = not (prefills.settings.enforce_disagg or self._stuck)
        hedged = local or prefills.others(self._generation.need, placed.worker, self._avoid)
        if hedged and bounds.accept_hedge:
            return bounds.accept_hedge, total, bounds.knob("accept_hedge")
        return bounds.accept, total, bounds.knob("accept")

    def _computed(self, leg: PrefillLeg) -> None:
        generation = self._generation
        seconds = leg.ready_at - leg.began
        tokens = leg.handoff.tokens if leg.handoff is not None else 0
        generation.note("handed over", f"{tokens} tokens after {seconds * 1000:.1f} ms")
        leg.placed.worker.report_success()
        self._services.observer.prefill_ended(generation, leg, None, seconds)

    def _failed(self, leg: PrefillLeg, error: HoldfastError) -> None:
        generation, services, worker = self._generation, self._services, leg.placed.worker
        self._last = error
        self._avoid.add(leg.placed.key)
        generation.note("prefill failed", f"{error.code}: {error.message}")
        if not isinstance(error, AcceptOverdue):
            worker.report_failure(error)
        suspicion = generation.need.suspicion
        if suspicion.deaths and services.inquest.settle(suspicion):
            services.placement.wake()
        if not suspicion.suspect:
            services.inquest.still(suspicion)  # its decode worker is kept
        log.info(
            "choice %d: its prompt was not computed by prefill worker %s: %s",
            generation.plan.choice,
            worker.instance,
            error.message,
            extra={"cause": error.code},
        )
        services.observer.prefill_ended(generation, leg, error, generation.loop.time() - leg.began)
        if suspicion.convicted:
            raise poisoned(generation.driver.history, error)
        if error.fault in ("caller", "request"):
            raise error  # it would be the same mistake anywhere else

    def _decided(self, reason: Reason) -> None:
        if reason != "remote":
            self._generation.note("local prefill", reason)
        self._services.observer.prefill_decided(self._generation, reason)

    def _refusal(self, reason: Reason) -> HoldfastError:
        model = self._generation.plan.model
        last = f"; the last one said {self._last.code}: {self._last.message.rstrip('.')}" if self._last else ""
        knob = "" if self._stuck else "DYN_ENFORCE_DISAGG"
        who = (
            "its decode workers cannot compute prompts themselves; start a prefill worker, or one without a role"
            if self._stuck
            else "decode workers may not (DYN_ENFORCE_DISAGG)"
        )
        waited = f" within {self._generation.plan.deadlines.wait:g} s" if self._until is not None else ""
        return NoWorkers(
            f"No prefill worker of model '{model}' computed the prompt{waited} ({_WHY.get(reason, reason)}{last}), and "
            f"{who}.",
            model=model,
            reason=reason,
            retry_after=5.0,
            **({"knob": knob} if knob else {}),
        )

    # -- what the driver reports -----------------------------------------------------------------------

    def attempted(self, attempt: Attempt, error: HoldfastError | None) -> None:
        """An attempt is over; ``error`` None: so is the stream. Its leg goes too, unless it may be used again."""
        leg, self._until = self._leg, None
        if leg is None:
            self._dependent |= isinstance(error, NoWorkers) and not attempt.accepted
            return
        if leg.rendezvous and leg.result.done():
            failure = leg.result.result()
            if failure is not None:
                self._failed(leg, failure)
            else:
                self._computed(leg)
        if isinstance(error, HandoffFault):
            self._failed_handoffs += 1
            enforced = self._stuck or self._services.prefills.settings.enforce_disagg
            self._local = "handoff" if not enforced or self._failed_handoffs >= HANDOFFS else None
        elif error is not None and attempt.accepted and attempt.base == self._generation.count and _blames(error):
            self._local = "handoff"  # whatever ailed that engine, the next one shall not begin like this
        again = error is not None and not attempt.accepted and not isinstance(error, HandoffFault)
        if not again or leg.rendezvous:
            self._drop("over")

    def _drop(self, reason: str) -> None:
        leg, self._leg = self._leg, None
        if leg is not None:
            leg.close(reason)

    def close(self) -> None:
        """The stream is over."""
        self._drop("over")


def _fits(leg: PrefillLeg, placed: Placed, model: str) -> bool:
    """Whether a computed prompt can be handed to this decode worker."""
    mine, theirs = leg.placed.worker.card(model), placed.worker.card(model)
    return not leg.lost_at and mine is not None and theirs is not None and mismatch(mine, theirs) is None


def _blames(error: HoldfastError) -> bool:
    """Whether the decode worker itself failed, not the way to it."""
    return error.fault == "worker" and not isinstance(error, WorkerDraining)
