"""A directory of discovery records that exists only in a universe, and how each machine sees it.

Content is replaced, never changed, so that an old version can be shown to whoever is behind. Must never judge a lease.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path

import msgspec

from holdfast.runtime.discovery.directory import RecordDirectory, SupersededError
from holdfast.runtime.discovery.judge import Envelope, Listing, Stamp

KEPT_VERSIONS = 2_048
"""Old versions of the directory that can be shown."""


class _File:
    """One version of a record or tombstone."""

    __slots__ = ("data", "stamp")

    def __init__(self, data: bytes, stamp: Stamp):
        self.data, self.stamp = data, stamp


class _Version:
    """All files at one moment."""

    __slots__ = ("at", "entries_changed", "records", "tombstones")

    def __init__(self, at: float, entries_changed: int, records: dict[str, _File], tombstones: dict[str, _File]):
        self.at, self.entries_changed = at, entries_changed
        self.records, self.tombstones = records, tombstones


class Files:
    """The directory itself.

    Args:
        clock: virtual seconds.
    """

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self.now = _Version(0.0, 0, {}, {})
        """As it really is."""
        self.hidden: dict[str, tuple[float, frozenset[str]]] = {}
        """Until when a machine does not see which instances."""
        self.lag: dict[str, float] = {}
        """Seconds by which a machine is behind."""
        self._old: deque[_Version] = deque([self.now], KEPT_VERSIONS)
        self._views: dict[str, tuple[float, _Version]] = {}
        self._stamps = 0

    def freeze_view(self, host: str, until: float) -> None:
        """Show a machine what it sees now, until then."""
        self._views[host] = (until, self.seen_by(host))

    def seen_by(self, host: str) -> _Version:
        """Return the version that a machine sees."""
        if not self._views and not self.lag:
            return self.now
        frozen = self._views.get(host)
        if frozen is not None and self._clock() < frozen[0]:
            return frozen[1]
        self._views.pop(host, None)
        behind = self.lag.get(host, 0.0)
        if behind <= 0.0:
            return self.now
        horizon = self._clock() - behind
        return next((version for version in reversed(self._old) if version.at <= horizon), self._old[0])

    def hidden_from(self, host: str) -> frozenset[str]:
        """Return the instances that a machine does not see now."""
        until, hidden = self.hidden.get(host, (0.0, frozenset()))
        return hidden if self._clock() < until else frozenset()

    def put(self, instance: str, data: bytes, inode: int = 0) -> Stamp:
        """Write a record anew (without inode) or renew its time; a tombstone of it goes away."""
        self._stamps += 1
        stamp = Stamp(inode or self._stamps, self._stamps, len(data))
        records, tombstones = dict(self.now.records), self.now.tombstones
        records[instance] = _File(data, stamp)
        if instance in tombstones:
            tombstones = {name: file for name, file in tombstones.items() if name != instance}
        self._change(records, tombstones, entries=inode == 0)
        return stamp

    def bury(self, instance: str) -> None:
        """Turn a record into its tombstone."""
        records, tombstones = dict(self.now.records), dict(self.now.tombstones)
        file = records.pop(instance, None)
        if file is not None:
            tombstones[instance] = file
            self._change(records, tombstones)

    def lose(self, instance: str) -> None:
        """Delete a record."""
        if instance in self.now.records:
            records = {name: file for name, file in self.now.records.items() if name != instance}
            self._change(records, self.now.tombstones)

    def sweep(self, kind: str, name: str, stamp: Stamp) -> None:
        """Delete a file unless it changed."""
        records, tombstones = dict(self.now.records), dict(self.now.tombstones)
        files = records if kind == "record" else tombstones
        file = files.get(name)
        if file is not None and file.stamp == stamp:
            del files[name]
            self._change(records, tombstones)

    def _change(self, records: dict[str, _File], tombstones: dict[str, _File], *, entries: bool = True) -> None:
        changed = self.now.entries_changed + (1 if entries else 0)
        self.now = _Version(self._clock(), changed, records, tombstones)
        self._old.append(self.now)


class SimDirectory(RecordDirectory):
    """The directory as one machine sees it; stands in for the one on disk.

    Args:
        files: the directory.
        host: name of the machine.
        out: whether it cannot be reached now.
    """

    def __init__(self, files: Files, host: str, out: Callable[[], bool]):
        self.root = Path("simulated")
        self._files, self._host, self._out = files, host, out
        self._envelopes = msgspec.json.Decoder(Envelope)

    def _reach(self) -> Files:
        if self._out():
            raise OSError(5, "Input/output error")
        return self._files

    def prepare(self) -> None:
        """There is nothing to create."""

    def changed_ns(self) -> int:
        """Return what moves when an entry comes, goes or is replaced."""
        return self._reach().seen_by(self._host).entries_changed

    def list(self) -> Listing:
        """Look at every entry. Raises OSError during an outage."""
        files = self._reach()
        seen, hidden = files.seen_by(self._host), files.hidden_from(self._host)
        records = {name: file.stamp for name, file in seen.records.items() if name not in hidden}
        tombstones = {name: file.stamp for name, file in seen.tombstones.items() if name not in hidden}
        return Listing(records, tombstones, {})

    def read(self, instance: str, stamp: Stamp) -> Envelope | None:
        """Return a record in the version that this machine sees."""
        del stamp
        file = self._files.seen_by(self._host).records.get(instance)
        return None if file is None else self._envelopes.decode(file.data)

    def write(self, instance: str, data: bytes) -> Stamp:
        """Create or replace a record."""
        return self._reach().put(instance, data)

    def is_ours(self, instance: str, stamp: Stamp) -> bool:
        """Say whether the record is still the version that we wrote or touched last."""
        file = self._reach().now.records.get(instance)
        return file is not None and file.stamp == stamp

    def renew(self, instance: str, stamp: Stamp, data: bytes) -> Stamp:
        """Renew the lease of an own record. Raises FileNotFoundError and SupersededError as in production."""
        files = self._reach()
        file = files.now.records.get(instance)
        if file is None:
            raise FileNotFoundError(instance)
        if file.stamp != stamp and file.data != data:
            raise SupersededError(instance)
        return files.put(instance, data, inode=file.stamp.inode)

    def bury(self, instance: str) -> None:
        """Turn a record into its tombstone."""
        self._reach().bury(instance)

    def sweep(self, kind: str, name: str, stamp: Stamp) -> None:
        """Delete a file without an owner, unless it changed since it was judged."""
        if not self._out():
            self._files.sweep(kind, name, stamp)
