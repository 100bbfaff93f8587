"""One worker as this process sees it: its record, its link, its state and what it last said.

States: ``unknown`` (listed, never tried), ``probing`` (connecting, or connected without a pong yet), ``usable``,
``suspect`` (connected but silent), ``ejected`` (lost, or hung). The data path decides them; discovery only says
whom to try. Must never decide anything by itself: the pool moves it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Literal, Protocol

from holdfast.base.errors import Disconnected, HoldfastError, WorkerDraining
from holdfast.base.ids import Epoch, InstanceId
from holdfast.models.card import ModelCard
from holdfast.runtime.detector import FailureDetector
from holdfast.runtime.discovery.contract import InstanceRecord, InstanceState
from holdfast.runtime.inhibition import Inhibition
from holdfast.runtime.streams import StreamHandle, StreamHandler
from holdfast.wire.frames import Draining, Load, OpenHeaders, Pong, Progress, Welcome

WorkerState = Literal["unknown", "probing", "usable", "suspect", "ejected"]
Trigger = Literal["connecting", "answered", "silent", "stalled", "lost"]

TRANSITIONS: dict[tuple[WorkerState, Trigger], WorkerState] = {
    ("unknown", "connecting"): "probing",
    ("probing", "answered"): "usable",
    ("probing", "silent"): "suspect",
    ("probing", "lost"): "ejected",
    ("usable", "silent"): "suspect",
    ("usable", "stalled"): "ejected",
    ("usable", "lost"): "ejected",
    ("suspect", "answered"): "usable",
    ("suspect", "stalled"): "ejected",
    ("suspect", "lost"): "ejected",
    ("ejected", "connecting"): "probing",
    ("ejected", "silent"): "ejected",
    ("ejected", "lost"): "ejected",
}
"""What is missing here leaves the state as it is. A hung worker comes back through ``connecting`` as well:
what it had before does not count."""

SERVING_STATES: frozenset[InstanceState] = frozenset({"ready", "saturated"})
LEAVING_STATES: frozenset[InstanceState] = frozenset({"draining", "stopped"})


class PoolLink(Protocol):
    """What the pool needs of `runtime.link.Link`."""

    on_pong: Callable[[Pong], None] | None
    on_draining: Callable[[Draining], None] | None
    on_lost: Callable[[HoldfastError], None] | None
    on_read_done: Callable[[], None] | None
    last_heard: float
    draining: Draining | None

    @property
    def connected(self) -> bool:
        """Whether streams can be opened."""

    @property
    def streams(self) -> int:
        """Open streams."""

    async def connect(self, timeout: float) -> Welcome:  # noqa: ASYNC109
        """Connect and shake hands."""

    def open(
        self,
        endpoint: str,
        headers: OpenHeaders,
        payload: bytes,
        handler: StreamHandler,
        *,
        credit: int = 0,
        first_index: int | None = None,
    ) -> StreamHandle:
        """Start a stream."""

    async def open_bulk(
        self, endpoint: str, headers: OpenHeaders, payload: bytes, handler: StreamHandler, *, credit: int = 0
    ) -> StreamHandle:
        """Start a stream on the bulk connection."""

    def ping(self) -> int:
        """Send a ping; returns its number."""

    def abandon(self, error: HoldfastError) -> None:
        """Break all streams, stay connected."""

    async def close(self) -> None:
        """Close."""


class Worker:
    """See the module. Created and moved by `runtime.pool.WorkerPool`; everybody else reads and calls."""

    __slots__ = (
        "_clock",
        "_detector",
        "arrival",
        "cards",
        "connector",
        "doubted",
        "draining",
        "epoch",
        "gone",
        "heard_at",
        "inhibition",
        "instance",
        "last_error",
        "leaving",
        "link",
        "listed",
        "poke",
        "pong",
        "problem",
        "record",
        "refused_for",
        "state",
        "struck",
        "unlisted_until",
    )

    def __init__(
        self,
        record: InstanceRecord,
        *,
        arrival: int,
        detector: FailureDetector,
        inhibition: Inhibition,
        clock: Callable[[], float],
    ):
        self._detector = detector
        self._clock = clock
        self.arrival = arrival
        """Rises by one per worker: who was here first."""
        self.record = record
        self.instance: InstanceId = record.instance
        """Its id; stays the same over a restart of its slot."""
        self.epoch: Epoch = record.epoch
        """Of the running process, as its welcome said; before that as discovery says."""
        self.state: WorkerState = "unknown"
        self.cards: dict[str, ModelCard] = {}
        """By model name and alias; only those that agree with the other workers of that name."""
        self.problem = ""
        """Why it, or one of its models, is not used although it is there; empty: nothing wrong."""
        self.refused_for = ""
        """The field of its card that says so (one of `models.card.AGREED_FIELDS`), for counting."""
        self.link: PoolLink | None = None
        self.pong: Pong | None = None
        self.draining = False
        """It said that it accepts nothing any more, on the wire or in its record."""
        self.listed = True
        """Discovery has it."""
        self.leaving = False
        """Withdrawn on purpose, or unlisted for too long: it only finishes what it has."""
        self.gone = False
        """The pool has forgotten it."""
        self.unlisted_until: float | None = None
        self.inhibition = inhibition
        self.last_error: HoldfastError | None = None
        self.struck: HoldfastError | None = None
        """The error with which the pool broke its streams last."""
        self.doubted: Literal["", "silent", "stalled"] = ""
        """What it was taken for and has not disproved yet (`readmission`)."""
        self.heard_at = 0.0
        self.connector: asyncio.Task[None] | None = None
        self.poke = asyncio.Event()

    # -- what rooms above read -------------------------------------------------------------------------

    @property
    def role(self) -> str:
        """``prefill`` (prompts only), ``decode`` or ``aggregated``, as its cards say."""
        return self.record.cards[0].role if self.record.cards else "aggregated"

    @property
    def lifecycle(self) -> InstanceState:
        """The worker's own state: from its last pong while connected, else from its record."""
        if self.draining:
            return "draining"
        if self.pong is not None and self.link is not None:
            return self.pong.state  # type: ignore[return-value]  # an unknown word counts as not serving
        return self.record.state

    @property
    def eligible(self) -> bool:
        """Whether new work may go there, inhibition aside."""
        if self.state != "usable" or self.leaving or self.draining:
            return False
        link, pong = self.link, self.pong
        if link is None or not link.connected:
            return False
        return (self.record.state if pong is None else pong.state) in SERVING_STATES  # its `lifecycle`

    @property
    def standing(self) -> str:
        """For people: its state, or in place of ``usable`` what keeps new work away from it although it is connected.

        ``draining``, ``leaving`` (withdrawn, or unlisted for too long), its own state when that is not a serving one
        (``stalled``, ``starting`` …), or ``refused`` when none of its models agrees with those of the others.
        """
        if self.state != "usable":
            return self.state
        if self.draining:
            return "draining"
        if self.leaving:
            return "leaving"
        if self.lifecycle not in SERVING_STATES:
            return self.lifecycle
        return "refused" if self.record.cards and not self.cards else "usable"

    @property
    def trouble(self) -> str:
        """For people: why it, or one of its models, gets no new work; empty: it gets some."""
        standing = self.standing
        if standing in _WHY:
            return _WHY[standing]
        if self.problem:
            return self.problem
        if self.state != "usable":
            return self.last_error.message if self.last_error is not None else "its connection is being tested"
        if standing != "usable":
            return f"it says that it is {standing}"
        failed = f"it failed lately ({self.inhibition.failures} in a row): others are preferred for a while"
        return failed if self.inhibited else ""

    @property
    def inhibited(self) -> bool:
        """Whether recent failures keep new work away."""
        return self.inhibition.failures > 0 and self.inhibition.active(self._clock())

    @property
    def hesitant(self) -> bool:
        """Not suspect, but others are better for new work: a pong is overdue, or it is back after a hang.

        In the second case one stream at a time may prove that its engine works again.
        """
        if self._detector.hesitant(self.instance, self._clock()):
            return True
        return self._detector.on_trial(self.instance) and self.in_flight > 0

    @property
    def load(self) -> Load:
        """As of the last pong."""
        return _NO_LOAD if self.pong is None else self.pong.load

    @property
    def progress(self) -> Progress:
        """As of the last pong."""
        return _NO_PROGRESS if self.pong is None else self.pong.progress

    @property
    def in_flight(self) -> int:
        """Streams that this process has on it."""
        return 0 if self.link is None else self.link.streams

    @property
    def queued(self) -> int:
        """Sequences waiting in its engine, as of the last pong."""
        return 0 if self.pong is None else self.pong.load.waiting

    def card(self, model: str) -> ModelCard | None:
        """Return its card of that model or alias, if it serves it and agrees with the others."""
        return self.cards.get(model)

    def fingerprint_of(self, model: str) -> str:
        """Return build, weights and CPU of its engine for that model; empty when unknown."""
        card = self.cards.get(model)
        return "" if card is None else card.fingerprint

    # -- what rooms above do ---------------------------------------------------------------------------

    def open(
        self,
        endpoint: str,
        headers: OpenHeaders,
        payload: bytes,
        handler: StreamHandler,
        *,
        credit: int = 0,
        first_index: int | None = None,
    ) -> StreamHandle:
        """Start a stream; see `Link.open`.

        Raises:
            Disconnected: there is no connection.
            WorkerDraining: it accepts nothing any more.
            CapacityExhausted, PayloadTooLarge: a limit of this process.
        """
        link = self._reach()
        if self.draining:
            raise WorkerDraining(f"worker {self.instance} is draining", worker=self.instance)
        return link.open(endpoint, headers, payload, handler, credit=credit, first_index=first_index)

    async def open_bulk(
        self, endpoint: str, headers: OpenHeaders, payload: bytes, handler: StreamHandler, *, credit: int = 0
    ) -> StreamHandle:
        """Start a stream on the bulk connection; see `Link.open_bulk`. Raises as `open`, and CannotConnect."""
        return await self._reach().open_bulk(endpoint, headers, payload, handler, credit=credit)

    def report_failure(self, error: HoldfastError) -> None:
        """Count a failed attempt against it, if it was its fault or that of the way to it."""
        if error is not self.struck:
            self.inhibition.report(error, self._clock())

    def report_success(self) -> None:
        """A stream on it ended well."""
        if self.inhibition.failures:
            self.inhibition.succeeded()

    def _reach(self) -> PoolLink:
        if self.link is None:
            raise Disconnected(f"there is no connection to worker {self.instance} ({self.state})", worker=self.instance)
        return self.link

    # -- what the pool does ----------------------------------------------------------------------------

    def move(self, trigger: Trigger) -> bool:
        """Follow the table; returns whether the state changed."""
        before = self.state
        self.state = TRANSITIONS.get((before, trigger), before)
        return self.state != before

    def adopt(self, record: InstanceRecord) -> None:
        """Take over a newer record of the same instance."""
        if record.epoch != self.record.epoch and self.link is None:
            self.draining, self.pong, self.doubted = False, None, ""
            self.epoch = record.epoch
        self.record = record
        self.listed, self.leaving, self.unlisted_until = True, False, None
        if record.epoch == self.epoch and record.state in LEAVING_STATES:
            self.draining = True


_WHY = {
    "draining": "it has said that it accepts nothing any more",
    "leaving": "discovery does not list it any more",
    "stalled": "it says that its engine is stalled; its own status server tells more",
}
_NO_LOAD = Load()
_NO_PROGRESS = Progress()
