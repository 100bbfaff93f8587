"""Leaves none of an engine's processes behind, however the worker that started them ends.

Engines start processes that outlive a killed parent (vLLM's do) and keep its memory, so that the next start finds
none. Everything an engine starts inherits a mark in its environment; a small guardian process waits on a pipe for the
worker's end and then kills whatever carries the mark. Run as a plain script, without any import of Holdfast, it is
there in milliseconds and stays small.

Must never kill while the worker lives, except when it asks for it (`Orphans.end`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time

MARK = "HOLDFAST_ENGINE_OF"
"""``MARK=<worker's pid>-<time>`` in the environment of every process that an engine starts."""
_KEEP_ENVIRONMENT = "SPT_NOENV"
"""Unless it is set, processes that rename themselves (setproctitle) overwrite what /proc shows of their environment."""
_TRACKER = b"multiprocessing.resource_tracker"
"""Belongs to the worker, not to its engine; it ends with the worker by itself."""
_ROUNDS = 250
_PAUSE_SECONDS = 0.02


class Orphans:
    """The processes of one engine, from before it starts until it is closed."""

    def __init__(self) -> None:
        self._mark = f"{os.getpid()}-{time.monotonic_ns()}"
        self._guardian: subprocess.Popen[bytes] | None = None

    def guard(self, directory: str = "") -> None:
        """Mark what this process starts from now on, and start the guardian. Linux only; elsewhere nothing happens.

        Args:
            directory: of the engine, to be removed with it; empty: none.
        """
        if not sys.platform.startswith("linux") or self._guardian is not None:
            return
        environment = {name: value for name, value in os.environ.items() if name != MARK}
        command = [sys.executable, "-I", "-S", "-E", __file__, self._mark, directory]
        self._guardian = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # a signal to the worker's group must not take its guardian too
        )
        os.environ[MARK] = self._mark
        os.environ[_KEEP_ENVIRONMENT] = "1"

    def pids(self) -> list[int]:
        """Return the engine's processes that live."""
        return marked(self._mark, spared=_TRACKER)

    def end(self) -> int:
        """Kill what is left of the engine, and let the guardian go; returns how many processes there were."""
        killed = kill_marked(self._mark, spared=_TRACKER) if self._guardian is not None else 0
        if os.environ.get(MARK) == self._mark:
            del os.environ[MARK]
        guardian, self._guardian = self._guardian, None
        if guardian is not None and guardian.stdin is not None:
            with contextlib.suppress(OSError):
                guardian.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                guardian.wait(_ROUNDS * _PAUSE_SECONDS)
        return killed


def marked(mark: str, spared: bytes = b"") -> list[int]:
    """Return the processes (this one excluded) that carry the mark, and not ``spared`` in their command line."""
    entry = f"{MARK}={mark}".encode()
    found = []
    try:
        names = os.listdir("/proc")  # noqa: PTH208  pathlib would triple the start-up time
    except OSError:
        return []
    for name in names:
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            with open(f"/proc/{name}/environ", "rb") as environ:  # noqa: PTH123
                present = environ.read().split(b"\0")
        except OSError:
            continue
        if entry in present and not (spared and spared in _command_line(name)):
            found.append(int(name))
    return found


def _command_line(pid: str) -> bytes:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as words:  # noqa: PTH123
            return words.read()
    except OSError:
        return b""


def kill_marked(mark: str, spared: bytes = b"") -> int:
    """Kill every process as `marked` finds them, and those that they start meanwhile; return how many there were."""
    killed: set[int] = set()
    for _ in range(_ROUNDS):
        pids = [pid for pid in marked(mark, spared) if not _is_zombie(pid)]
        if not pids:
            break
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        killed.update(pids)
        time.sleep(_PAUSE_SECONDS)
    return len(killed)


def _is_zombie(pid: int) -> bool:
    """Whether only its parent's wait is missing."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:  # noqa: PTH123
            return stat.read().rpartition(b")")[2].split()[0] == b"Z"
    except OSError:
        return True


def main(mark: str, directory: str) -> None:
    """Wait for the end of the worker, then kill and remove what it has left."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()
    kill_marked(mark, spared=_TRACKER)
    if directory:
        import shutil  # noqa: PLC0415  only now: until here it costs memory for nothing

        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main(*sys.argv[1:3])
