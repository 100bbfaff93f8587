"""API keys from a file (``DYN_API_KEYS_FILE``): who may call.

One key per line; empty lines and lines that start with ``#`` are skipped. Only SHA-256 digests stay in
memory. A lookup goes by digest, so its timing says nothing about how much of a key was right, and ends in a
constant-time comparison. Must never log, return or raise with a key.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import stat
from pathlib import Path

from holdfast.base.errors import HoldfastError, Unauthenticated

log = logging.getLogger(__name__)

_FILE_BYTES = 4 * 1024 * 1024


class KeyFileUnusable(HoldfastError):
    """The file with the API keys is missing, readable by everybody, or holds no key."""

    code = "key_file_unusable"
    hint = "Correct the file that DYN_API_KEYS_FILE names: one key per line, mode 0600."


class KeyRing:
    """The keys of one file.

    Args:
        path: of the file.

    Raises:
        KeyFileUnusable: it can't be read, others than its owner and group may read it, or it holds no key.
    """

    __slots__ = ("_digests", "_seen", "path")

    def __init__(self, path: Path):
        self.path = path
        self._seen: tuple[int, ...] = ()
        self._digests: dict[bytes, bytes] = {}
        self._load()

    def __len__(self) -> int:
        return len(self._digests)

    def check(self, authorization: bytes | None) -> None:
        """Accept the value of an ``Authorization`` header, or raise.

        Raises:
            Unauthenticated: no header, not of the form ``Bearer <key>``, or not a known key.
        """
        if authorization is None:
            raise Unauthenticated("This server needs an API key and the request has none.")
        scheme, _, key = authorization.strip().partition(b" ")
        if scheme.lower() != b"bearer" or not key.strip():
            raise Unauthenticated("The Authorization header is not of the form 'Bearer <key>'.")
        digest = hashlib.sha256(key.strip()).digest()
        if not hmac.compare_digest(self._digests.get(digest, b""), digest):
            raise Unauthenticated("The API key is not known here.")

    def refresh(self) -> bool:
        """Read the file again if it has changed (by time, size or inode); blocks for a short read.

        A file that has become unusable is reported in the log and the keys in force stay.

        Returns:
            Whether new keys are in force.
        """
        try:
            if _identity(self.path.stat()) == self._seen:
                return False
            self._load()
        except (KeyFileUnusable, OSError) as error:
            log.warning("API keys not reloaded, the %d old ones stay in force: %s", len(self), error)
            return False
        log.info("API keys reloaded from %s: %d keys", self.path, len(self))
        return True

    def _load(self) -> None:
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                _check_mode(self.path, status)
                data = file.read(_FILE_BYTES + 1)
        except OSError as error:
            raise KeyFileUnusable(f"API key file {self.path} can't be read: {error.strerror}.") from error
        if len(data) > _FILE_BYTES:
            raise KeyFileUnusable(f"API key file {self.path} is over {_FILE_BYTES} bytes.")
        lines = [line.strip() for line in data.splitlines()]
        digests = [hashlib.sha256(line).digest() for line in lines if line and not line.startswith(b"#")]
        if not digests:
            raise KeyFileUnusable(f"API key file {self.path} holds no key; nobody could call.")
        self._digests = {digest: digest for digest in digests}
        self._seen = _identity(status)


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_mtime_ns, status.st_size, status.st_ino


def _check_mode(path: Path, status: os.stat_result) -> None:
    mode = stat.S_IMODE(status.st_mode)
    if not stat.S_ISREG(status.st_mode):
        raise KeyFileUnusable(f"API key file {path} is not a regular file.")
    if mode & 0o007:
        raise KeyFileUnusable(
            f"API key file {path} has mode {mode:04o}: everybody on this machine can use it. "
            f"Run 'chmod 600 {path}' (in Kubernetes: defaultMode: 0400 on the secret's volume)."
        )
    if mode & 0o070:
        log.warning("API key file %s has mode %04o: its group can use it; prefer 0600", path, mode)
