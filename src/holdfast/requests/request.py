"""A client's request: one or more streams that live and are cancelled together.

Must never know HTTP; the handler of a route creates it and awaits `run`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from holdfast.base.errors import CapacityExhausted
from holdfast.base.limits import ACTIVE_REQUESTS
from holdfast.requests.generation import Generation, Output
from holdfast.requests.need import Party
from holdfast.requests.plan import Plan
from holdfast.requests.service import Services


class Request:
    """Create it, `run` it once, `cancel` it any time, also before `run`."""

    def __init__(self, services: Services, plans: Sequence[tuple[Plan, Output]]):
        """Create the streams; nothing is sent before `run`.

        Raises:
            CapacityExhausted: too many requests are alive in this process.
        """
        active = services.leases.held("request")
        if active >= ACTIVE_REQUESTS:
            raise CapacityExhausted(
                f"This frontend serves {active} requests at once, which is its limit.",
                retry_after=2.0,
                layer="frontend",
                knob="ACTIVE_REQUESTS",
                threshold=ACTIVE_REQUESTS,
                measured=active,
            )
        self._services = services
        self.streams = [Generation(plan, output, services) for plan, output in plans]
        if len(self.streams) > 1:
            party = Party(len(self.streams))
            for stream in self.streams:
                stream.need.party = party
        self.id = plans[0][0].request_id
        self.label = plans[0][0].label
        self.model = plans[0][0].model

    async def run(self) -> None:
        """Drive all streams to their ends."""
        services = self._services
        services.budget.deposit()
        leases = [services.leases.take("request")] + [services.leases.take("stream") for _ in self.streams]
        try:
            if len(self.streams) == 1:
                await self.streams[0].driver.run()
                return
            async with asyncio.TaskGroup() as group:
                for stream in self.streams:
                    group.create_task(stream.run())
        finally:
            for lease in leases:
                lease.release()

    def cancel(self, reason: str) -> None:
        """End all streams that have not ended; idempotent."""
        for stream in self.streams:
            stream.cancel(reason)
