"""The supervisor with real processes and real signals: restarts, giving up, order of stopping, nothing left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from tests.patience import within

from holdfast.local.backoff import EXIT_CONFIGURATION, RestartPolicy
from holdfast.local.child import ChildSpec
from holdfast.local.supervisor import Supervisor

DEADLINE = 15.0
SLEEPER = "import time\nprint('up', flush=True)\ntime.sleep(600)"


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-S", "-c", code)


async def until(condition: Callable[[], object], what: str) -> None:
    async with asyncio.timeout(DEADLINE):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert condition(), what


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


class Running:
    """A supervisor under test, its lines and its task."""

    def __init__(self, *specs: ChildSpec):
        self.lines: list[tuple[str, str]] = []
        self.supervisor = Supervisor(specs, os.environ, relay=lambda slot, line: self.lines.append((slot, line)))
        self.task: asyncio.Task[int] | None = None

    @contextlib.asynccontextmanager
    async def started(self) -> AsyncIterator[Supervisor]:
        self.task = asyncio.create_task(self.supervisor.run())
        try:
            yield self.supervisor
        finally:
            self.supervisor.stop()
            self.supervisor.stop()
            await asyncio.wait_for(self.task, DEADLINE)


async def test_a_killed_child_is_started_again_at_once() -> None:
    running = Running(ChildSpec("worker-0", python(SLEEPER)))
    async with running.started() as supervisor:
        slot = supervisor.slots["worker-0"]
        await until(lambda: ("worker-0", "up") in running.lines, "first start")
        first = slot.pid
        assert first is not None
        loop = asyncio.get_running_loop()
        begin = loop.time()
        os.kill(first, signal.SIGKILL)
        await until(lambda: slot.pid not in (None, first), "restart")
        assert loop.time() - begin < within(1.0)
        assert slot.restarts == 1
        assert "killed by SIGKILL" in slot.last_exit
    assert slot.state == "stopped"


async def test_a_child_that_keeps_crashing_is_given_up_and_the_supervisor_says_so() -> None:
    policy = RestartPolicy(next_delay=0.01, intensity=3)
    running = Running(ChildSpec("worker-0", python("print('bad path'); raise SystemExit(3)"), restart=policy))
    async with running.started() as supervisor:
        assert running.task is not None
        assert await asyncio.wait_for(asyncio.shield(running.task), DEADLINE) == 1
        slot = supervisor.slots["worker-0"]
        assert slot.state == "gave-up"
        assert slot.restarts == 3
        assert "exit code 3" in slot.last_exit
        assert "bad path" in slot.last_exit


async def test_wrong_settings_are_not_tried_twice() -> None:
    running = Running(ChildSpec("worker-0", python(f"raise SystemExit({EXIT_CONFIGURATION})")))
    async with running.started() as supervisor:
        slot = supervisor.slots["worker-0"]
        await until(lambda: slot.state == "gave-up", "given up")
        assert slot.restarts == 0


async def test_a_program_that_does_not_exist_is_given_up() -> None:
    policy = RestartPolicy(next_delay=0.01, intensity=1)
    running = Running(ChildSpec("worker-0", ("/nowhere/at/all",), restart=policy))
    async with running.started() as supervisor:
        await until(lambda: supervisor.slots["worker-0"].state == "gave-up", "given up")
        assert "cannot be started" in supervisor.slots["worker-0"].last_exit


SLOW_STOPPER = """
import signal, sys, time
def stop(*_):
    print('draining', flush=True)
    time.sleep(0.3)
    print('gone', flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
print('up', flush=True)
time.sleep(600)
"""


async def test_stages_stop_one_after_the_other() -> None:
    running = Running(
        ChildSpec("worker-0", python(SLOW_STOPPER), stage=1), ChildSpec("frontend-0", python(SLOW_STOPPER), stage=0)
    )
    async with running.started() as supervisor:
        await until(lambda: sum(line == "up" for _, line in running.lines) == 2, "both up")
        supervisor.stop()
        assert running.task is not None
        assert await asyncio.wait_for(asyncio.shield(running.task), DEADLINE) == 0
    order = [(slot, line) for slot, line in running.lines if line != "up"]
    assert order == [("frontend-0", "draining"), ("frontend-0", "gone"), ("worker-0", "draining"), ("worker-0", "gone")]


STUBBORN = "import signal,time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('up', flush=True)\ntime.sleep(600)"


@pytest.mark.parametrize(("grace", "stops"), [(0.3, 1), (600.0, 2)], ids=["grace over", "second signal hurries"])
async def test_a_child_that_ignores_sigterm_is_killed(grace: float, stops: int) -> None:
    running = Running(ChildSpec("worker-0", python(STUBBORN), grace=grace))
    async with running.started() as supervisor:
        await until(lambda: ("worker-0", "up") in running.lines, "up")
        pid = supervisor.slots["worker-0"].pid
        assert pid is not None
        for _ in range(stops):
            supervisor.stop()
        assert running.task is not None
        await asyncio.wait_for(asyncio.shield(running.task), DEADLINE)
        assert not alive(pid)


HELPERS = """
import subprocess, sys, time
code = "import time; time.sleep(600)"
a = subprocess.Popen([sys.executable, "-S", "-c", code])
b = subprocess.Popen([sys.executable, "-S", "-c", code], start_new_session=True)
print("helpers", a.pid, b.pid, flush=True)
time.sleep(600)
"""


def helpers_in(lines: list[tuple[str, str]]) -> list[int]:
    return [int(word) for _, line in lines if line.startswith("helpers") for word in line.split()[1:]]


async def test_helpers_of_a_killed_child_go_with_it_even_from_their_own_session() -> None:
    running = Running(ChildSpec("worker-0", python(HELPERS)))
    async with running.started() as supervisor:
        slot = supervisor.slots["worker-0"]
        await until(lambda: helpers_in(running.lines), "helpers up")
        first, helpers = slot.pid, helpers_in(running.lines)
        assert first is not None
        os.kill(first, signal.SIGKILL)
        await until(lambda: len(helpers_in(running.lines)) == 4, "restarted with new helpers")
        await until(lambda: not any(alive(pid) for pid in helpers), "old helpers gone")
        helpers = helpers_in(running.lines)
    assert not any(alive(pid) for pid in helpers)


async def test_endless_lines_are_cut_instead_of_filling_memory() -> None:
    running = Running(ChildSpec("worker-0", python("import sys\nsys.stdout.write('x' * 300_000)\nprint('end')")))
    async with running.started():
        await until(lambda: any(line.endswith("end") for _, line in running.lines), "relayed")
    assert max(len(line) for _, line in running.lines) <= 2 * 64 * 1024
    assert sum(line.count("x") for _, line in running.lines) >= 300_000


SUPERVISOR_PROCESS = """
import asyncio, os, sys
from holdfast.local.child import ChildSpec
from holdfast.local.supervisor import Supervisor
argv = (sys.executable, "-S", "-c", sys.argv[1])
specs = [ChildSpec(f"worker-{i}", argv) for i in range(2)]
relay = lambda slot, line: print(line, flush=True)
asyncio.run(Supervisor(specs, os.environ, relay).run())
"""


async def test_after_sigkill_of_the_supervisor_no_process_is_left() -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SUPERVISOR_PROCESS, HELPERS, stdout=asyncio.subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    async with asyncio.timeout(DEADLINE):
        lines = [(await process.stdout.readline()).decode() for _ in range(2)]
    helpers = [int(word) for line in lines for word in line.split()[1:]]
    family = [process.pid, *descendants(process.pid)]
    assert len(helpers) == 4
    assert set(helpers) <= set(family)
    assert len(family) == 1 + 2 + 4 + 1, "supervisor, children, helpers, sentinel"
    process.kill()
    await process.wait()
    await until(lambda: not any(alive(pid) for pid in family), f"still alive: {[p for p in family if alive(p)]}")


def descendants(pid: int) -> list[int]:
    children = [
        int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit() and parent(int(entry.name)) == pid
    ]
    return [*children, *(d for child in children for d in descendants(child))]


def parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError):
        return -1


async def test_a_killed_sentinel_is_replaced_and_still_cleans_up() -> None:
    running = Running(ChildSpec("worker-0", python(SLEEPER)))
    async with running.started() as supervisor:
        await until(lambda: ("worker-0", "up") in running.lines, "up")
        sentinel = supervisor._sentinel
        assert sentinel is not None
        sentinel.kill()
        await until(lambda: supervisor._sentinel not in (None, sentinel), "replaced")
        pid = supervisor.slots["worker-0"].pid
        assert pid is not None
        assert alive(pid), "children outlive their sentinel"
