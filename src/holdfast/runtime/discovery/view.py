"""The view in force and its subscribers: what every backend shares.

Must never judge what an event means; it only applies it and passes it on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import msgspec

from holdfast.base import limits
from holdfast.base.errors import PayloadTooLarge
from holdfast.base.ids import InstanceId
from holdfast.runtime.discovery.contract import Discovery, DiscoveryEvent, EventSink, InstanceRecord

log = logging.getLogger(__name__)


class ViewedDiscovery(Discovery):
    """A `Discovery` whose view lives on the event loop and changes only through `_apply`."""

    def __init__(self) -> None:
        self._view: dict[InstanceId, InstanceRecord] = {}
        self._sinks: list[EventSink] = []
        self._reachable = False

    def snapshot(self) -> list[InstanceRecord]:
        """Return the view in force, ordered by instance id."""
        return [self._view[instance] for instance in sorted(self._view)]

    def subscribe(self, callback: EventSink) -> Callable[[], None]:
        """Call back on every change from now on; returns the way to stop it."""
        self._sinks.append(callback)

        def unsubscribe() -> None:
            if callback in self._sinks:
                self._sinks.remove(callback)

        return unsubscribe

    @property
    def reachable(self) -> bool:
        """Whether the backend answered the last time it was asked."""
        return self._reachable

    def _apply(self, events: Iterable[DiscoveryEvent]) -> None:
        """Bring the view up to date and tell the subscribers, in order."""
        for event in events:
            record = event.record
            if record is None:
                self._reachable = event.kind == "known"
            elif event.kind == "removed":
                self._view.pop(record.instance, None)
            else:
                self._view[record.instance] = record
            self._tell(event)

    def _tell(self, event: DiscoveryEvent) -> None:
        for sink in list(self._sinks):
            try:
                sink(event)
            except Exception:
                log.exception("a subscriber of discovery failed on a %r event; the others go on", event.kind)


def encode_record(record: InstanceRecord) -> bytes:
    """Return the record as JSON. Raises PayloadTooLarge over `limits.DISCOVERY_RECORD_BYTES`."""
    data = msgspec.json.encode(record)
    if len(data) > limits.DISCOVERY_RECORD_BYTES:
        raise PayloadTooLarge(
            f"the discovery record of instance {record.instance} has {len(data)} bytes, "
            f"the limit DISCOVERY_RECORD_BYTES is {limits.DISCOVERY_RECORD_BYTES}",
            limit=limits.DISCOVERY_RECORD_BYTES,
            actual=len(data),
        )
    return data
