"""What a simulated frontend tells the history: attempts, failures, ends, verdicts about workers.

It listens where production code offers to be listened to (`requests.service.Observer`, `WorkerPool.subscribe`), and
checks at once what can be checked at once. Must never change what it sees.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from holdfast.base.errors import HoldfastError
from holdfast.requests.disagg import Reason
from holdfast.requests.generation import Generation
from holdfast.requests.plan import Ending
from holdfast.requests.prefill_leg import PrefillLeg
from holdfast.requests.service import Observer
from holdfast.runtime.inhibition import Inhibition, InhibitionSettings
from holdfast.runtime.notices import PoolEvent
from holdfast.runtime.pool import Worker
from holdfast.sim.history import Ended, Failed, History, Phase, Verdict

_COUNTED_FAULTS = ("worker", "transport")


class Watching:
    """An `Observer` beside the frontend's own.

    Args:
        frontend: name of the process.
        history: where it goes.
        inner: the frontend's own observer.
        labels: learns the client's name of each request, by request id.
        dispatched: told about every attempt that goes out, with the worker's instance id.
        inhibition: settings of the pool.
        now: the time.
    """

    def __init__(
        self,
        frontend: str,
        history: History,
        inner: Observer,
        *,
        labels: dict[str, str],
        dispatched: Callable[[str], None],
        inhibition: InhibitionSettings,
        now: Callable[[], float],
    ):
        self._frontend, self._history, self._inner = frontend, history, inner
        self._labels, self._dispatched, self._now = labels, dispatched, now
        self._inhibition = inhibition
        self._attempts: dict[Generation, tuple[int, bool]] = {}
        """Of each stream's present attempt: output index at which it began, and whether it was accepted."""
        self._ended: set[tuple[str, int]] = set()

    # -- `Observer` ------------------------------------------------------------------------------------

    def attempt_started(self, generation: Generation) -> None:
        """See `Observer`."""
        plan = generation.plan
        self._labels[plan.request_id] = plan.label
        self._attempts[generation] = (generation.count, False)
        self._inner.attempt_started(generation)
        self._dispatched(generation.worker)

    def attempt_sent(self, seconds: float) -> None:
        """See `Observer`."""
        self._inner.attempt_sent(seconds)

    def accepted(self, generation: Generation, first: bool) -> None:
        """See `Observer`."""
        base, _ = self._attempts.get(generation, (0, False))
        self._attempts[generation] = (base, True)
        self._inner.accepted(generation, first)

    def first_token(self, generation: Generation) -> None:
        """See `Observer`."""
        self._inner.first_token(generation)

    def progressed(self, generation: Generation) -> None:
        """See `Observer`."""
        self._inner.progressed(generation)

    def migration_started(self, generation: Generation, error: HoldfastError) -> None:
        """See `Observer`."""
        self._inner.migration_started(generation, error)
        plan = generation.plan
        phase = self._phase(generation)
        self._history.see(f"migration {phase}")
        self._history.failures.append(
            Failed(
                self._now(),
                self._frontend,
                plan.label,
                plan.choice,
                generation.driver.history.attempts,
                generation.worker,
                error.code,
                error.fault,
                phase,
                error.fault == "capacity"
                or error.code == "worker_draining"
                or error.code.startswith("handoff_")
                or bool(error.details.get("hedged")),
            )
        )

    def migrated(self, generation: Generation, gap_seconds: float) -> None:
        """See `Observer`."""
        self._inner.migrated(generation, gap_seconds)

    def prefill_decided(self, generation: Generation, reason: Reason) -> None:
        """See `Observer`."""
        self._inner.prefill_decided(generation, reason)
        self._history.see(f"prefill {reason}")

    def prefill_started(self, generation: Generation, leg: PrefillLeg) -> None:
        """See `Observer`."""
        self._labels[generation.plan.request_id] = generation.plan.label
        self._inner.prefill_started(generation, leg)
        self._dispatched(leg.placed.worker.instance)

    def prefill_ended(
        self, generation: Generation, leg: PrefillLeg, error: HoldfastError | None, seconds: float
    ) -> None:
        """See `Observer`."""
        self._inner.prefill_ended(generation, leg, error, seconds)
        if error is None:
            self._history.see("leg handed over")
            return
        self._history.see(f"leg {error.code}")
        plan = generation.plan
        orderly = error.fault == "capacity" or error.code in ("worker_draining", "accept_overdue")
        worker = leg.placed.worker.instance
        self._history.legs.append(
            Failed(
                self._now(),
                self._frontend,
                plan.label,
                plan.choice,
                leg.number,
                worker,
                error.code,
                error.fault,
                "before first token",
                orderly,
            )
        )

    def ended(self, generation: Generation, ending: Ending) -> None:
        """See `Observer`."""
        self._inner.ended(generation, ending)
        plan, error = generation.plan, ending.error
        key = (plan.request_id, plan.choice)
        if key in self._ended:
            self._history.violate("P2", "a stream ended twice", call=plan.label, choice=plan.choice, state=ending.state)
        self._ended.add(key)
        self._attempts.pop(generation, None)
        knob = str(error.details.get("knob", "")) if error is not None else ""
        self._history.endings.append(
            Ended(
                self._now(),
                self._frontend,
                plan.label,
                plan.choice,
                ending.state,
                ending.finish,
                error.code if error is not None else "",
                error.fault if error is not None else "",
                knob,
                ending.completion_tokens,
                ending.attempts,
            )
        )
        self._count(generation, ending, knob)

    def _count(self, generation: Generation, ending: Ending, knob: str) -> None:
        see = self._history.see
        see(f"ended {ending.state}")
        if ending.state == "rejected" and ending.error is not None:
            see(f"rejected {ending.error.code}{' ' if knob else ''}{knob}")
        if any(event == "complete" for _, event, _ in generation.timeline):
            see("completed without the end")
        if ending.join != "none":
            see(f"join {ending.join}")

    def _phase(self, generation: Generation) -> Phase:
        base, accepted = self._attempts.get(generation, (0, False))
        if not accepted:
            return "before accept"
        if generation.longest - generation.count <= 1:
            return "at the end"
        return "before first token" if generation.count <= base else "mid-stream"

    # -- the pool --------------------------------------------------------------------------------------

    def pool_event(self, event: PoolEvent, worker: Worker) -> None:
        """A worker has changed in this frontend's eyes (a `PoolSink`)."""
        if event == "pong":
            return
        if event == "added":
            worker.inhibition = WatchedInhibition(self._inhibition, worker.instance, self._history)
        state = "gone" if event == "removed" else worker.state
        cause = worker.last_error.code if worker.last_error is not None else ""
        self._history.verdicts.append(Verdict(self._now(), self._frontend, worker.instance, state, cause))
        self._history.see(f"worker {state}")


class WatchedInhibition(Inhibition):
    """P10, checked where it happens: only faults of worker and transport may count."""

    __slots__ = ("_history", "_instance")

    def __init__(self, settings: InhibitionSettings, instance: str, history: History):
        super().__init__(settings)
        self._instance, self._history = instance, history

    def report(self, error: HoldfastError, now: float) -> bool:
        """See `Inhibition.report`."""
        counted = super().report(error, now)
        if counted:
            self._history.see("worker inhibited")
            if error.fault not in _COUNTED_FAULTS:
                what = "a fault that is not the worker's counted against it"
                self._history.violate("P10", what, worker=self._instance, code=error.code, fault=error.fault)
        return counted


def replace(target: object, method: str, by: Callable[..., Any]) -> None:
    """Let one object have a method of its own."""
    setattr(target, method, by)
