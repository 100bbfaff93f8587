"""One end of a simulated TCP connection, as asyncio's transports behave.

What is written goes to the system as far as the window allows, and waits in the process otherwise; the reader's
system keeps it for a process that is frozen. Bytes come in the order in which they were sent, in pieces of any size.
Must never call a protocol from inside a call of that protocol, and never run anything on a host that is dead.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextvars import Context
from typing import TYPE_CHECKING, Any

from holdfast.sim.faces import Face, Names
from holdfast.sim.links import JITTERS, SPLIT_FROM, Way

if TYPE_CHECKING:
    from holdfast.sim.hosts import Host
    from holdfast.sim.network import SimNetwork

READ_BYTES = 262_144
"""The most that a process reads at once (asyncio's ``max_size``)."""
FIN = b""
"""In a row of pieces: the writer has finished."""
RST = None
"""In a row of pieces: the connection is no more."""


class SimStream(Face):
    """See the module.

    Args:
        network: it is part of.
        host: on which this end is.
        way: on which its bytes leave.
        number: of the connection.
        names: own address and the peer's, as ``(host, port)``.
    """

    __slots__ = (
        "_armed",
        "_context",
        "_flying",
        "_paused",
        "_unheard",
        "_waiting",
        "_window",
        "_writable_soon",
        "host",
        "incoming",
        "last_arrival",
        "network",
        "number",
        "peer",
        "way",
    )

    peer: SimStream

    def __init__(self, network: SimNetwork, host: Host, way: Way, number: int, names: Names):
        super().__init__(names, low=network.settings.low_water, high=network.settings.high_water)
        self.network, self.host, self.way = network, host, way
        self.number = number
        self.incoming: deque[tuple[float, bytes | None]] = deque()
        """On the way to this end, or waiting in its system: arrival and bytes."""
        self.last_arrival = 0.0
        """Of what this end has sent."""
        self._context = host.context
        self._flying = 0
        """Bytes that left this process and, as far as its system knows, were not read by the peer's."""
        self._unheard = 0
        """Bytes that were read, but the news of it is held by a partition."""
        self._waiting: deque[bytes] = deque()
        self._window = network.settings.window
        self._paused = False
        self._armed = False
        self._writable_soon = False

    # -- what the protocol's side calls ----------------------------------------------------------------

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send bytes, or keep them until the system takes them."""
        if self._closing or self.lost or not self.host.alive or not data:
            return
        size = len(data)
        if not self._waiting and self._flying + size <= self._window:
            self._flying += size
            self._transmit(bytes(data))
            return
        self._waiting.append(bytes(data))
        self._waiting_bytes += size
        self._send()
        if not self._paused and self._waiting_bytes > self._high:
            self._paused = True
            self.protocol.pause_writing()

    def close(self) -> None:
        """Close after everything written has gone out."""
        if not self._closing and not self.lost:
            self._closing = True
            if not self._waiting:
                self._finish()

    def abort(self) -> None:
        """Close now and forget what was not sent."""
        if not self.lost:
            self._closing = True
            self._waiting.clear()
            self._waiting_bytes = 0
            self._finish()

    def pause_reading(self) -> None:
        """Read nothing until `resume_reading`."""
        self._reading = False

    def resume_reading(self) -> None:
        """Read again."""
        if not self._reading:
            self._reading = True
            self.arm()

    # -- sending ---------------------------------------------------------------------------------------

    def _send(self) -> None:
        """Hand to the system what the window allows."""
        waiting, window = self._waiting, self._window
        while waiting and self._flying < window:
            data = waiting.popleft()
            room = window - self._flying
            if len(data) > room:
                waiting.appendleft(data[room:])
                data = data[:room]
            self._waiting_bytes -= len(data)
            self._flying += len(data)
            self._transmit(data)

    def _transmit(self, data: bytes) -> None:
        network = self.network
        drawn = network.choose(JITTERS, "jitter")
        if drawn < SPLIT_FROM or len(data) < 2:
            self._put(data, drawn if drawn < SPLIT_FROM else 0)
            return
        cut = 1 + network.choose(len(data) - 1, "split")
        self._put(data[:cut], 0)
        self._put(data[cut:], drawn - SPLIT_FROM)

    def _put(self, piece: bytes | None, jitter: int = 0) -> None:
        """Send a piece on its way; what comes to an end that is over is answered with a reset."""
        peer, way = self.peer, self.way
        arrival = way.arrival(self.network.loop.now, len(piece) if piece else 0, jitter)
        if arrival < self.last_arrival:
            arrival = self.last_arrival
        self.last_arrival = arrival
        if not peer.lost:
            peer.incoming.append((arrival, piece))
            peer.arm()
        elif piece and not self.lost:
            self.reset_at(arrival + peer.way.latency)

    def reset_at(self, when: float) -> None:
        """The peer's system will say, at this time, that it knows nothing of the connection."""
        if not self.lost and not (self.incoming and self.incoming[-1][1] is RST):
            last = self.incoming[-1][0] if self.incoming else 0.0
            self.incoming.append((max(when, last), RST))
            self.arm()

    def taken(self, size: int) -> None:
        """The peer's process has read so much; once we hear of it there is room for more."""
        if self.peer.way.holds:
            self._unheard += size
            return
        self._flying -= size
        if self._waiting and not self._writable_soon and not self.lost:
            self._writable_soon = True
            network = self.network
            when = network.loop.now + self.peer.way.latency
            network.loop.schedule(self.host, when, self._writable, (), self._context)

    def heard_again(self) -> None:
        """The way back is open: what was read meanwhile is known now."""
        size, self._unheard = self._unheard, 0
        if size:
            self.taken(size)

    def _writable(self) -> None:
        self._writable_soon = False
        if self.lost:
            return
        self._send()
        if self._paused and self._waiting_bytes <= self._low:
            self._paused = False
            self.protocol.resume_writing()
        if self._closing and not self._waiting and not self.lost:
            self._finish()

    # -- receiving -------------------------------------------------------------------------------------

    def begin(self, protocol: asyncio.Protocol, context: Context) -> None:
        """The process has taken the connection: from now on its protocol is called."""
        self.protocol, self._context = protocol, context
        protocol.connection_made(self)
        self.resume_reading()

    def arm(self) -> None:
        """See to it that what comes first is looked at when it is there."""
        incoming, way = self.incoming, self.peer.way
        if self._armed or not incoming or self.lost or (way.holds and incoming[0][0] > way.closed_at):
            return
        self._look_at(incoming[0][0])

    def _look_at(self, when: float) -> None:
        self._armed = True
        loop = self.network.loop
        loop.schedule(self.host, when if when > loop.now else loop.now, self._look, (), self._context)

    def held_until(self, when: float) -> None:
        """A partition is over: what it held comes at this time at the earliest."""
        closed_at = self.peer.way.closed_at
        self.incoming = deque((max(at, when) if at > closed_at else at, piece) for at, piece in self.incoming)
        self.peer.last_arrival = max(self.peer.last_arrival, when)
        self.arm()

    def _horizon(self) -> float:
        """What arrived until then is in our system."""
        way = self.peer.way
        return self.network.loop.now if way.open else way.closed_at

    def _look(self) -> None:
        """The process reads what its system has for it."""
        self._armed = False
        if self.lost:
            return
        if self._closing or not self._reading:
            self._look_for_reset()
            return
        data = self._arrived(self._horizon())
        if data:
            self.network.carried(self, data)
            self.peer.taken(len(data))
            if self.incoming:
                self.arm()
            self.protocol.data_received(data)
        elif self.incoming and self.incoming[0][0] <= self._horizon():
            self._ended(self.incoming[0][1])
        else:
            self.arm()

    def _arrived(self, horizon: float) -> bytes:
        """Take what arrived until then, up to a mark or as much as a process reads at once."""
        incoming = self.incoming
        if not incoming or incoming[0][0] > horizon or not incoming[0][1]:
            return b""
        data = incoming.popleft()[1]
        assert data is not None
        if not incoming or incoming[0][0] > horizon:
            return data
        pieces, size = [data], len(data)
        while incoming and incoming[0][0] <= horizon and size < READ_BYTES and incoming[0][1]:
            piece = incoming.popleft()[1]
            assert piece is not None
            pieces.append(piece)
            size += len(piece)
        return b"".join(pieces)

    def _ended(self, mark: bytes | None) -> None:
        if mark is RST:
            self.broken(ConnectionResetError(104, "Connection reset by peer"))
            return
        self.incoming.popleft()
        if not self.protocol.eof_received():
            self.close()
        self.arm()  # a reset may follow, for what we wrote and the peer will not read

    def _look_for_reset(self) -> None:
        """A process that does not read still learns that the connection is gone, when it writes."""
        for arrival, piece in self.incoming:
            if piece is RST:
                if arrival > self._horizon():
                    if self.peer.way.open:
                        self._look_at(arrival)
                elif self._waiting or self._closing:
                    self.broken(ConnectionResetError(104, "Connection reset by peer"))
                return

    # -- the end ---------------------------------------------------------------------------------------

    def _finish(self) -> None:
        """Closed by its own process: the process is told in its next iteration, the peer by the network."""
        if not self.lost:
            self._leave()
            self._tell(self.protocol.connection_lost, None)

    def broken(self, error: Exception) -> None:
        """The system says that the connection is gone."""
        if not self.lost:
            self._over()
            self._tell(self.protocol.connection_lost, error)

    def cut(self) -> None:
        """The network breaks the connection: what was on the way is lost, this end is told in a moment."""
        if not self.lost:
            horizon, when = self._horizon(), self.network.loop.now + self.peer.way.latency
            self.incoming = deque(entry for entry in self.incoming if entry[0] <= horizon)
            self.incoming.append((when, RST))
            self._look_at(when)

    def killed(self, rudely: bool) -> None:
        """The process is dead and its system closes the connection; nobody here is told.

        Args:
            rudely: with a reset, although everything was read.
        """
        if not self.lost:
            self._leave(rudely)

    def _leave(self, rudely: bool = False) -> None:
        unread = any(piece for _, piece in self.incoming)
        arrived = unread and self.incoming[0][0] <= self._horizon()
        if rudely or arrived:
            self._put(RST)
        else:
            self._put(FIN)
            if unread:
                self.peer.reset_at(self.incoming[-1][0] + self.way.latency)
        self._over()

    def _over(self) -> None:
        self.lost = True
        self._waiting.clear()
        self._waiting_bytes = 0
        self.incoming.clear()
        self.network.forget(self)

    def vanish(self) -> None:
        """The machine has started anew and knows nothing of this connection: whoever still writes is told so."""
        peer = self.peer
        self._over()
        if peer.unanswered:
            wait = self.network.settings.longest_retransmit * self.network.share(
                "retransmission to a restarted machine"
            )
            peer.reset_at(self.network.loop.now + 2 * self.way.latency + wait)

    @property
    def unanswered(self) -> bool:
        """Whether bytes are on the way that nobody has taken."""
        return self._flying > 0

    def _tell(self, callback: Callable[..., Any], *args: Any) -> None:
        self.network.loop.call_soon(callback, *args, context=self._context)
