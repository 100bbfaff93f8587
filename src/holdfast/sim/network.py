"""The simulated network: machines with addresses, listeners, connections, and faults between them.

`SimNetwork.transport` is what production code gets as its `runtime.transport.Transport`. The systems (kernels) of
machines act here by themselves, also for a process that is frozen or dead. Must never know what the bytes mean.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Iterator
from contextvars import copy_context
from typing import TYPE_CHECKING

from holdfast.base.errors import CannotConnect
from holdfast.runtime.transport import CannotListen, ProtocolFactory, is_loopback, join_address, split_address
from holdfast.sim.faces import Names
from holdfast.sim.links import SPLIT_FROM, NetworkSettings, Way
from holdfast.sim.streams import SimStream

if TYPE_CHECKING:
    from holdfast.sim.hosts import Host
    from holdfast.sim.world import World

ANY = "0.0.0.0"
FIRST_PORT = 40_000
SYN_RETRY = 1.0
"""Seconds after which a system tries again to reach one that did not answer."""


class SimListener:
    """An open port of a simulated machine (`runtime.transport.Listener`)."""

    def __init__(self, network: SimNetwork, host: Host, bound: str, port: int, factory: ProtocolFactory):
        self.address = join_address(bound, port)
        self.host, self.bound, self.port, self.factory = host, bound, port, factory
        self.backlog = 0
        """Connections that the system has accepted and the process not yet."""
        self._network = network

    def reachable_at(self, ip: str) -> bool:
        """Whether a connection to this address of the machine is for this listener."""
        return self.bound in (ANY, ip) or (is_loopback(self.bound) and is_loopback(ip))

    async def close(self) -> None:
        """Accept nothing more."""
        self._network.unlisten(self)


class SimTransport:
    """What code on one host sees of the network (`runtime.transport.Transport`)."""

    authenticates_callers = False

    def __init__(self, network: SimNetwork, host: Host):
        self._network, self._host = network, host

    async def connect(self, address: str, protocol_factory: ProtocolFactory, timeout: float) -> asyncio.Protocol:  # noqa: ASYNC109
        """Connect to ``host:port`` within ``timeout`` seconds. Raises CannotConnect with the reason."""
        ip, port = split_address(address)
        dial = Dial(self._network, self._host, ip, port)
        try:
            async with asyncio.timeout(timeout):
                stream = await dial.connected
        except TimeoutError:
            dial.give_up()
            raise CannotConnect(
                f"no connection to {address} within {timeout:g} s", address=address, threshold=timeout
            ) from None
        except OSError as error:
            raise CannotConnect(f"cannot connect to {address}: {error}", address=address) from error
        except BaseException:
            dial.give_up()
            raise
        protocol = protocol_factory()
        stream.begin(protocol, copy_context())
        return protocol

    async def listen(self, host: str, port: int, protocol_factory: ProtocolFactory) -> SimListener:
        """Listen; port 0 picks a free one. Raises CannotListen when the address cannot be bound."""
        return self._network.listen(self._host, host, port, protocol_factory)


class Dial:
    """One attempt of a machine's system to connect; goes on while the process is frozen."""

    def __init__(self, network: SimNetwork, host: Host, ip: str, port: int):
        self._network, self._host, self._ip, self._port = network, host, ip, port
        self.connected: asyncio.Future[SimStream] = network.loop.create_future()
        self._stream: SimStream | None = None
        self._target = network.machine(host, ip)
        self._there = network.way(host.name, self._target)
        self._back = network.way(self._target, host.name)
        self._cross(self._there, self._arrive)

    def give_up(self) -> None:
        """The process does not want it any more."""
        self.connected.cancel()
        if self._stream is not None:
            self._stream.protocol = asyncio.Protocol()
            self._stream.abort()

    def _cross(self, way: Way, then: object, again: float = 0.0) -> None:
        network = self._network
        when = way.arrival(network.loop.now, 60, network.choose(SPLIT_FROM, "jitter")) + again
        network.at(when, self._crossed, way, then)

    def _crossed(self, way: Way, then: object) -> None:
        if self.connected.done() or not self._host.alive:
            return
        if not way.open:
            self._retry()
        else:
            assert callable(then)
            then()

    def _retry(self) -> None:
        self._cross(self._there, self._arrive, again=SYN_RETRY * (1.0 - 0.5 * self._network.share("retry")))

    def _arrive(self) -> None:
        """The target's system sees the attempt."""
        network, target = self._network, network_host(self._network, self._target)
        if target is None or self._target in network.dark:
            return
        listener = network.listener(self._target, self._ip, self._port)
        if listener is None:
            self._cross(self._back, self._refused)
        elif listener.backlog >= network.settings.backlog:
            self._retry()
        else:
            self._cross(self._back, self._established)

    def _refused(self) -> None:
        self.connected.set_exception(ConnectionRefusedError(111, f"Connect call failed ('{self._ip}', {self._port})"))

    def _established(self) -> None:
        network = self._network
        listener = network.listener(self._target, self._ip, self._port)
        if listener is None or not listener.host.alive:
            self._refused()
            return
        if listener.backlog >= network.settings.backlog:
            self._retry()
            return
        self._stream = network.join(self._host, listener, self._ip, (self._there, self._back))
        self.connected.set_result(self._stream)


