"""Whether a process of this machine is still the one it was: pid plus start time.

A pid alone is reused; with its start time it names one process for as long as the machine is up. Zombies
count as dead: they answer nothing. Must never judge a process of another machine or pid namespace.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec


class ProcessMark(msgspec.Struct, frozen=True, omit_defaults=True):
    """One process, for ever."""

    host: str = ""
    """Boot id and pid namespace; empty where /proc does not tell."""
    pid: int = 0
    start: int = 0
    """Field 22 of /proc/<pid>/stat: clock ticks after boot."""


def this_host() -> str:
    """Return what tells this boot and pid namespace from all others, or an empty string."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return ""


def _stat_fields(pid: int) -> list[str]:
    """Return the fields of /proc/<pid>/stat from the third on (the second may hold blanks and brackets)."""
    text = Path(f"/proc/{pid}/stat").read_text()
    return text[text.rindex(")") + 2 :].split()


def mark_of(pid: int) -> ProcessMark:
    """Return the mark of a live process; without pid or /proc a mark that is never judged."""
    host = this_host()
    if pid <= 0 or not host:
        return ProcessMark()
    try:
        return ProcessMark(host, pid, int(_stat_fields(pid)[19]))
    except (OSError, ValueError, IndexError):
        return ProcessMark()


def is_dead(mark: ProcessMark, host: str) -> bool:
    """Say whether the process is provably dead; False also when that cannot be known from here.

    Args:
        mark: of the process in question.
        host: `this_host()` of the one who asks.
    """
    if not mark.host or mark.host != host:
        return False
    try:
        fields = _stat_fields(mark.pid)
        return fields[0] in ("Z", "X") or int(fields[19]) != mark.start
    except FileNotFoundError:
        return _no_such_process(mark.pid)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, IndexError):
        return False


def _no_such_process(pid: int) -> bool:
    """/proc may hide what belongs to others; the kernel's answer to signal 0 does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
