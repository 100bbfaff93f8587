"""Certificates that are replaced while a process runs: loaded anew when their files change, for later handshakes.

Connections that are open stay as they are. What cannot be used is reported and the old certificate stays in force; a
file that is written in two steps is simply looked at again. CA files are only ever added to: a CA that shall no longer
be believed needs a restart.

Must never make a listener lose the certificate that it has.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from pathlib import Path

log = logging.getLogger(__name__)

LOOK_SECONDS = 10.0
"""How often the files are looked at."""
_Stamp = tuple[tuple[int, int, int], ...]
_Named = tuple[str, str]
"""(setting, path)."""


class _Watched:
    """Files of one context, and what they were like when they were loaded."""

    def __init__(self, context: ssl.SSLContext, files: tuple[_Named, ...]):
        self.context = context
        self.files = files
        self.loaded = stamp(files)
        self.failed: _Stamp = ()
        """What they were like when they could not be loaded: that is said once."""

    @property
    def names(self) -> str:
        return ", ".join(f"{setting}={path}" for setting, path in self.files)


class Renewal:
    """See the module. Contexts are added while they are made, then `run` in a task."""

    def __init__(self, every: float = LOOK_SECONDS):
        self._every = every
        self._watched: list[_Watched] = []

    def __bool__(self) -> bool:
        return bool(self._watched)

    def watch_pair(self, context: ssl.SSLContext, cert: _Named, key: _Named) -> None:
        """Load certificate and key into a context again whenever one of the files changes."""
        self._watched.append(_Watched(context, (cert, key)))

    def watch_ca(self, context: ssl.SSLContext, ca: _Named) -> None:
        """Believe further CA certificates when they appear in the file."""
        self._watched.append(_Watched(context, (ca,)))

    async def run(self) -> None:
        """Look from time to time until cancelled."""
        while True:
            await asyncio.sleep(self._every)
            self.look()

    def look(self) -> None:
        """Load what has changed."""
        unusable: dict[str, str] = {}
        renewed: dict[str, None] = {}
        for one in self._watched:
            now = stamp(one.files)
            if now in (one.loaded, one.failed):
                continue
            try:
                _load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), one.files)  # first where it can do no harm
                _load(one.context, one.files)
            except (OSError, ssl.SSLError) as error:
                one.failed = now
                unusable[one.names] = str(getattr(error, "reason", None) or error)
            else:
                one.loaded = now
                renewed[one.names] = None
        for names, why in unusable.items():
            log.warning("changed files cannot be used, those loaded before stay in force: %s (%s)", names, why)
        for names in renewed:
            log.info("loaded anew, for connections from now on: %s", names)


def stamp(files: tuple[_Named, ...]) -> _Stamp:
    """Return what tells changed files from unchanged ones: inode, size, time of change; zeros for one that is away."""
    found = []
    for _, path in files:
        try:
            stat = Path(path).stat()
            found.append((stat.st_ino, stat.st_size, stat.st_mtime_ns))
        except OSError:
            found.append((0, 0, 0))
    return tuple(found)


def _load(context: ssl.SSLContext, files: tuple[_Named, ...]) -> None:
    paths = [path for _, path in files]
    if len(paths) == 1:
        context.load_verify_locations(paths[0])
    else:
        context.load_cert_chain(paths[0], paths[1], password=lambda: b"")
