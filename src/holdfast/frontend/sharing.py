"""Thresholds that every frontend of a namespace shares, through discovery.

A frontend that knows of a changed threshold publishes everything it knows in a small record of its own, and takes over
what others publish; so a change survives the frontend at which it was made, as long as any of them lives. After the
last one the settings are in force again.

Must never judge a worker, nor be needed for a request: while discovery is away, changes hold here alone.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random

from holdfast.base.errors import HoldfastError
from holdfast.base.ids import draw_epoch, draw_instance_id
from holdfast.routing.thresholds import ThresholdBook
from holdfast.runtime.discovery.contract import Discovery, DiscoveryEvent, InstanceRecord

log = logging.getLogger(__name__)

COMPONENT = "frontend"
"""Component name of the records that frontends publish; they have no endpoints and no address."""


class SharedThresholds:
    """Call `run` in a task of its own; `changed` after a change made here."""

    def __init__(
        self, book: ThresholdBook, discovery: Discovery, namespace: str, rng: random.Random, *, system_address: str = ""
    ):
        """Create it.

        Args:
            book: this frontend's thresholds.
            discovery: started by its owner.
            namespace: whose frontends share.
            rng: draws this record's identity.
            system_address: of the status server; published from the start, so that it can be scraped.
        """
        self._system_address = system_address
        self._book = book
        self._discovery = discovery
        self._namespace = namespace
        self._instance = draw_instance_id(rng)
        self._epoch = draw_epoch(rng)
        self._news = asyncio.Event()

    async def run(self) -> None:
        """Take over what others know and publish what is new, until cancelled."""
        unsubscribe = self._discovery.subscribe(self._on_discovery)
        try:
            for record in self._discovery.snapshot():
                self._take(record)
            if self._system_address:
                self._news.set()
            while True:
                await self._news.wait()
                self._news.clear()
                await self._publish()
        finally:
            unsubscribe()

    def changed(self) -> None:
        """A threshold was changed at this frontend: tell the others."""
        self._news.set()

    def _on_discovery(self, event: DiscoveryEvent) -> None:
        if event.record is not None and event.kind in ("added", "changed"):
            self._take(event.record)

    def _take(self, record: InstanceRecord) -> None:
        foreign = record.component != COMPONENT or record.namespace != self._namespace
        if foreign or record.instance == self._instance:
            return
        if self._book.merge(record.meta):
            log.info("thresholds were changed at another frontend: %s", ", ".join(self._book.export()))
            self._news.set()

    async def _publish(self) -> None:
        record = InstanceRecord(
            namespace=self._namespace,
            component=COMPONENT,
            endpoints=(),
            instance=self._instance,
            epoch=self._epoch,
            address="",
            pid=os.getpid(),
            system_address=self._system_address or None,
            meta={**self._book.export()},
        )
        try:
            await self._discovery.publish(record)
        except HoldfastError as error:
            log.warning("changed thresholds hold at this frontend only: %s", error.message)
