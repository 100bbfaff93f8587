"""Discovery inside one process: for tests, simulation and single-process set-ups.

A `MemHub` is the store, each `MemDiscovery` a participant. The hub can be told to misbehave (`set_reachable`,
`lose`), so that the rooms above are proven against an absent or forgetful backend without any I/O.

Must never be used across threads or event loops.
"""

from __future__ import annotations

import asyncio

from holdfast.base.ids import Epoch, InstanceId
from holdfast.runtime.discovery.contract import DiscoveryEvent, InstanceRecord
from holdfast.runtime.discovery.view import ViewedDiscovery, encode_record

RECREATE_SECONDS = 1.0
"""How soon an owner notices that its entry vanished, as a lease keeper would."""

REMEMBERED_WITHDRAWALS = 4_096


class MemHub:
    """The store of one process."""

    def __init__(self, ttl: float = 10.0):
        self.ttl = ttl
        """Seconds that the records of a participant that was abandoned stay."""
        self.reachable = True
        self.records: dict[InstanceId, InstanceRecord] = {}
        self.withdrawn: dict[InstanceId, Epoch] = {}
        self.members: list[MemDiscovery] = []

    def put(self, record: InstanceRecord) -> None:
        """Create or replace a record."""
        self.withdrawn.pop(record.instance, None)
        self.records[record.instance] = record
        self._sync()

    def withdraw(self, record: InstanceRecord) -> None:
        """Remove on purpose, unless the slot has been taken over by another epoch."""
        held = self.records.get(record.instance)
        if held is None or held.epoch != record.epoch:
            return
        del self.records[record.instance]
        self.withdrawn[record.instance] = record.epoch
        while len(self.withdrawn) > REMEMBERED_WITHDRAWALS:
            del self.withdrawn[next(iter(self.withdrawn))]
        self._sync()

    def lose(self, instance: InstanceId) -> None:
        """Let an entry vanish, as an expired lease does; a living owner creates it again."""
        record = self.records.pop(instance, None)
        if record is None:
            return
        self._sync()
        for member in self.members:
            member.entry_lost(record)

    def set_reachable(self, reachable: bool) -> None:
        """Cut all participants off, or let them back in."""
        self.reachable = reachable
        if reachable:
            for member in list(self.members):
                member.republish()
        self._sync()

    def _sync(self) -> None:
        for member in list(self.members):
            member.sync_soon()


class MemDiscovery(ViewedDiscovery):
    """One participant of a `MemHub`."""

    def __init__(self, hub: MemHub):
        super().__init__()
        self._hub = hub
        self._own: dict[InstanceId, InstanceRecord] = {}
        self._unsent: set[InstanceId] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._sync_due = False
        self._timers: dict[InstanceId, asyncio.TimerHandle] = {}

    async def start(self) -> None:
        """Join the hub and take its present view."""
        self._loop = asyncio.get_running_loop()
        if self not in self._hub.members:
            self._hub.members.append(self)
        self._sync_now()

    async def publish(self, record: InstanceRecord) -> None:
        """Create or replace a record; kept for later while the hub is cut off."""
        encode_record(record)
        self._own[record.instance] = record
        if self._hub.reachable:
            self._hub.put(record)
        else:
            self._unsent.add(record.instance)

    async def withdraw(self, instance: InstanceId) -> None:
        """Remove an own record on purpose."""
        record = self._own.pop(instance, None)
        self._unsent.discard(instance)
        if record is not None:
            self._hub.withdraw(record)

    async def close(self) -> None:
        """Withdraw everything and leave the hub."""
        for instance in list(self._own):
            await self.withdraw(instance)
        self._leave()

    def abandon(self) -> None:
        """Vanish as a crashed process does: nothing is withdrawn, the records expire after the hub's TTL."""
        self._leave()
        for record in self._own.values():
            assert self._loop is not None
            self._loop.call_later(self._hub.ttl, self._expire, record)
        self._own.clear()

    def _expire(self, record: InstanceRecord) -> None:
        if self._hub.records.get(record.instance) is record:
            self._hub.lose(record.instance)

    def _leave(self) -> None:
        if self in self._hub.members:
            self._hub.members.remove(self)
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()

    def entry_lost(self, record: InstanceRecord) -> None:
        """Called by the hub: an entry vanished; if it was ours, create it again soon."""
        if self._own.get(record.instance) is record and self._loop is not None:
            self._timers[record.instance] = self._loop.call_later(RECREATE_SECONDS, self._recreate, record.instance)

    def _recreate(self, instance: InstanceId) -> None:
        self._timers.pop(instance, None)
        record = self._own.get(instance)
        if record is not None and self._hub.reachable and instance not in self._hub.records:
            self._hub.put(record)

    def republish(self) -> None:
        """Called by the hub when it is back: put what was published meanwhile."""
        for instance, record in list(self._own.items()):
            if instance in self._unsent or instance not in self._hub.records:
                self._hub.put(record)
        self._unsent.clear()

    def sync_soon(self) -> None:
        """Called by the hub: something changed; look in the next step of the loop."""
        if self._loop is not None and not self._sync_due:
            self._sync_due = True
            self._loop.call_soon(self._sync_now)

    def _sync_now(self) -> None:
        self._sync_due = False
        if self not in self._hub.members:
            return
        if not self._hub.reachable:
            if self._reachable:
                self._apply([DiscoveryEvent("unknown", reason="the in-process hub was cut off")])
            return
        if not self._reachable:
            self._apply([DiscoveryEvent("known")])
        self._apply(self._differences())

    def _differences(self) -> list[DiscoveryEvent]:
        held = self._hub.records
        events = []
        for instance, record in self._view.items():
            if instance not in held:
                purposeful = self._hub.withdrawn.get(instance) == record.epoch
                reason = "withdrawn" if purposeful else "lease ended"
                events.append(DiscoveryEvent("removed", record, purposeful, reason))
        for instance, record in held.items():
            known = self._view.get(instance)
            if known is None:
                events.append(DiscoveryEvent("added", record))
            elif known != record:
                events.append(DiscoveryEvent("changed", record))
        return events
