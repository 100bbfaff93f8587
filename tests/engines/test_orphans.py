"""What an engine starts does not outlive the worker that started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from holdfast.engines.orphans import MARK, Orphans, marked
from tests.patience import within

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

PARENT = """
import subprocess, sys, time
from holdfast.engines.orphans import Orphans
orphans = Orphans()
orphans.guard(sys.argv[1])
child = [sys.executable, "-c", "import os, subprocess, sys, time; os.setsid();"
         "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); time.sleep(600)"]
subprocess.Popen(child)
while len(orphans.pids()) < 2:
    time.sleep(0.01)
print(orphans._mark, flush=True)
time.sleep(600)
"""


def gone(mark: str) -> bool:
    until = time.monotonic() + within(3.0)
    while time.monotonic() < until:
        if not marked(mark):
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_children_and_grandchildren_go_with_a_killed_parent(number: signal.Signals, tmp_path: Path) -> None:
    place = tmp_path / "sockets"
    place.mkdir()
    (place / "socket").touch()
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(place)], stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        mark = parent.stdout.readline().strip()
        assert len(marked(mark)) == 2
        os.kill(parent.pid, number)
        parent.wait()
        assert gone(mark)
        until = time.monotonic() + within(3.0)
        while place.exists() and time.monotonic() < until:
            time.sleep(0.02)
        assert not place.exists()
    finally:
        parent.kill()
        parent.wait()


def test_end_kills_what_is_left_and_nothing_else() -> None:
    orphans = Orphans()
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        orphans.guard()
        orphans.guard()
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        orphans.end()
        assert child.wait(within(3.0)) == -signal.SIGKILL
        assert MARK not in os.environ
        assert bystander.poll() is None
        assert orphans.end() == 0
    finally:
        bystander.kill()
        bystander.wait()


def test_the_workers_own_resource_tracker_is_spared() -> None:
    orphans = Orphans()
    orphans.guard()
    code = "import time; time.sleep(600)  # from multiprocessing.resource_tracker import main"
    tracker = subprocess.Popen([sys.executable, "-c", code])
    try:
        assert orphans.pids() == []
        assert orphans.end() == 0
        assert tracker.poll() is None
    finally:
        tracker.kill()
        tracker.wait()
