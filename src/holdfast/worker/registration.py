"""This worker's record in discovery: published once it is ready, and anew whenever what it says has changed.

Each publish replaces the whole record at once, so that nothing it offers is missed for a moment. Must never publish
after it was closed: a record that is withdrawn would come back.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import msgspec

from holdfast.base.errors import HoldfastError, WorkerDraining
from holdfast.models.card import ModelCard
from holdfast.runtime.discovery.contract import Discovery, InstanceRecord, InstanceState

log = logging.getLogger(__name__)


class Registration:
    """See the module.

    Args:
        discovery: started by its owner.
        record: what to publish first.
        state: how the worker is at this moment.
        published: told about each record that callers can see now.
    """

    def __init__(
        self,
        discovery: Discovery,
        record: InstanceRecord,
        state: Callable[[], InstanceState],
        published: Callable[[InstanceRecord], None],
    ):
        self.record = record
        """As it was published last."""
        self._discovery = discovery
        self._state = state
        self._published = published
        self._lock = asyncio.Lock()
        self._closed = False

    async def enter(self) -> None:
        """Let callers know for the first time. Raises what discovery raises."""
        async with self._lock:
            await self._publish(self.record)

    async def offer(self, cards: tuple[ModelCard, ...]) -> None:
        """Publish other cards.

        Raises:
            WorkerDraining: this worker is leaving.
            HoldfastError: it could not be published; callers see what they saw before.
        """
        async with self._lock:
            if self._closed:
                raise WorkerDraining("This worker is leaving; what it offers does not change any more.")
            await self._publish(msgspec.structs.replace(self.record, cards=cards))

    async def refresh(self) -> None:
        """Publish the state when it has changed between usable and not."""
        async with self._lock:
            state: InstanceState = "stalled" if self._state() == "stalled" else "ready"
            if self._closed or state == self.record.state:
                return
            try:
                await self._publish(msgspec.structs.replace(self.record, state=state))
            except HoldfastError as error:
                log.warning("the record could not be published as %s: %s", state, error.message)

    async def close(self) -> None:
        """Publish nothing from now on; returns when nothing is under way."""
        self._closed = True
        async with self._lock:
            pass

    async def _publish(self, record: InstanceRecord) -> None:
        await self._discovery.publish(record)
        self.record = record
        self._published(record)
