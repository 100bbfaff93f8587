"""The directory behind the `file` backend: one file per record, and nothing in it is ever half written.

Layout: ``<instance>.json`` is a record, ``<instance>.gone`` the tombstone of one withdrawn on purpose (the same
file, renamed), ``.tmp_*`` a file being written. Records appear by rename, so that SIGKILL at any moment leaves
either the old or the new version. Must never judge leases, and never delete what it did not name itself.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat as stat_bits
from pathlib import Path
from urllib.parse import quote, unquote

import msgspec

from holdfast.base import limits
from holdfast.base.errors import InvalidRequest
from holdfast.runtime.discovery.judge import Envelope, Listing, Stamp

log = logging.getLogger(__name__)

RECORD_SUFFIX = ".json"
TOMBSTONE_SUFFIX = ".gone"
TEMPORARY_PREFIX = ".tmp_"


class SupersededError(Exception):
    """Another process has published the same instance since."""


class RecordDirectory:
    """All file system work of one participant; used from one thread."""

    def __init__(self, root: Path):
        self.root = root
        self._written = 0
        self._decoder = msgspec.json.Decoder(Envelope)
        self._unreadable: dict[str, Stamp] = {}

    def prepare(self) -> None:
        """Create the directory, for this user only, and refuse one that somebody else controls.

        Raises:
            InvalidRequest: it is not a directory, or belongs to another user.
            OSError: it cannot be created now.
        """
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = self.root.lstat()
        if stat_bits.S_ISLNK(status.st_mode):
            status = self.root.stat()
        if status.st_uid not in (os.geteuid(), 0):
            raise InvalidRequest(
                f"the discovery directory {self.root} belongs to user {status.st_uid}, not to you ({os.geteuid()}). "
                "Set DYN_FILE_KV to a directory of your own.",
                param="DYN_FILE_KV",
            )
        if status.st_mode & 0o002 and not status.st_mode & stat_bits.S_ISVTX:
            log.warning("anyone on this machine can write to the discovery directory %s; chmod 700 it", self.root)

    def changed_ns(self) -> int:
        """Return the modification time of the directory itself: moves when an entry comes, goes or is replaced."""
        return self.root.stat().st_mtime_ns

    def list(self) -> Listing:
        """Look at every entry. Raises OSError when the directory cannot be read."""
        listing = Listing({}, {}, {})
        with os.scandir(self.root) as entries:
            for entry in entries:
                name = entry.name
                if name.startswith(TEMPORARY_PREFIX):
                    target, key = listing.temporary, name
                elif name.endswith(RECORD_SUFFIX):
                    target, key = listing.records, unquote(name[: -len(RECORD_SUFFIX)])
                elif name.endswith(TOMBSTONE_SUFFIX):
                    target, key = listing.tombstones, unquote(name[: -len(TOMBSTONE_SUFFIX)])
                else:
                    continue
                with contextlib.suppress(FileNotFoundError):
                    target[key] = _stamp(entry.stat(follow_symlinks=False))
        for key in [key for key in self._unreadable if key not in listing.records]:
            del self._unreadable[key]
        return listing

    def read(self, instance: str, stamp: Stamp) -> Envelope | None:
        """Return a record, or None when it went away or cannot be understood (said once per version of the file)."""
        path = self._record(instance)
        known = self._unreadable.get(instance)
        if known is not None and known.inode == stamp.inode and known.size == stamp.size:
            return None
        try:
            if stamp.size > limits.DISCOVERY_RECORD_BYTES + 4096:
                self._skip(instance, stamp, f"it has {stamp.size} bytes")
                return None
            envelope = self._decoder.decode(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            self._skip(instance, stamp, str(error))
            return None
        if envelope.record.instance != instance:
            self._skip(instance, stamp, f"it speaks of instance {envelope.record.instance}")
            return None
        return envelope

    def _skip(self, instance: str, stamp: Stamp, why: str) -> None:
        self._unreadable[instance] = stamp
        log.warning("skipping the discovery record %s: %s", self._record(instance), why)

    def write(self, instance: str, data: bytes) -> Stamp:
        """Create or replace a record atomically, creating the directory if it went away."""
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._written += 1
        temporary = self.root / f"{TEMPORARY_PREFIX}{os.getpid()}_{id(self):x}_{self._written}"
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                stamp = _stamp(os.fstat(file.fileno()))
            temporary.rename(self._record(instance))
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        self._tombstone(instance).unlink(missing_ok=True)
        return stamp

    def is_ours(self, instance: str, stamp: Stamp) -> bool:
        """Say whether the record is still the version that we wrote or touched last."""
        try:
            return _stamp(self._record(instance).lstat()) == stamp
        except FileNotFoundError:
            return False

    def renew(self, instance: str, stamp: Stamp, data: bytes) -> Stamp:
        """Renew the lease of an own record.

        Works on the open file, so that a successor that replaces the record at this moment keeps its own lease.

        Args:
            stamp: the version that we wrote or touched last.
            data: what we wrote.

        Raises:
            FileNotFoundError: the record is gone.
            SupersededError: another process has published this instance since.
        """
        descriptor = os.open(self._record(instance), os.O_RDWR | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            if _stamp(os.fstat(descriptor)) != stamp and file.read() != data:
                raise SupersededError(instance)
            os.utime(descriptor)
            return _stamp(os.fstat(descriptor))

    def bury(self, instance: str) -> None:
        """Turn a record into its tombstone, in one step."""
        with contextlib.suppress(FileNotFoundError):
            self._record(instance).rename(self._tombstone(instance))

    def sweep(self, kind: str, name: str, stamp: Stamp) -> None:
        """Delete a file without an owner, unless it changed since it was judged."""
        path = self._path(kind, name)
        try:
            if _stamp(path.lstat()) == stamp:
                path.unlink()
                log.info("swept %s: nobody keeps it alive", path)
        except FileNotFoundError:
            pass
        except OSError as error:
            log.warning("cannot sweep %s: %s", path, error)

    def _path(self, kind: str, name: str) -> Path:
        if kind == "temporary":
            return self.root / name
        return self._record(name) if kind == "record" else self._tombstone(name)

    def _record(self, instance: str) -> Path:
        return self.root / (quote(instance, safe="") + RECORD_SUFFIX)

    def _tombstone(self, instance: str) -> Path:
        return self.root / (quote(instance, safe="") + TOMBSTONE_SUFFIX)


def _stamp(status: os.stat_result) -> Stamp:
    return Stamp(status.st_ino, status.st_mtime_ns, status.st_size)
