"""Discovery in a universe: one simulated directory of records, and what it can do wrong.

Every host's client runs production's own code for leases and judging (`runtime.discovery.file.Keeper` and
`StoreJudge`) on a directory that exists only here, so that *unknown*, expiry, tombstones and mass removals are decided
as in production. Must never tell a client anything that it could not have seen in the directory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

import msgspec

from holdfast.base.ids import InstanceId
from holdfast.runtime.discovery.contract import InstanceRecord
from holdfast.runtime.discovery.file import FileSettings, Keeper
from holdfast.runtime.discovery.judge import Envelope
from holdfast.runtime.discovery.process import ProcessMark
from holdfast.runtime.discovery.view import ViewedDiscovery, encode_record
from holdfast.sim.directory import Files, SimDirectory

if TYPE_CHECKING:
    from holdfast.sim.hosts import Host
    from holdfast.sim.world import World

FASTEST, SLOWEST = 2e-4, 2e-2
"""Seconds that a command takes."""


class SimDiscoveryServer:
    """The directory that all hosts share, and its faults.

    Args:
        world: its loop, tape and hosts.
        settings: of every client.
        sees_processes: all hosts are one machine: a killed process is noticed without waiting for its lease.
    """

    def __init__(self, world: World, settings: FileSettings | None = None, *, sees_processes: bool = False):
        self.world = world
        self.settings = settings or FileSettings()
        self.sees_processes = sees_processes
        self.files = Files(world.loop.time)
        self._out_until = 0.0
        self._out_for: dict[str, float] = {}

    def client(self, host: Host) -> SimDiscovery:
        """Return a participant for code on this host; not started."""
        return SimDiscovery(self, host)

    # -- faults ----------------------------------------------------------------------------------------

    def outage(self, seconds: float, hosts: Collection[str] = ()) -> None:
        """Nothing can be read or written for so long, by these machines or (none named) by anybody."""
        until = self.world.loop.now + seconds
        for name in hosts:
            self._out_for[name] = max(until, self._out_for.get(name, 0.0))
        if not hosts:
            self._out_until = max(until, self._out_until)
        self.world.note("discovery-outage", seconds=seconds, hosts=",".join(sorted(hosts)))

    def stale(self, host: Host, seconds: float) -> None:
        """For so long a machine sees the directory as it is now; what it writes itself goes through."""
        self.files.freeze_view(host.name, self.world.loop.now + seconds)
        self.world.note("discovery-stale", host=host.name, seconds=seconds)

    def lag(self, host: Host, seconds: float) -> None:
        """A machine sees every change so much later; 0 ends it."""
        self.files.lag[host.name] = seconds
        self.world.note("discovery-lag", host=host.name, seconds=seconds)

    def partial(self, host: Host, hidden: Collection[str], seconds: float) -> None:
        """For so long a machine does not see these instances; none at all ends it."""
        self.files.hidden[host.name] = (self.world.loop.now + seconds, frozenset(hidden))
        self.world.note("discovery-partial", host=host.name, hidden=",".join(sorted(hidden)), seconds=seconds)

    def lose(self, instance: str) -> None:
        """An entry vanishes without a word; a living owner writes it again."""
        self.files.lose(instance)
        self.world.note("discovery-lose", instance=instance)

    # -- for clients -----------------------------------------------------------------------------------

    def out(self, host: Host) -> bool:
        """Whether this host cannot reach the directory now."""
        now = self.world.loop.now
        return now < self._out_until or now < self._out_for.get(host.name, 0.0)

    def is_dead(self, mark: ProcessMark) -> bool:
        """Say whether a process is provably dead, as far as anybody can see."""
        if not self.sees_processes or not mark.host:
            return False
        host = self.world.hosts.get(mark.host)
        return host is None or host.incarnation != mark.pid or not host.alive

    def command_seconds(self) -> float:
        """Draw how long a command takes."""
        return self.world.tape.discovery.log_uniform(FASTEST, SLOWEST, "command")

    def look_offset(self, period: float) -> float:
        """Draw when within a period a client looks."""
        return self.world.tape.discovery.uniform(0.0, period, "when it looks")


class SimDiscovery(ViewedDiscovery):
    """A participant: what `FileDiscovery` does in a thread, it does by timers of its host."""

    def __init__(self, server: SimDiscoveryServer, host: Host):
        super().__init__()
        self._server, self._host = server, host
        directory = SimDirectory(server.files, host.name, lambda: server.out(host))
        self._keeper = Keeper(directory, server.settings, self._apply, server.is_dead)
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    async def start(self) -> None:
        """Begin to watch; afterwards there is a view."""
        await self._command(lambda: None)
        loop = self._server.world.loop
        first = self._server.look_offset(self._server.settings.glance)
        self._timer = loop.call_later(first, self._glance)

    async def publish(self, record: InstanceRecord) -> None:
        """Write the record and keep its lease alive."""
        encode_record(record)
        data = msgspec.json.encode(Envelope(record, ProcessMark(self._host.name, self._host.incarnation, 1)))
        await self._command(lambda: self._keeper.publish(record.instance, data))

    async def withdraw(self, instance: InstanceId) -> None:
        """Turn an own record into a tombstone."""
        await self._command(lambda: self._keeper.withdraw(instance))

    async def close(self) -> None:
        """Withdraw everything and stop watching."""
        if self._timer is None or self._closed:
            return
        self._closed = True
        await self._command(self._keeper.withdraw_all)
        self._timer.cancel()

    async def _command(self, command: Callable[[], None]) -> None:
        await asyncio.sleep(self._server.command_seconds())
        command()
        self._keeper.turn(self._server.world.loop.now, look=True)

    def _glance(self) -> None:
        loop = self._server.world.loop
        self._timer = loop.call_later(self._server.settings.glance, self._glance)
        self._keeper.turn(loop.now)
