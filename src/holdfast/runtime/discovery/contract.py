"""What discovery promises: who is there, as far as the backend knows.

A backend reports *added*, *changed*, *removed* or *unknown*. Unknown is not dead: while the backend
cannot be reached the last view stays in force. What the data path sees (connection lost, pings
unanswered) overrules whatever stands here.

Must never decide whether a worker is healthy, and never talk to one.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Literal

import msgspec

from holdfast.base.ids import Epoch, InstanceId
from holdfast.models.card import ModelCard

InstanceState = Literal["starting", "warming", "ready", "saturated", "draining", "stopped", "stalled", "failed"]
"""The worker's own state machine (architecture, section 6)."""

EventKind = Literal["added", "changed", "removed", "unknown", "known"]
MetaValue = str | int | float | bool

SUPERVISOR = "supervisor"
"""Component name under which a supervisor publishes the state of its slots in ``meta``."""


class InstanceRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """One process that can be called. One record per instance; a new publish replaces the old one."""

    namespace: str
    component: str
    endpoints: tuple[str, ...]
    instance: InstanceId
    epoch: Epoch
    address: str
    """``host:port`` of the wire protocol; empty when it cannot be called (a supervisor's record)."""
    pid: int = 0
    """Process id on its own machine; 0: unknown, so that a crash is only seen when the lease ends."""
    system_address: str | None = None
    """``host:port`` of the status server."""
    state: InstanceState = "ready"
    cards: tuple[ModelCard, ...] = ()
    meta: dict[str, MetaValue] = {}
    """Small facts for other rooms. A supervisor puts ``<slot>: running|restarting|gave-up`` here, and facts about its
    slots under names with a dot."""


class DiscoveryEvent(msgspec.Struct, frozen=True):
    """One change of the view.

    ``unknown`` and ``known`` with ``record=None`` speak of the whole backend (unreachable, reachable
    again); with a record, of that one: it left the backend in a way that does not look like its own
    doing, so it stays in the view for a bounded time until it is ``known`` again or ``removed``.
    """

    kind: EventKind
    record: InstanceRecord | None = None
    purposeful: bool = False
    """Only with ``removed``: withdrawn by its owner, as opposed to crashed, swept or expired."""
    reason: str = ""


EventSink = Callable[[DiscoveryEvent], None]
"""Called on the event loop; must not block. An exception in it is logged and contained."""


class Discovery(abc.ABC):
    """One participant: publishes its own records and watches those of all."""

    @abc.abstractmethod
    async def start(self) -> None:
        """Begin to watch; afterwards `snapshot` holds what is there.

        An unreachable backend is no error: the view is empty, `reachable` False, and a later ``known`` tells.

        Raises:
            InvalidRequest: the settings can never work (a directory of somebody else, say).
        """

    @abc.abstractmethod
    async def publish(self, record: InstanceRecord) -> None:
        """Create or replace the record of ``record.instance`` and keep its lease alive in the background.

        Returns after the first attempt. If the backend is away, or the entry vanishes later (we were frozen and
        swept), it is created again within 2 s of being possible.

        Raises:
            PayloadTooLarge: the record is over `limits.DISCOVERY_RECORD_BYTES`.
        """

    @abc.abstractmethod
    async def withdraw(self, instance: InstanceId) -> None:
        """Remove an own record on purpose: watchers see a purposeful ``removed``. Unknown ids are ignored."""

    @abc.abstractmethod
    def snapshot(self) -> list[InstanceRecord]:
        """Return the view in force, own records included, ordered by instance id."""

    @abc.abstractmethod
    def subscribe(self, callback: EventSink) -> Callable[[], None]:
        """Call back on every change from now on; returns the way to stop it.

        What is already there is not replayed: take `snapshot` in the same step.
        """

    @property
    @abc.abstractmethod
    def reachable(self) -> bool:
        """Whether the backend answered the last time it was asked."""

    @abc.abstractmethod
    async def close(self) -> None:
        """Withdraw all own records on purpose and stop watching. Idempotent."""
