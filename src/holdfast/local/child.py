"""One child process: started in its own process group, its output relayed, nothing of it left behind.

Must never decide whether to start the child again; that is the supervisor's business.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections import deque
from collections.abc import Callable, Mapping

import msgspec

from holdfast.base.lineage import COOKIE, OWNER_PID, SLOT
from holdfast.local.backoff import RestartPolicy

log = logging.getLogger(__name__)

TAIL_LINES = 20
"""Last lines of output that are kept to explain a crash."""
_LINE_BYTES = 64 * 1024
_DRAIN_SECONDS = 0.5


class ChildSpec(msgspec.Struct, frozen=True):
    """What to run in one slot."""

    slot: str
    """Unique name, such as ``worker-0``; the prefix of its lines."""
    argv: tuple[str, ...]
    env: dict[str, str] = {}
    """Added to the supervisor's own environment."""
    stage: int = 0
    """Children are stopped stage by stage in ascending order: frontends (0) drain before workers (1)."""
    restart: RestartPolicy = RestartPolicy()
    grace: float = 30.0
    """Seconds between SIGTERM and SIGKILL when it is stopped in order."""
    fds: tuple[int, ...] = ()
    """File descriptors of the supervisor that the child inherits under the same number (listening sockets)."""
    orderly: frozenset[int] = frozenset({0})
    """Exit codes of a process that left because it was asked to."""


RelayLine = Callable[[str, str], None]
"""(slot, line without line feed)."""


class Child:
    """A running process of a slot."""

    def __init__(self, spec: ChildSpec, process: asyncio.subprocess.Process, output: int, marks: tuple[bytes, ...]):
        self.spec = spec
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        """The last lines of its output."""
        self.marks = marks
        """Entries in the environment of this process and all its descendants."""
        self._process = process
        self._output = output

    @property
    def pid(self) -> int:
        """Process id and process group id."""
        return self._process.pid

    @classmethod
    async def start(cls, spec: ChildSpec, cookie: str, environ: Mapping[str, str]) -> Child:
        """Start the process; `wait` relays its output.

        Raises:
            OSError: the program cannot be started.
        """
        marks = {COOKIE: cookie, SLOT: spec.slot}
        env = {**environ, **spec.env, OWNER_PID: str(os.getpid()), **marks}
        # a pipe of our own: asyncio's would make `wait` wait for helpers that hold its other end
        output, child_end = os.pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                *spec.argv,
                env=env,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=child_end,
                stderr=child_end,
                process_group=0,
                pass_fds=spec.fds,
            )
        except BaseException:
            os.close(output)
            raise
        finally:
            os.close(child_end)
        return cls(spec, process, output, tuple(f"{name}={value}".encode() for name, value in marks.items()))

    async def wait(self, relay: RelayLine) -> int:
        """Relay output until the process ends; return its exit code (negative: signal number)."""
        async with asyncio.TaskGroup() as tasks:
            relaying = tasks.create_task(self._relay(relay))
            code = await self._process.wait()
            # a helper that was left behind holds the pipe open; the group goes first, then the reader
            self.kill_group()
            await asyncio.wait([relaying], timeout=_DRAIN_SECONDS)
            relaying.cancel()
        return code

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process itself (not to its helpers)."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    def kill_group(self) -> None:
        """Send SIGKILL to the whole process group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    async def _relay(self, relay: RelayLine) -> None:
        reader = asyncio.StreamReader(limit=_LINE_BYTES)
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(self._output, "rb", 0)
        )
        rest = b""
        try:
            while data := await reader.read(_LINE_BYTES):
                *lines, rest = (rest + data).split(b"\n")
                if len(rest) > _LINE_BYTES:
                    lines, rest = [*lines, rest], b""
                for line in lines:
                    self._line(line, relay)
            if rest:
                self._line(rest, relay)
        finally:
            transport.close()

    def _line(self, raw: bytes, relay: RelayLine) -> None:
        line = raw.decode("utf-8", "replace").rstrip("\r")
        self.tail.append(line)
        relay(self.spec.slot, line)


def describe_exit(code: int) -> str:
    """Return an exit code in words: ``killed by SIGKILL`` or ``exit code 1``."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"
