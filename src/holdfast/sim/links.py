"""The way from one machine to another: latency, jitter, bandwidth, and what stands in the way.

One `Way` per ordered pair of machines; connections between them share its bandwidth and its faults. Must never
reorder, drop or change bytes: that TCP delivers in order is a property of the network, not of chance.
"""

from __future__ import annotations

import msgspec

JITTERS = 4_096
"""Steps of jitter that a choice can name; those over `SPLIT_FROM` also split what is sent."""
SPLIT_FROM = 3_584


class NetworkSettings(msgspec.Struct, frozen=True):
    """What networks of a universe are like. Times in seconds."""

    fastest: float = 50e-6
    """Latency of the fastest link, one way …"""
    slowest: float = 2e-3
    """… and of the slowest."""
    own: float = 15e-6
    """Latency from a machine to itself."""
    jitter: float = 0.5
    """Share of a link's latency by which a delivery may be later."""
    bandwidth: float = 1.25e9
    """Bytes per second between two machines, one way."""
    window: int = 262_144
    """Bytes that the systems of both ends hold for a reader that does not read."""
    high_water: int = 65_536
    """Bytes waiting in the writer's process from which it is asked to pause …"""
    low_water: int = 16_384
    """… and from which it may go on."""
    longest_retransmit: float = 0.4
    """After a partition has healed the first bytes come within this."""
    backlog: int = 100
    """Connections that the system accepts for a process that does not."""


class Way:
    """See the module."""

    __slots__ = ("bandwidth", "closed_at", "extra", "free_at", "holds", "jitter", "latency")

    def __init__(self, latency: float, settings: NetworkSettings):
        self.latency = latency
        self.jitter = latency * settings.jitter / SPLIT_FROM
        """Seconds per step of jitter."""
        self.bandwidth = settings.bandwidth
        self.extra = 0.0
        """Seconds added by a fault."""
        self.holds = 0
        """Partitions that hold what goes this way."""
        self.closed_at = 0.0
        """When the first of them began: what had arrived until then is there."""
        self.free_at = 0.0
        """When the last byte sent so far has left."""

    @property
    def open(self) -> bool:
        """Whether bytes get through."""
        return self.holds == 0

    def arrival(self, now: float, size: int, jitter: int) -> float:
        """Return when bytes sent now arrive.

        Args:
            now: virtual seconds.
            size: bytes.
            jitter: steps of jitter.
        """
        begin = self.free_at if self.free_at > now else now
        self.free_at = left = begin + size / self.bandwidth
        return left + self.latency + self.extra + self.jitter * jitter
