"""The sentinel: a helper process that leaves nothing behind when its supervisor dies, however it dies.

Runs as a plain script without any import of Holdfast, so that it starts in milliseconds and stays small.
It reads process groups from its standard input (``+123`` and ``-123`` lines). When that input ends, the
supervisor is gone: every known group gets SIGKILL, and then, where /proc exists, every process that
carries the supervisor's cookie in its environment, until none is left. Then it exits.

Must never act while the supervisor lives.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time

_ROUNDS = 100
_PAUSE_SECONDS = 0.02


def marked(*marks: bytes) -> list[int]:
    """Return the processes (this one excluded) whose environment holds all marks as whole entries."""
    found = []
    try:
        entries = os.listdir("/proc")  # noqa: PTH208  pathlib would triple the start-up time
    except OSError:
        return []
    for entry in entries:
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        try:
            with open(f"/proc/{entry}/environ", "rb") as environ:  # noqa: PTH123
                present = environ.read().split(b"\0")
        except OSError:
            continue
        if all(mark in present for mark in marks):
            found.append(int(entry))
    return found


def kill_marked(*marks: bytes) -> int:
    """Send SIGKILL to every process that carries all marks; return how many there were."""
    pids = marked(*marks)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    return len(pids)


def main(cookie: str) -> None:
    """Wait for the end of the input, then clean up."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    groups: set[int] = set()
    for line in sys.stdin:
        group = int(line[1:])
        if line[0] == "+":
            groups.add(group)
        else:
            groups.discard(group)
    for group in groups:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
    for _ in range(_ROUNDS):
        if not kill_marked(cookie.encode()):
            break
        time.sleep(_PAUSE_SECONDS)


if __name__ == "__main__":
    main(sys.argv[1])
