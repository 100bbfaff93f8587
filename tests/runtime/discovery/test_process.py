"""A process is recognised by pid and start time, and judged only where that can be known."""

import os
import subprocess
import sys

import msgspec
import pytest

from holdfast.runtime.discovery.process import ProcessMark, is_dead, mark_of, this_host

pytestmark = pytest.mark.skipif(not this_host(), reason="needs /proc")


@pytest.fixture
def child():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.wait()


def test_a_live_process_is_not_dead_and_a_killed_one_is_even_before_it_is_reaped(child):
    mark = mark_of(child.pid)
    assert mark.pid == child.pid
    assert not is_dead(mark, this_host())
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert is_dead(mark, this_host()), "a zombie"
    child.wait()
    assert is_dead(mark, this_host())


def test_a_reused_pid_is_another_process(child):
    mark = mark_of(child.pid)
    assert is_dead(msgspec.structs.replace(mark, start=mark.start - 1), this_host())


def test_nobody_is_judged_from_another_machine_or_without_a_mark(child):
    mark = mark_of(child.pid)
    child.kill()
    child.wait()
    assert not is_dead(mark, "another boot/1")
    assert not is_dead(ProcessMark(), this_host())
    assert mark_of(0) == ProcessMark()
    assert mark_of(2**22 + 1) == ProcessMark()
