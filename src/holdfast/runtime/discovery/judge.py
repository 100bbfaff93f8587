"""Judges what a directory of records shows: which are there, which left, which may only seem to have left.

Time and directory listings are passed in. Leases are judged by the reader's own observation: a record whose
modification time stood still for the TTL of time in which the reader itself looked on schedule. Clocks of
different processes are never compared, and a reader that was frozen itself expires nobody.

A record that vanishes without a tombstone and without a provably dead process gets a moment to be created
again; when more than half of at least three leave like that, it is taken for a fault of the store, and they
stay in force, as *unknown*, for a bounded time.

Must never touch the file system.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import msgspec

from holdfast.runtime.discovery.contract import DiscoveryEvent, InstanceRecord
from holdfast.runtime.discovery.process import ProcessMark

LONGEST_STEP = 1.0
"""Seconds of silence that one look may add, however long ago the last look was."""


class Envelope(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a record file holds."""

    record: InstanceRecord
    owner: ProcessMark = ProcessMark()
    format: int = 1


class Stamp(NamedTuple):
    """What tells one version of a file from the next."""

    inode: int
    mtime_ns: int
    size: int


class Listing(NamedTuple):
    """One look at the directory: record files and tombstones by instance, and temporary files by name."""

    records: dict[str, Stamp]
    tombstones: dict[str, Stamp]
    temporary: dict[str, Stamp]


class JudgeSettings(msgspec.Struct, frozen=True):
    """Times in seconds."""

    ttl: float = 10.0
    """A record that is not touched for this long has no owner any more."""
    settle: float = 1.5
    """What vanished without a reason gets this long to be created again before it counts as removed."""
    mass_share: float = 0.5
    """More than this share of the records gone at once looks like a fault of the store …"""
    mass_floor: int = 3
    """… when there are at least this many."""
    mass_hold: float = 30.0
    """How long such records stay in force as unknown."""


class _Held:
    """A record in the view."""

    __slots__ = ("disputed_until", "envelope", "left_at", "reason", "silent", "stamp")

    def __init__(self, envelope: Envelope, stamp: Stamp):
        self.envelope = envelope
        self.stamp = stamp
        self.silent = 0.0
        self.left_at: float | None = None
        self.disputed_until: float | None = None
        self.reason = ""


class Verdict(NamedTuple):
    """What a look led to: events in order, and files without an owner as (kind, name, stamp)."""

    events: list[DiscoveryEvent]
    sweep: list[tuple[str, str, Stamp]]


