"""Whether a request may go to a worker now: admit, let it queue, or reject it, with the reason in numbers.

Two things make a worker full: a threshold of this process that it is over (`saturation`), or its own refusal for
lack of room. Only when every eligible worker is full is a new request queued or rejected; where nobody is there at
all, nothing is decided here. What was admitted once is never rejected by a threshold: a stream that moves is a
promise already given.

Must never choose among workers that have room, wait, or know HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Generic, Literal, Protocol, TypeVar

import msgspec

from holdfast.base.errors import CapacityExhausted, HoldfastError, WorkerSaturated
from holdfast.models.card import ModelCard
from holdfast.routing.claims import Ledger, Reporting
from holdfast.routing.drain import DrainMeter
from holdfast.routing.saturation import Excess, Thresholds, worker_excess
from holdfast.routing.thresholds import ThresholdBook

Decision = Literal["admit", "queue", "reject"]


class Eligible(Reporting, Protocol):
    """A worker that may get work, as far as health goes."""

    def card(self, model: str) -> ModelCard | None:
        """Return its card of that model."""


W = TypeVar("W", bound=Eligible)
Key = tuple[str, int]
"""Instance and epoch."""


class Verdict(msgspec.Struct, Generic[W], frozen=True):
    """What is decided about one request at one moment."""

    decision: Decision
    free: Sequence[W] = ()
    """With ``admit``: those that it may go to; empty when nobody is there to be asked."""
    error: CapacityExhausted | None = None
    """With ``queue`` and ``reject``: why."""


class Admission:
    """The decision, and what it is based on, for all models of one process.

    Args:
        book: thresholds in force.
        enabled: False: thresholds are ignored (`DYN_ADMISSION_CONTROL` ``none``).
    """

    def __init__(self, book: ThresholdBook, *, enabled: bool = True):
        self.book = book
        self.enabled = enabled
        self.ledger = Ledger()
        self.drain = DrainMeter()

    def excess(self, model: str, worker: Eligible, thresholds: Thresholds | None = None) -> Excess | None:
        """Return what makes a worker saturated for a model, or None; ``thresholds``: other ones than the model's."""
        thresholds = self.book.of(model) if thresholds is None else thresholds
        if not (self.enabled and thresholds.any):
            return None
        card = worker.card(model)
        if card is None:
            return None
        loads = self.ledger.loads(worker, card.block_size, card.total_kv_blocks, card.data_parallel_size)
        return worker_excess(thresholds, loads, card.max_num_batched_tokens)

    def with_room(self, model: str, workers: Sequence[W], thresholds: Thresholds | None = None) -> Sequence[W]:
        """Return those that no threshold forbids; cheap when none is set."""
        thresholds = self.book.of(model) if thresholds is None else thresholds
        if not (self.enabled and thresholds.any):
            return workers
        return [worker for worker in workers if self.excess(model, worker, thresholds) is None]

    def judge(
        self,
        model: str,
        workers: Sequence[W],
        refusals: Mapping[Key, HoldfastError],
        *,
        queueing: bool,
        ahead: int,
        now: float,
        thresholds: Thresholds | None = None,
    ) -> Verdict[W]:
        """Decide about a request that has not been admitted yet.

        Args:
            model: what it asks for.
            workers: eligible ones; none: nothing is decided, and it may wait for one to come.
            refusals: those that did not take it lately, and why.
            queueing: whether there is a queue.
            ahead: requests that get room before it.
            now: loop time in seconds.
            thresholds: of its policy class, instead of the model's.
        """
        if not refusals:
            free = self.with_room(model, workers, thresholds)
            if free or not workers:
                return Verdict("admit", free)
        asked = {(w.instance, w.epoch): refusals.get((w.instance, w.epoch)) for w in workers}
        willing = [w for w in workers if asked[(w.instance, w.epoch)] is None]
        free = self.with_room(model, willing, thresholds)
        if free or any(error is not None and error.fault != "capacity" for error in asked.values()) or not workers:
            return Verdict("admit", free)
        error = self._full(model, willing, [e for e in asked.values() if e is not None], thresholds)
        if not error.retry_after or self.drain.rate(model, now):
            error.retry_after = max(error.retry_after or 0.0, self.drain.retry_after(model, ahead, now))
        return Verdict("queue" if queueing else "reject", (), error)

    def _full(
        self, model: str, saturated: Sequence[W], refused: Sequence[HoldfastError], thresholds: Thresholds | None
    ) -> CapacityExhausted:
        over = [(worker, self.excess(model, worker, thresholds)) for worker in saturated]
        found = [(excess.ratio, worker.instance, excess) for worker, excess in over if excess is not None]
        count = len(saturated) + len(refused)
        if not found:
            return _all_refused(model, refused)
        _, worker, excess = min(found, key=lambda one: one[:2])
        return CapacityExhausted(
            f"All {count} workers of model '{model}' are saturated; the nearest to having room is {worker}: "
            f"{_sentence(excess)}.",
            layer="frontend",
            knob=excess.knob,
            threshold=excess.threshold,
            measured=float(f"{excess.measured:.6g}"),
            worker=worker,
            workers=count,
        )


def _all_refused(model: str, refused: Sequence[HoldfastError]) -> CapacityExhausted:
    last = refused[-1]
    knob = last.details.get("knob", "")
    named = "" if knob in last.message else f" ({knob})"
    told: dict[str, Any] = {"layer": "worker", "measured": last.details.get("actual")}
    told |= {key: last.details[key] for key in ("layer", "knob", "threshold", "measured") if key in last.details}
    return WorkerSaturated(
        f"All {len(refused)} usable workers of model '{model}' are full; the last one said: {last.message}{named}",
        retry_after=max((error.retry_after or 0.0) for error in refused),
        workers=len(refused),
        **told,
    )


def _sentence(excess: Excess) -> str:
    if excess.name == "active_prefill_tokens_threshold":
        return f"{excess.measured:g} prompt tokens to compute, the threshold is {excess.threshold:g} ({excess.knob})"
    what = (
        "of its KV blocks in use or promised"
        if excess.name == "active_decode_blocks_threshold"
        else "of its tokens per step still to compute"
    )
    measured, threshold = (f"{share * 100:.3g} %" for share in (excess.measured, excess.threshold))
    return f"{measured} {what}, the threshold is {threshold} ({excess.knob})"
