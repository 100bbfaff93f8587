"""Who owns this process, and how it makes sure not to outlive its owner.

A supervisor hands its children two variables. ``HOLDFAST_OWNER_PID`` lets the child ask the kernel to be
killed together with the owner (`die_with_owner`); ``HOLDFAST_COOKIE`` marks every descendant, so that the
supervisor's sentinel can find those that asked for nothing. Whoever spawns helpers of its own calls
`die_with_owner` in them with its own pid, or leaves them to the cookie.

Must never start or signal other processes.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import MutableMapping

OWNER_PID = "HOLDFAST_OWNER_PID"
COOKIE = "HOLDFAST_COOKIE"
SLOT = "HOLDFAST_SLOT"
"""Name of the slot that a process belongs to; with the cookie it finds the helpers of one crashed child."""
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_owner(env: MutableMapping[str, str]) -> None:
    """Have the kernel send SIGKILL to this process when its owner dies; exit at once if that has happened.

    The variable is taken out of ``env``: it speaks to this process, not to those that it may start. Does
    nothing when no owner is named, and on platforms other than Linux, where the sentinel does the work. The
    kernel watches the thread that started this process; owners start children from their main thread.
    """
    owner = env.pop(OWNER_PID, "")
    if not owner.isdigit() or not sys.platform.startswith("linux"):
        return
    import ctypes  # noqa: PLC0415  costs milliseconds that processes without an owner should not pay

    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(owner):
        os._exit(1)
