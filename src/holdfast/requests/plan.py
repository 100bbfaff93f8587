"""What one stream is to do, fixed before its first attempt, and how it ended.

Must never hold state that changes.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from holdfast.base.errors import HoldfastError
from holdfast.engines.contract import Sampling, StopRules
from holdfast.requests.states import State
from holdfast.routing.route import ANYWHERE, Route
from holdfast.telemetry.context import RequestContext

Join = Literal["none", "exact", "declared"]
"""``none``: no move after the first token; ``exact``: every continuation is token-exact; ``declared``: at least
one continuation may differ from what an undisturbed run would have said."""


Bound = Literal["accept_hedge", "accept", "first_token", "inter_token", "total", "client_stall", "wait"]
_KNOBS: dict[Bound, tuple[str, str]] = {
    "accept_hedge": ("DYN_ACCEPT_HEDGE_TIMEOUT", "x-holdfast-accept-timeout-ms"),
    "accept": ("DYN_ACCEPT_TIMEOUT", "x-holdfast-accept-timeout-ms"),
    "first_token": ("DYN_FIRST_TOKEN_TIMEOUT", "x-holdfast-first-token-timeout-ms"),
    "inter_token": ("DYN_INTER_TOKEN_TIMEOUT", "x-holdfast-inter-token-timeout-ms"),
    "total": ("DYN_REQUEST_TIMEOUT", "x-holdfast-timeout-ms"),
    "client_stall": ("DYN_CLIENT_STALL_TIMEOUT", ""),
    "wait": ("DYN_MIGRATION_WAIT_SECS", ""),
}
"""Of each bound: the setting, and the header of a request that goes before it."""


class Deadlines(msgspec.Struct, frozen=True):
    """Bounds in seconds for one stream; 0: none."""

    accept_hedge: float
    accept: float
    first_token: float
    inter_token: float
    total: float
    client_stall: float
    wait: float
    by_header: frozenset[Bound] = frozenset()
    """Those that the request itself has set."""

    def knob(self, bound: Bound) -> str:
        """Return what a bound was set by: the header when the request brought it, else the setting."""
        setting, header = _KNOBS[bound]
        return f"header {header}" if bound in self.by_header else setting


class Plan(msgspec.Struct, frozen=True):
    """One choice of one request. Lengths in tokens. A new field goes to the end: some make it by position."""

    request_id: str
    model: str
    prompt_ids: bytes
    """Little-endian u32."""
    prompt_length: int
    sampling: Sampling
    stop: StopRules
    context_length: int
    deadlines: Deadlines
    choice: int = 0
    label: str = ""
    traceparent: str = ""
    context: RequestContext | None = None
    """Whose log lines and spans these are."""
    prepared_seconds: float = 0.0
    """From the request's arrival to this plan; the bound on the whole request counts it."""
    priority: int = 0
    strict_priority: int = 0
    """Sorts before ``priority`` in this process's queue; workers are not told."""
    cache_salt: str | None = None
    """Keeps prefix caches of different owners apart."""
    lora: str | None = None
    """The adapter that ``model`` is, if it is one: blocks of different adapters are different."""
    terminal_ids: frozenset[int] = frozenset()
    """End-of-sequence and stop token ids that end this stream."""
    extra: dict[str, object] = {}
    route: Route = ANYWHERE
    """Its own wishes about workers."""


class Move(msgspec.Struct, frozen=True):
    """One move to another worker."""

    cause: str
    """Code of the error that ended the attempt."""
    at: int
    """Output index of the first token of the new attempt."""
    gap_seconds: float
    """From the failure to the first new token; 0 when none came."""


class Ending(msgspec.Struct, frozen=True):
    """The one terminal event of a stream (promise P2)."""

    state: State
    finish: str = ""
    """``stop``, ``length`` …; empty when ``error`` says it."""
    error: HoldfastError | None = None
    completion_tokens: int = 0
    cached_tokens: int = 0
    attempts: int = 0
    moves: tuple[Move, ...] = ()
    join: Join = "none"
