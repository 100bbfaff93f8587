"""The workers as the request lifecycle needs them; `runtime.pool` has the real ones.

Must never hold behaviour.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from holdfast.base.errors import HoldfastError
from holdfast.models.card import ModelCard
from holdfast.routing.policy import Candidate
from holdfast.runtime.streams import StreamHandle, StreamHandler
from holdfast.wire.frames import OpenHeaders, Pong


class ServingWorker(Candidate, Protocol):
    """A worker as the request lifecycle needs it (`runtime.pool.Worker`)."""

    @property
    def epoch(self) -> int:
        """Of the running process."""

    @property
    def pong(self) -> Pong | None:
        """The last thing that it said of itself."""

    def card(self, model: str) -> ModelCard | None:
        """Return its card of that model."""

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
        """Start a stream. Raises TransportFault when there is no connection."""

    def report_failure(self, error: HoldfastError) -> None:
        """Count a fault of the worker or of the way to it; ignores all others."""

    def report_success(self) -> None:
        """A stream went well."""


class Pool(Protocol):
    """The workers as this process sees them (`runtime.pool.WorkerPool`)."""

    def usable(self, model: str) -> Sequence[ServingWorker]:
        """Return those that may get new work now."""

    def has_prefill(self, model: str) -> bool:
        """Return whether somebody computes prompts of a model for others, in whatever state."""

    def needs_prefill(self, model: str) -> bool:
        """Return whether somebody who serves a model computes no prompts of it, in whatever state."""

    def prefill(self, model: str) -> Sequence[ServingWorker]:
        """Return those that may get prompts now; none of them is ever among the usable ones."""

    def prefill_workers(self, model: str) -> Sequence[ServingWorker]:
        """Return those that compute prompts of a model for others, in whatever state."""

    def replacement_expected(self, model: str) -> bool:
        """Return whether it makes sense to wait for one."""

    def subscribe(self, callback: Callable[[str, object], None]) -> Callable[[], None]:
        """Call back on every change; returns the way to stop it."""
