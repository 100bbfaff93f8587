"""What one process sees of the discovery directory: the truth, nothing, an old state, or a part of it.

The process is given a path of its own that is a symbolic link, to the real directory as a rule. A fault points it
elsewhere, in one step. Must never touch the real directory or what is in it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import Collection
from pathlib import Path

_MIRROR_SECONDS = 0.1


class View:
    """See the module.

    Args:
        path: what the process is told; nothing may be there.
        real: the directory.
    """

    def __init__(self, path: Path, real: Path):
        self.path, self._real = path, real
        self._number = 0
        self._point_at(real)

    def restore(self) -> None:
        """Show the truth."""
        self._point_at(self._real)

    async def outage(self, seconds: float) -> None:
        """For so long nothing can be read or written: the path leads through a plain file."""
        blocked = self._aside()
        blocked.write_bytes(b"")
        await self._show(blocked / "nothing", seconds)

    async def stale(self, seconds: float) -> None:
        """For so long the process sees what there is now: no lease is renewed, nothing comes or goes."""
        old = self._aside()
        old.mkdir(mode=0o700)
        for entry in self._entries():
            with contextlib.suppress(FileNotFoundError):
                shutil.copy2(entry, old / entry.name)
        await self._show(old, seconds)

    async def partial(self, hidden: Collection[str], seconds: float) -> None:
        """For so long the process does not see the records of these instances."""
        part = self._aside()
        part.mkdir(mode=0o700)
        self._mirror(part, hidden)
        self._point_at(part)
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        try:
            while loop.time() < until:
                await asyncio.sleep(min(_MIRROR_SECONDS, max(0.0, until - loop.time())))
                self._mirror(part, hidden)
        finally:
            self.restore()

    async def _show(self, what: Path, seconds: float) -> None:
        self._point_at(what)
        try:
            await asyncio.sleep(seconds)
        finally:
            self.restore()

    def _aside(self) -> Path:
        self._number += 1
        return self.path.with_name(f"{self.path.name}.fault-{self._number}")

    def _entries(self) -> list[Path]:
        with contextlib.suppress(FileNotFoundError):
            return [entry for entry in self._real.iterdir() if not entry.name.startswith(".")]
        return []

    def _mirror(self, part: Path, hidden: Collection[str]) -> None:
        """Let ``part`` hold the same files: hard links, so that renewed leases show."""
        wanted = {entry.name: entry for entry in self._entries() if entry.name.partition(".")[0] not in hidden}
        for name, entry in wanted.items():
            with contextlib.suppress(FileNotFoundError):
                link = part / name
                if not link.exists() or not link.samefile(entry):
                    fresh = part / f".new-{name}"
                    fresh.unlink(missing_ok=True)
                    os.link(entry, fresh)
                    fresh.replace(link)
        for link in part.iterdir():
            if link.name not in wanted:
                link.unlink(missing_ok=True)

    def _point_at(self, where: Path) -> None:
        fresh = self.path.with_name(f"{self.path.name}.new")
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(where)
        fresh.replace(self.path)