class StoreJudge:
    """Turns successive listings into events. Feed it with `look`, from one thread."""

    def __init__(
        self,
        settings: JudgeSettings,
        read: Callable[[str, Stamp], Envelope | None],
        is_dead: Callable[[ProcessMark], bool],
    ):
        self._settings = settings
        self._read = read
        self._is_dead = is_dead
        self._held: dict[str, _Held] = {}
        self._litter: dict[tuple[str, str], tuple[Stamp, float]] = {}
        self._tombstones: dict[str, Stamp] = {}
        self._expired: dict[str, Stamp] = {}
        self._reachable = False
        self._was_reachable = False
        self._forgiving_until = 0.0
        self._last: float | None = None
        self._events: list[DiscoveryEvent] = []
        self._sweep: list[tuple[str, str, Stamp]] = []

    def look(self, now: float, listing: Listing | None) -> Verdict:
        """Judge one look.

        Args:
            now: seconds on a clock that never jumps back.
            listing: None when the directory could not be read.
        """
        step = 0.0 if self._last is None else min(now - self._last, LONGEST_STEP)
        self._last = now
        self._events, self._sweep = [], []
        self._note_reachable(now, listing is not None)
        if listing is not None:
            for name, stamp in listing.records.items():
                self._see(name, stamp, step)
            self._miss(now, listing)
            self._collect_litter(listing, step)
        self._bury_dead()
        if listing is not None:
            self._settle(now)
        return Verdict(self._events, self._sweep)

    def _note_reachable(self, now: float, reachable: bool) -> None:
        if reachable and not self._reachable:
            self._events.append(DiscoveryEvent("known"))
            if self._was_reachable:
                self._forgiving_until = now + self._settings.mass_hold
            self._was_reachable = True
        elif self._reachable and not reachable:
            self._events.append(DiscoveryEvent("unknown", reason="the directory cannot be read"))
        self._reachable = reachable

    def _see(self, name: str, stamp: Stamp, step: float) -> None:
        held = self._held.get(name)
        if held is None:
            self._meet(name, stamp)
            return
        if stamp == held.stamp:
            held.silent += step
            return
        held.stamp, held.silent = stamp, 0.0
        envelope = self._read(name, stamp)
        if held.left_at is not None:
            held.left_at = None
            if held.disputed_until is not None:
                held.disputed_until = None
                self._events.append(DiscoveryEvent("known", held.envelope.record))
        if envelope is not None and envelope != held.envelope:
            held.envelope = envelope
            self._events.append(DiscoveryEvent("changed", envelope.record))

    def _meet(self, name: str, stamp: Stamp) -> None:
        if self._expired.get(name) == stamp:
            return
        envelope = self._read(name, stamp)
        if envelope is None:
            return
        if self._is_dead(envelope.owner):
            self._sweep.append(("record", name, stamp))
            return
        self._held[name] = _Held(envelope, stamp)
        self._events.append(DiscoveryEvent("added", envelope.record))

    def _miss(self, now: float, listing: Listing) -> None:
        """Find the records that are no longer there, or no longer kept alive."""
        for name, held in list(self._held.items()):
            stamp = listing.records.get(name)
            if stamp is None and self._buried(name, held, listing.tombstones):
                self._remove(name, held, "withdrawn by its owner", purposeful=True)
            elif stamp is None and (held.left_at is None or held.stamp.inode):
                self._leave(held, now, "its entry vanished")
                held.stamp = Stamp(0, 0, 0)
            elif held.left_at is None and held.silent >= self._settings.ttl:
                self._leave(held, now, f"its lease was not renewed for {self._settings.ttl:g} s")
        self._tombstones = listing.tombstones
        self._expired = {name: stamp for name, stamp in self._expired.items() if listing.records.get(name) == stamp}

    def _buried(self, name: str, held: _Held, tombstones: dict[str, Stamp]) -> bool:
        """A withdrawal renames the record, so the tombstone is the same file, or a new one of a version unseen."""
        tombstone = tombstones.get(name)
        if tombstone is None:
            return False
        return tombstone.inode == held.stamp.inode or self._tombstones.get(name) != tombstone

    def _leave(self, held: _Held, now: float, reason: str) -> None:
        held.reason = reason
        if held.left_at is None:
            held.left_at = now
            if now < self._forgiving_until:
                self._dispute(held, self._forgiving_until)

    def _dispute(self, held: _Held, until: float) -> None:
        held.disputed_until = until
        self._events.append(DiscoveryEvent("unknown", held.envelope.record, reason=held.reason))

    def _bury_dead(self) -> None:
        for name, held in list(self._held.items()):
            if self._is_dead(held.envelope.owner):
                if held.stamp.inode:
                    self._sweep.append(("record", name, held.stamp))
                self._remove(name, held, f"its process {held.envelope.owner.pid} is dead")

    def _settle(self, now: float) -> None:
        """Decide about those that left without a proof: removed, or unknown for a while."""
        leaving = [(name, held) for name, held in self._held.items() if held.left_at is not None]
        total, settings = len(self._held), self._settings
        mass = total >= settings.mass_floor and len(leaving) > settings.mass_share * total
        for name, held in leaving:
            if held.disputed_until is not None:
                due = now >= held.disputed_until
            elif mass:
                self._dispute(held, now + settings.mass_hold)
                continue
            else:
                due = held.left_at is not None and now >= held.left_at + settings.settle
            if due:
                if held.stamp.inode:
                    self._expired[name] = held.stamp
                    self._sweep.append(("record", name, held.stamp))
                self._remove(name, held, held.reason)

    def _remove(self, name: str, held: _Held, reason: str, purposeful: bool = False) -> None:
        del self._held[name]
        self._events.append(DiscoveryEvent("removed", held.envelope.record, purposeful, reason))

    def _collect_litter(self, listing: Listing, step: float) -> None:
        """Find tombstones and half-written files that nobody touched for the TTL."""
        present = [("tombstone", name, stamp) for name, stamp in listing.tombstones.items()]
        present += [("temporary", name, stamp) for name, stamp in listing.temporary.items()]
        litter: dict[tuple[str, str], tuple[Stamp, float]] = {}
        for kind, name, stamp in present:
            known, silent = self._litter.get((kind, name), (stamp, -step))
            silent = silent + step if known == stamp else 0.0
            litter[kind, name] = (stamp, silent)
            if silent >= self._settings.ttl:
                self._sweep.append((kind, name, stamp))
        self._litter = litter
