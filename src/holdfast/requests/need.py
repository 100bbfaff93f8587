"""What a stream needs of its next worker, and what it holds while it has one.

Must never choose a worker.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from holdfast.base.errors import CapacityExhausted, HoldfastError
from holdfast.requests.fleet import ServingWorker
from holdfast.requests.leases import Lease
from holdfast.requests.migration import Failure
from holdfast.requests.poison import Record
from holdfast.routing.claims import ANY_RANK, Claim
from holdfast.routing.queue import Rank
from holdfast.routing.route import ANYWHERE, Route

if TYPE_CHECKING:
    from holdfast.requests.chain import Chain
    from holdfast.requests.lanes import Spot
    from holdfast.routing.kv import Decision

DEFAULT_RANK = Rank()
ASK_AGAIN = 0.2
"""Seconds for which a worker that did not take a stream is not asked again by it."""


ErrorT = TypeVar("ErrorT", bound=HoldfastError)


class Party:
    """The choices of one request: admitted together, or turned away together."""

    __slots__ = ("admitted", "calls", "error", "size", "started")

    def __init__(self, size: int = 1):
        self.size = size
        self.admitted = False
        """A worker was found for one of them."""
        self.started = False
        """A worker has accepted one of them."""
        self.error: HoldfastError | None = None
        """Why they were turned away."""
        self.calls: list[Callable[[], None]] = []
        """Those of them that wait in the queue."""

    def admit(self) -> None:
        """One has a worker: the others follow."""
        if not self.admitted:
            self.admitted = True
            self._call()

    def refuse(self, error: ErrorT) -> ErrorT:
        """One was turned away: so are the others, unless work has begun. Returns the error."""
        if not self.started and self.error is None:
            self.error = error
            self._call()
        return error

    def _call(self) -> None:
        for call in list(self.calls):
            call()


class Need:
    """What one stream needs of its next worker; kept by its driver, changed by its failures."""

    __slots__ = (
        "avoid", "chain", "crowded", "fingerprint", "full", "generated", "model", "party", "queued_at", "rank",
        "refused", "remote", "route", "since", "spot", "started", "suspicion", "tokens", "whole",
    )  # fmt: skip

    def __init__(self, model: str, rank: Rank = DEFAULT_RANK, route: Route = ANYWHERE):
        self.model = model
        self.rank = rank
        self.route = route
        self.chain: Chain | None = None
        """Names the blocks of its tokens; None: nobody wants to know."""
        self.generated: Callable[[], bytes] = _no_tokens
        """Tokens after its prompt, little-endian u32."""
        self.party = Party()
        self.tokens = 0
        """Prompt and generated tokens that its next worker has to compute."""
        self.full: CapacityExhausted | None = None
        """Why the last look found no room."""
        self.queued_at: float | None = None
        """When it came to the queue for the first time."""
        self.crowded = False
        """It has waited for room for long enough: any worker that takes it will do."""
        self.avoid: set[tuple[str, int]] = set()
        """(instance, epoch) that failed this stream: taken only when nobody else is there."""
        self.refused: dict[tuple[str, int], tuple[float, HoldfastError]] = {}
        """Workers that did not take it lately: not asked again before that time."""
        self.fingerprint = ""
        self.remote = False
        """Its next worker will find the prompt computed: only its load counts, and it has none of it to compute."""
        self.whole = False
        """Its next worker has to compute the prompt: those that cannot are left out while there are others."""
        self.suspicion = Record()
        self.started = False
        """Some worker has accepted this stream: it waits for room instead of being rejected."""
        self.spot: Spot | None = None
        """Where it stands among the policy classes; None: there are none, or it was not asked yet."""
        self.since: float | None = None
        """When nobody owned it any more and the first search or refusal came; None: it is owned."""

    def forget_tokens(self) -> None:
        """It is over: nothing of the stream is held any more."""
        self.chain, self.generated = None, _no_tokens

    @property
    def promised(self) -> bool:
        """Work on its request has begun: it is not turned away any more."""
        return self.started or self.party.started

    def failed(self, key: tuple[str, int], failure: Failure, now: float) -> None:
        """Remember who failed this stream, or did not take it."""
        if not failure.accepted:
            self.refused[key] = (now + ASK_AGAIN, failure.error)
            if self.since is None:
                self.since = now
        if failure.accepted or failure.error.fault != "capacity":
            self.avoid.add(key)

    def accepted(self) -> None:
        """A worker owns it."""
        self.started = self.party.started = True
        self.since = None
        self.crowded = False
        self.refused.clear()

    def begun(self) -> None:
        """Its prompt is being computed, but nobody owns it yet: whoever refused it is not asked again at once."""
        self.started = self.party.started = True

    def last_refusal(self) -> HoldfastError | None:
        """Return why the latest worker did not take it."""
        return next(reversed(self.refused.values()))[1] if self.refused else None


class Placed:
    """A worker for one attempt, with what is counted for it. `release` when the attempt is over."""

    __slots__ = ("_watch", "claim", "decision", "key", "lease", "rank", "worker")

    def __init__(
        self,
        worker: ServingWorker,
        lease: Lease,
        claim: Claim,
        watch: Watch | None,
        *,
        rank: int = ANY_RANK,
        decision: Decision | None = None,
    ):
        self.worker = worker
        self.claim = claim
        self.rank = rank
        """Data-parallel rank that was chosen; `ANY_RANK`: the engine's to choose."""
        self.decision = decision
        """Why, when caches were asked."""
        self.key = (worker.instance, worker.epoch)
        """The process: the worker's record may have moved on to the next one when this one is talked about."""
        self.lease = lease
        self._watch = watch

    def end_trial(self) -> None:
        """The stream got enough tokens: it did not kill this worker, and the next suspect may be tried there."""
        if self._watch is not None:
            self._watch.end()

    def release(self, length: int) -> None:
        """Give back what was counted; ``length``: tokens of the sequence by now."""
        self.lease.release()
        self.claim.release(length)
        self.end_trial()


def computes(worker: ServingWorker, model: str) -> bool:
    """Return whether a worker can compute prompts of a model itself; some decode workers cannot (SGLang's)."""
    card = worker.card(model)
    return card is None or card.local_prefill


def _no_tokens() -> bytes:
    return b""


class Watch:
    """Somebody on a worker who has lost one before: alone on trial, or merely on probation. `end` it once."""

    __slots__ = ("_lease", "_on_end")

    def __init__(self, lease: Lease, on_end: Callable[[], None]):
        self._lease = lease
        self._on_end: Callable[[], None] | None = on_end

    def end(self) -> None:
        """Let a suspect be tried; only the first call counts."""
        on_end, self._on_end = self._on_end, None
        if on_end is not None:
            self._lease.release()
            on_end()
