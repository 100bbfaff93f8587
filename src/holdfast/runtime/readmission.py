"""A worker that comes back from suspicion proves itself first: it is asked to send a request through its own engine.

Pongs say that a process runs, not that its engine works. So a worker that was silent or hung, and answers again, is
asked over the wire for a fresh canary (`CANARY_ENDPOINT`) before it gets work:

* a good verdict, and it is used;
* a bad one, and it stays out and is asked again, with growing pauses;
* no verdict within `ANSWER_SECONDS`: one that had been silent is used all the same, for it answers pings and may be
  just slow; one that had been hung counts as hanging still;
* it does not know the question (an older worker, another kind of endpoint): it is used as it always was.

Whoever is silent again, or lost, while the question is open begins anew when it is back.

Must never judge who is suspect, and never send anything but this question.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import msgspec

from holdfast.base.errors import HoldfastError
from holdfast.base.ids import InstanceId
from holdfast.runtime.streams import Logprobs, StreamHandle
from holdfast.wire.frames import OpenHeaders

if TYPE_CHECKING:
    from holdfast.runtime.member import Worker

log = logging.getLogger(__name__)

CANARY_ENDPOINT = "holdfast_canary"
"""Answers every call with one `CanaryVerdict` in msgpack."""
ANSWER_SECONDS = 1.5
"""A verdict is waited for so long at first; doubles with every bad one, so that slow engines come back too …"""
ANSWER_CEILING = 12.0
"""… up to this."""
ASK_AGAIN_FIRST = 1.0
"""Pause after a bad verdict; doubles …"""
ASK_AGAIN_CEILING = 8.0
"""… up to this."""
_QUESTION = msgspec.msgpack.encode({})


class CanaryVerdict(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a worker found out about itself just now."""

    usable: bool
    why: str = ""
    """When it is not, or when nothing was sent: the reason, with what was measured."""
    tokens: int = 0
    """That the canary brought; 0: none was sent."""


_verdict = msgspec.msgpack.Decoder(CanaryVerdict).decode


class Readmissions:
    """The workers of one process that are on their way back.

    Args:
        clock: the loop's time.
        admit: called with a worker that may be used again.
    """

    def __init__(self, clock: Callable[[], float], admit: Callable[[Worker], None]):
        self._clock = clock
        self._admit = admit
        self._open: dict[InstanceId, _Return] = {}

    def begin(self, worker: Worker) -> None:
        """It answers again: ask it, unless that is under way; admits at once those that cannot be asked."""
        if worker.instance in self._open:
            return
        if not worker.doubted or CANARY_ENDPOINT not in worker.record.endpoints:
            self._admitted(worker)
            return
        self._open[worker.instance] = returning = _Return(self, worker)
        self._ask(returning)

    def check(self, now: float) -> None:
        """Look at those whose verdict is due, or who are to be asked again."""
        for returning in list(self._open.values()):
            if now < returning.due:
                continue
            if not returning.asking:
                self._ask(returning)
            elif returning.worker.doubted == "stalled":
                self.refused(returning, f"no verdict within {returning.patience:g} s")
            else:
                log.warning(
                    "worker %s answers pings again, but gave no verdict on itself within %g s; it is used all the same",
                    returning.worker.instance,
                    returning.patience,
                )
                self.admitted(returning)

    def drop(self, worker: Worker) -> None:
        """It is silent again, lost or forgotten: whatever it still says counts no more."""
        returning = self._open.pop(worker.instance, None)
        if returning is not None:
            returning.end()

    def _ask(self, returning: _Return) -> None:
        worker = returning.worker
        returning.due = self._clock() + returning.patience
        headers = OpenHeaders(request_id="canary", remaining_ms=int(returning.patience * 1e3))
        try:
            if worker.link is None:
                self.drop(worker)
                return
            returning.handle = worker.link.open(CANARY_ENDPOINT, headers, _QUESTION, returning)
        except HoldfastError as error:
            log.debug("worker %s cannot be asked for a canary: %s", worker.instance, error.message)
            self.admitted(returning)

    # what the answers say

    def admitted(self, returning: _Return) -> None:
        """It may be used."""
        self.drop(returning.worker)
        self._admitted(returning.worker)

    def _admitted(self, worker: Worker) -> None:
        worker.doubted = ""
        self._admit(worker)

    def refused(self, returning: _Return, why: str) -> None:
        """It stays out for now."""
        returning.end()
        pause = min(ASK_AGAIN_CEILING, ASK_AGAIN_FIRST * 2**returning.refusals)
        returning.refusals = min(returning.refusals + 1, 16)
        returning.due = self._clock() + pause
        log.warning(
            "worker %s answers again but its own canary failed: %s; asked again in %g s",
            returning.worker.instance,
            why,
            pause,
        )


class _Return:
    """One worker on its way back; a `streams.StreamHandler`."""

    __slots__ = ("_book", "due", "handle", "refusals", "verdict", "worker")

    def __init__(self, book: Readmissions, worker: Worker):
        self._book = book
        self.worker = worker
        self.due = 0.0
        """While asking: when the verdict is overdue; otherwise: when to ask again."""
        self.refusals = 0
        self.handle: StreamHandle | None = None
        self.verdict: CanaryVerdict | None = None

    @property
    def asking(self) -> bool:
        return self.handle is not None

    @property
    def patience(self) -> float:
        """Seconds that a verdict may take this time."""
        return min(ANSWER_CEILING, ANSWER_SECONDS * 2.0**self.refusals)

    def end(self) -> None:
        """The question is closed."""
        handle, self.handle, self.verdict = self.handle, None, None
        if handle is not None:
            handle.kill("canary over")

    def on_accept(self) -> None:
        """The verdict follows."""

    def on_tokens(self, index: int, tokens: Sequence[int], logprobs: Logprobs | None) -> None:
        """Not what this endpoint sends."""

    def on_data(self, index: int, payload: bytes) -> None:  # noqa: ARG002
        try:
            self.verdict = _verdict(payload)
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            log.warning("worker %s gave a verdict on itself that cannot be read: %s", self.worker.instance, error)

    def on_refuse(self, error: HoldfastError) -> None:
        """It does not know the question, or has no room for it: as workers that cannot be asked."""
        log.debug("worker %s gives no verdict on itself: %s", self.worker.instance, error.message)
        self.handle = None
        self._book.admitted(self)

    def on_end(self, finish: str, error: HoldfastError | None, cached_tokens: int) -> None:  # noqa: ARG002
        verdict, self.handle = self.verdict, None
        if verdict is None and error is None:
            self._book.admitted(self)
        elif verdict is not None and verdict.usable:
            log.info("worker %s proved that its engine works (%d tokens)", self.worker.instance, verdict.tokens)
            self._book.admitted(self)
        else:
            self._book.refused(self, verdict.why if verdict is not None else str(error))

    def on_broken(self, error: HoldfastError) -> None:  # noqa: ARG002  whoever broke it knows why
        self.handle = None
        self._book.drop(self.worker)
