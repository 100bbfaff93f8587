"""A worker dies with its owner, even when the owner had no chance to say so."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

from holdfast.base.lineage import OWNER_PID
from tests.worker.remote import CHILD

OWNER = """
import os, subprocess, sys
child = subprocess.Popen(sys.argv[1:], env={{**os.environ, {variable!r}: str(os.getpid())}}, stderr=subprocess.PIPE)
for line in child.stderr:
    if b"serves mock" in line:
        print(child.pid, flush=True)
"""


async def test_sigkill_of_the_owner_is_the_end_of_the_worker(tmp_path):
    code = "import logging; logging.basicConfig(level='INFO')\n" + CHILD.format(
        root=str(tmp_path), worker={}, mock={"step_ms": 2.0}
    )
    owner = subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-c", OWNER.format(variable=OWNER_PID), sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
    )
    pid = 0
    try:
        async with asyncio.timeout(20):
            pid = int(await asyncio.to_thread(owner.stdout.readline))
            owner.send_signal(signal.SIGKILL)
            while alive(pid):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    finally:
        owner.kill()
        owner.communicate()
        if pid and alive(pid):
            os.kill(pid, signal.SIGKILL)


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"
