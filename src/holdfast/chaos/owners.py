"""Who is at the other end of a local connection: the process whose socket it is, read from /proc.

Must never look at processes that it was not asked about.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

_ESTABLISHED = "01"


def owner_of(port: int, to_port: int, pids: Mapping[str, int], proc: Path = Path("/proc")) -> str:
    """Return which of some processes has the connection from ``port`` to ``to_port`` on this machine.

    Args:
        port: the connection's own port at the process that opened it.
        to_port: where it was opened to.
        pids: processes to look at, by name.
        proc: where the system says so.

    Returns:
        The name, or an empty string when it is none of them, or cannot be seen.
    """
    inode = _inode(port, to_port, proc)
    if not inode:
        return ""
    wanted = f"socket:[{inode}]"
    return next((name for name, pid in pids.items() if _holds(proc / str(pid), wanted)), "")


def _inode(port: int, to_port: int, proc: Path) -> str:
    for table in ("net/tcp", "net/tcp6"):
        try:
            rows = (proc / table).read_text().splitlines()[1:]
        except OSError:
            continue
        for row in rows:
            columns = row.split()
            here, there = columns[1].rpartition(":")[2], columns[2].rpartition(":")[2]
            if (int(here, 16), int(there, 16)) == (port, to_port) and columns[3] == _ESTABLISHED:
                return columns[9]
    return ""


def _holds(process: Path, wanted: str) -> bool:
    try:
        entries = list((process / "fd").iterdir())
    except OSError:
        return False
    for entry in entries:
        try:
            if os.readlink(entry) == wanted:  # noqa: PTH115  not a path
                return True
        except OSError:
            continue
    return False