def network_host(network: SimNetwork, name: str) -> Host | None:
    """Return the machine's present incarnation, dead or alive; None: there never was one."""
    return network.world.hosts.get(name)


class SimNetwork:
    """See the module.

    Args:
        world: its loop, tape and hosts.
        settings: what links are like.
    """

    def __init__(self, world: World, settings: NetworkSettings | None = None):
        self.world, self.loop = world, world.loop
        self.settings = settings or NetworkSettings()
        self.choose = world.tape.network.choose
        self.dark: set[str] = set()
        """Machines without power."""
        self.bytes_carried = 0
        self.connections_made = 0
        self._ways: dict[tuple[str, str], Way] = {}
        self._listeners: dict[tuple[str, int], list[SimListener]] = {}
        self._ports: dict[str, int] = {}
        self._streams: dict[SimStream, None] = {}

    # -- for hosts -------------------------------------------------------------------------------------

    def transport(self, host: Host) -> SimTransport:
        """Return the network as code on this host sees it."""
        return SimTransport(self, host)

    def listen(self, host: Host, bound: str, port: int, factory: ProtocolFactory) -> SimListener:
        """Open a port. Raises CannotListen."""
        bound = "127.0.0.1" if bound == "localhost" else bound
        if bound not in (ANY, host.address) and not is_loopback(bound):
            raise self._cannot_listen(bound, port, "Cannot assign requested address")
        if port == 0:
            port = self._ports[host.name] = self._ports.get(host.name, FIRST_PORT - 1) + 1
        others = self._listeners.setdefault((host.name, port), [])
        if any(other.bound in (ANY, bound) or bound == ANY for other in others):
            raise self._cannot_listen(bound, port, "Address already in use")
        listener = SimListener(self, host, bound, port, factory)
        others.append(listener)
        return listener

    def _cannot_listen(self, bound: str, port: int, why: str) -> CannotListen:
        address = join_address(bound, port)
        return CannotListen(f"The wire protocol cannot listen on {address}: {why}.", address=address)

    def unlisten(self, listener: SimListener) -> None:
        """Close a port. Idempotent."""
        others = self._listeners.get((listener.host.name, listener.port), [])
        if listener in others:
            others.remove(listener)

    def listener(self, name: str, ip: str, port: int) -> SimListener | None:
        """Return who listens at an address of a machine."""
        others = self._listeners.get((name, port), ())
        return next((listener for listener in others if listener.reachable_at(ip)), None)

    def machine(self, host: Host, ip: str) -> str:
        """Return the name of the machine at an address, as this host sees it."""
        return host.name if is_loopback(ip) else self.world.named(ip)

    def join(self, host: Host, listener: SimListener, ip: str, ways: tuple[Way, Way]) -> SimStream:
        """Make the two ends of a connection and let the listener's process find it."""
        self.connections_made += 1
        number = self.connections_made
        self._ports[host.name] = port = self._ports.get(host.name, FIRST_PORT - 1) + 1
        names: Names = ((ip if is_loopback(ip) else host.address, port), (ip, listener.port))
        near = SimStream(self, host, ways[0], number, names)
        far = SimStream(self, listener.host, ways[1], number, (names[1], names[0]))
        near.peer, far.peer = far, near
        self._streams[near] = self._streams[far] = None
        listener.backlog += 1
        near.last_arrival = when = ways[0].arrival(self.loop.now, 60, 0)
        context = listener.host.context.copy()
        self.loop.schedule(listener.host, when, self._accept, (listener, far), context)
        return near

    def _accept(self, listener: SimListener, stream: SimStream) -> None:
        listener.backlog -= 1
        if not stream.lost:
            stream.begin(listener.factory(), copy_context())

    # -- for streams -----------------------------------------------------------------------------------

    def at(self, when: float, callback: object, *args: object) -> None:
        """Let something happen in the network itself."""
        assert callable(callback)
        self.loop.schedule(self.loop.world, when, callback, args, self.world.context)

    def share(self, what: str) -> float:
        """Draw a number between 0 (plain) and 1."""
        return self.world.tape.network.uniform(0.0, 1.0, what)

    def carried(self, stream: SimStream, data: bytes) -> None:
        """A process has read bytes: they count in the digest."""
        self.bytes_carried += len(data)
        self.loop.events.number(stream.number * 4294967296.0 + zlib.crc32(data))

    def forget(self, stream: SimStream) -> None:
        """One end of a connection is over."""
        self._streams.pop(stream, None)

    # -- links and faults ------------------------------------------------------------------------------

    def way(self, source: str, target: str) -> Way:
        """Return the way from one machine to another."""
        known = self._ways.get((source, target))
        if known is None:
            settings = self.settings
            if source == target:
                latency = settings.own
            else:
                latency = self.world.tape.network.log_uniform(settings.fastest, settings.slowest, "latency")
            known = self._ways[source, target] = Way(latency, settings)
        return known

    def _ways_between(self, a: str, b: str, one_way: bool) -> list[Way]:
        return [self.way(a, b)] if one_way else [self.way(a, b), self.way(b, a)]

    def _arriving_over(self, way: Way) -> list[SimStream]:
        return [stream for stream in self._streams if stream.peer.way is way]

    def partition(self, a: str, b: str, one_way: bool = False) -> None:
        """Hold what goes from ``a`` to ``b`` (and back, unless one way) until `heal` or `reset`."""
        for way in self._ways_between(a, b, one_way):
            if way.open:
                way.closed_at = self.loop.now
            way.holds += 1
        self.world.note("partition", a=a, b=b, one_way=one_way)

    def heal(self, a: str, b: str, one_way: bool = False) -> None:
        """End one partition between them; what it held arrives soon, in order."""
        for way in self._ways_between(a, b, one_way):
            way.holds = max(0, way.holds - 1)
            if way.open:
                self._flow(way)
        self.world.note("heal", a=a, b=b, one_way=one_way)

    def _flow(self, way: Way) -> None:
        for stream in self._arriving_over(way):
            wait = self.settings.longest_retransmit * self.share("retransmission after a partition")
            stream.held_until(self.loop.now + way.latency + wait)
            stream.heard_again()

    def delay(self, a: str, b: str, seconds: float, one_way: bool = False) -> None:
        """Make what is sent from now on this much later; 0 ends it."""
        for way in self._ways_between(a, b, one_way):
            way.extra = seconds
        self.world.note("delay", a=a, b=b, seconds=seconds, one_way=one_way)

    def reset(self, a: str, b: str) -> int:
        """Break every connection between two machines, for both ends; returns how many."""
        broken = [s for s in self._between(a, b) if not s.lost]
        for stream in broken:
            stream.cut()
        self.world.note("reset", a=a, b=b, ends=len(broken))
        return len({stream.number for stream in broken})

    def _between(self, a: str, b: str) -> Iterator[SimStream]:
        yield from [s for s in self._streams if {s.host.name, s.peer.host.name} == {a, b}]

    def connections(self, a: str, b: str) -> int:
        """Return how many connections two machines have open."""
        return len({stream.number for stream in self._between(a, b)})

    # -- the life of hosts -----------------------------------------------------------------------------

    def host_ended(self, host: Host, silent: bool) -> None:
        """A host has crashed: its ports are closed, and its connections unless the machine lost its power."""
        for listeners in self._listeners.values():
            for listener in [one for one in listeners if one.host is host]:
                listeners.remove(listener)
                host.keep(listener)
        if silent:
            self.dark.add(host.name)
        for stream in [s for s in self._streams if s.host is host]:
            host.keep(stream)
            if not silent:
                stream.killed(rudely=self.world.tape.network.chance(0.5, "reset by a killed process"))

    def host_booted(self, name: str) -> None:
        """A machine has started anew."""
        self.dark.discard(name)
        for stream in [s for s in self._streams if s.host.name == name and not s.host.alive]:
            stream.vanish()

    def close(self) -> None:
        """Forget everything; the universe is over."""
        self._streams.clear()
        self._listeners.clear()
