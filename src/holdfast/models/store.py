"""A cache of model files by content: in memory, and in a private directory if one is given.

Content is checked against its SHA-256 whenever it enters and whenever it is read from disk; a corrupted file
is deleted and reported as absent, so that it is fetched again. Trouble with the disk costs the cache, never a
request. Must never fetch anything, and never trust a name that came from a peer.

Disk access blocks: call from a thread when a directory is in use. Safe to use from several threads, and the
directory from several processes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import stat
import tempfile
import threading
from collections import OrderedDict
from pathlib import Path

from holdfast.base.errors import PayloadTooLarge
from holdfast.base.limits import ARTIFACT_BYTES
from holdfast.models.card import Artifact, artifact_of

_log = logging.getLogger(__name__)
_SHA256 = re.compile(r"[0-9a-f]{64}")

MEMORY_BYTES = 64 * 1024 * 1024
DISK_BYTES = 1024 * 1024 * 1024


class ArtifactStore:
    """Files by content hash. Least recently used content leaves memory (and the directory) first."""

    def __init__(
        self, directory: Path | None = None, *, memory_bytes: int = MEMORY_BYTES, disk_bytes: int = DISK_BYTES
    ):
        """Create a store.

        Args:
            directory: keeps files over restarts; created with mode 0700. None, or a directory that others can
                write to: memory only.
            memory_bytes: bound of the content in memory. The most recent content stays even if it is larger.
            disk_bytes: bound of the content in the directory.
        """
        self._lock = threading.Lock()
        self._memory: OrderedDict[str, bytes] = OrderedDict()
        self._memory_bytes = 0
        self._memory_limit = memory_bytes
        self._disk_limit = disk_bytes
        self._directory = _private(directory) if directory is not None else None

    @property
    def directory(self) -> Path | None:
        """Where files are kept, or None."""
        return self._directory

    def put(self, data: bytes) -> Artifact:
        """Keep content and return its name.

        Raises:
            PayloadTooLarge: over `base.limits.ARTIFACT_BYTES`.
        """
        if len(data) > ARTIFACT_BYTES:
            raise PayloadTooLarge(
                f"A model file has {len(data)} bytes; the limit is {ARTIFACT_BYTES}.",
                limit=ARTIFACT_BYTES,
                actual=len(data),
            )
        artifact = artifact_of(data)
        self._remember(artifact.sha256, data)
        if self._directory is not None:
            self._write(self._directory, artifact, data)
        return artifact

    def accept(self, artifact: Artifact, data: bytes) -> bool:
        """Keep content that a peer sent for ``artifact``; False (and nothing kept) when it is not that content."""
        if len(data) != artifact.size or len(data) > ARTIFACT_BYTES or artifact_of(data) != artifact:
            _log.warning(
                "A worker sent %d bytes for model file %.12s that are not its content (%d bytes); dropped.",
                len(data),
                artifact.sha256,
                artifact.size,
            )
            return False
        self.put(data)
        return True

    def get(self, artifact: Artifact) -> bytes | None:
        """Return the content, or None when it has to be fetched."""
        with self._lock:
            data = self._memory.get(artifact.sha256)
            if data is not None:
                self._memory.move_to_end(artifact.sha256)
        if data is None and self._directory is not None:
            data = self._read(self._directory, artifact)
            if data is not None:
                self._remember(artifact.sha256, data)
        return data if data is not None and len(data) == artifact.size else None

    def _remember(self, name: str, data: bytes) -> None:
        with self._lock:
            if name in self._memory:
                self._memory.move_to_end(name)
                return
            self._memory[name] = data
            self._memory_bytes += len(data)
            while self._memory_bytes > self._memory_limit and len(self._memory) > 1:
                _, old = self._memory.popitem(last=False)
                self._memory_bytes -= len(old)

    def _read(self, directory: Path, artifact: Artifact) -> bytes | None:
        if not _SHA256.fullmatch(artifact.sha256):
            return None
        path = directory / artifact.sha256
        try:
            if path.stat().st_size > ARTIFACT_BYTES:
                data = b""
            else:
                data = path.read_bytes()
                os.utime(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            _log.warning("Cannot read cached model file %s: %s; it will be fetched again.", path, error)
            return None
        if artifact_of(data).sha256 == artifact.sha256:
            return data
        _log.warning("Cached model file %s is corrupted; deleted, it will be fetched again.", path)
        with contextlib.suppress(OSError):
            path.unlink()
        return None

    def _write(self, directory: Path, artifact: Artifact, data: bytes) -> None:
        path = directory / artifact.sha256
        try:
            if path.exists() and path.stat().st_size == len(data):
                return
            handle, name = tempfile.mkstemp(dir=directory, prefix=".partial-")
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                Path(name).replace(path)
            except OSError:
                with contextlib.suppress(OSError):
                    Path(name).unlink()
                raise
            self._sweep(directory, keep=artifact.sha256)
        except OSError as error:
            _log.warning("Cannot write model file to %s: %s; it stays in memory only.", path, error)

    def _sweep(self, directory: Path, keep: str) -> None:
        """Delete the least recently used files over the bound, and what interrupted writers left behind."""
        entries = []
        for path in directory.iterdir():
            with contextlib.suppress(OSError):
                entries.append((path.stat().st_mtime, path.stat().st_size, path))
        entries.sort(reverse=True)
        newest, total = entries[0][0], 0
        for modified, size, path in entries:
            total += size
            abandoned = path.name.startswith(".partial-") and modified < newest - 3_600
            surplus = total > self._disk_limit and path.name != keep and _SHA256.fullmatch(path.name)
            if abandoned or surplus:
                with contextlib.suppress(OSError):
                    path.unlink()


def _private(directory: Path) -> Path | None:
    """Create or check a directory that only this user may write to."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = directory.stat()
    except OSError as error:
        _log.warning("Model files are cached in memory only: cannot use %s: %s", directory, error)
        return None
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o022:
        _log.warning(
            "Model files are cached in memory only: %s is writable by others or not ours; chmod 0700 it.", directory
        )
        return None
    return directory
