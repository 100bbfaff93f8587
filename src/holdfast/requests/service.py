"""What all requests of a process share, wired once.

Must never know HTTP.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Protocol

import msgspec

from holdfast.base.errors import HoldfastError
from holdfast.requests.budget import Pacer, RetryBudget
from holdfast.requests.config import RequestSettings
from holdfast.requests.deadlines import Deadlines
from holdfast.requests.disagg import Prefills, Reason
from holdfast.requests.fleet import Pool
from holdfast.requests.flusher import Flusher
from holdfast.requests.leases import LeaseBook
from holdfast.requests.placement import Placement
from holdfast.requests.plan import Bound, Ending
from holdfast.requests.plan import Deadlines as Bounds
from holdfast.requests.poison import Inquest
from holdfast.requests.router import Router
from holdfast.routing.admission import Admission
from holdfast.routing.config import AdmissionSettings
from holdfast.routing.kv import Knowledge, KvRouter
from holdfast.routing.policy import Policy, RouterMode
from holdfast.routing.saturation import THRESHOLD_NAMES, Thresholds
from holdfast.routing.thresholds import ThresholdBook

if TYPE_CHECKING:
    from holdfast.requests.generation import Generation
    from holdfast.requests.prefill_leg import PrefillLeg


class Observer(Protocol):
    """Counts what happens to streams. Must be quick and must not raise."""

    def attempt_started(self, generation: Generation) -> None:
        """An attempt goes out."""

    def attempt_sent(self, seconds: float) -> None:
        """It has been encoded and handed to the network, which took so long."""

    def accepted(self, generation: Generation, first: bool) -> None:
        """A worker owns the stream; ``first``: of this stream."""

    def first_token(self, generation: Generation) -> None:
        """The stream's very first tokens go out."""

    def progressed(self, generation: Generation) -> None:
        """Some thousand tokens more have gone out: a good moment to add them up."""

    def migration_started(self, generation: Generation, error: HoldfastError) -> None:
        """An attempt failed and another one will be made."""

    def migrated(self, generation: Generation, gap_seconds: float) -> None:
        """The first new token after a move; the gap counts from the failure."""

    def prefill_decided(self, generation: Generation, reason: Reason) -> None:
        """Where prefill workers are, it was decided where the prompt of an attempt is computed, and why."""

    def prefill_started(self, generation: Generation, leg: PrefillLeg) -> None:
        """A prompt goes out to a prefill worker."""

    def prefill_ended(
        self, generation: Generation, leg: PrefillLeg, error: HoldfastError | None, seconds: float
    ) -> None:
        """A prefill leg has handed its prompt over, or failed; not told of legs that nobody wanted any more."""

    def ended(self, generation: Generation, ending: Ending) -> None:
        """The terminal event."""


QUEUE_PLACES = 1024
"""Of the queue that `router_queue_threshold` switches on, unless its length is set."""


def _with_queue(settings: RequestSettings) -> AdmissionSettings:
    """Return the settings of admission, with the router's own threshold for waiting in them."""
    wanted, threshold = settings.admission, settings.router.router_queue_threshold
    if threshold is None and not settings.router.router_policy_config:
        return wanted
    if wanted.active_prefill_tokens_threshold_frac is None and threshold is not None:
        wanted = msgspec.structs.replace(wanted, active_prefill_tokens_threshold_frac=threshold)
    return msgspec.structs.replace(wanted, admission_queue_limit=wanted.admission_queue_limit or QUEUE_PLACES)


class Services:
    """The shared parts of the request lifecycle."""

    def __init__(
        self,
        settings: RequestSettings,
        pool: Pool,
        flusher: Flusher,
        observer: Observer,
        *,
        rng: random.Random,
        mode: RouterMode = "round-robin",
        knowledge: Knowledge | None = None,
    ):
        self.settings = settings
        self.flusher = flusher
        self.observer = observer
        self.rng = rng
        self.leases = LeaseBook()
        self.budget = RetryBudget()
        self.pacer = Pacer()
        self.inquest = Inquest(settings.migration_trial_tokens)
        wanted = _with_queue(settings)
        self.thresholds = ThresholdBook(
            f"{rng.getrandbits(64):016x}",
            Thresholds(**{name: getattr(wanted, name) for name in THRESHOLD_NAMES}),
        )
        self.admission = Admission(self.thresholds, enabled=wanted.admission_control != "none")
        self.policy = Policy(mode, rng)
        known = knowledge if mode == "kv" else None
        kv = (
            self._kv_router(known, track_blocks=settings.router.router_track_active_blocks)
            if known is not None
            else None
        )
        self.router = Router(self.policy, settings.router, kv)
        self.prefills = Prefills(
            settings.disagg,
            pool,
            Router(
                Policy(mode if mode != "direct" else "round-robin", rng),
                settings.router,
                self._kv_router(known, track_blocks=False) if known is not None else None,
                prefill=True,
            ),
            self.admission,
            self.leases,
            rng,
        )
        self.placement = Placement(
            pool,
            self.router,
            self.leases,
            max_waiting=settings.migration_max_waiting,
            admission=self.admission,
            settings=wanted,
            inquest=self.inquest,
        )
        self.thresholds.on_change = self.placement.line.offer
        self.deadlines = Deadlines(self.placement, settings.disagg.handoff_timeout)
        self._usual_bounds = self._bounds(None, None, None, None)

    def _kv_router(self, knowledge: Knowledge, *, track_blocks: bool) -> KvRouter:
        wanted = self.settings.router
        return KvRouter(
            knowledge,
            self.admission.ledger,
            self.rng,
            weights=wanted.weights,
            clock=self.flusher.clock,
            track_blocks=track_blocks,
            track_prefill=wanted.router_track_prefill_tokens,
            template_tokens=wanted.router_template_tokens,
        )

    def bounds(
        self,
        *,
        accept: float | None = None,
        first_token: float | None = None,
        inter_token: float | None = None,
        total: float | None = None,
    ) -> Bounds:
        """Return the deadlines of one request; arguments in seconds come from its headers and override settings."""
        if accept is None and first_token is None and inter_token is None and total is None:
            return self._usual_bounds
        return self._bounds(accept, first_token, inter_token, total)

    def _bounds(
        self, accept: float | None, first_token: float | None, inter_token: float | None, total: float | None
    ) -> Bounds:
        s = self.settings
        given: dict[Bound, float | None] = {
            "accept_hedge": accept if accept is not None and accept < s.accept_hedge_timeout else None,
            "accept": accept,
            "first_token": first_token,
            "inter_token": inter_token,
            "total": total,
        }
        return Bounds(
            accept_hedge=s.accept_hedge_timeout if accept is None else min(accept, s.accept_hedge_timeout),
            accept=s.accept_timeout if accept is None else accept,
            first_token=s.first_token_timeout if first_token is None else first_token,
            inter_token=s.inter_token_timeout if inter_token is None else inter_token,
            total=s.request_timeout if total is None else total,
            client_stall=s.client_stall_timeout,
            wait=s.migration_wait_secs,
            by_header=frozenset(name for name, value in given.items() if value is not None),
        )

    def close(self) -> None:
        """Let go of the pool."""
        self.placement.close()
