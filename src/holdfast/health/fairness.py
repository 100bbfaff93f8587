"""How long a thread may keep the interpreter while another one waits for it.

Threads of this process that must answer on time (status server, lease keeper) wait for the interpreter's lock
whenever the event loop computes. CPython asks the holder to let go only after the *switch interval* has passed
without any release. An event loop under full load releases the lock for microseconds at every system call and
takes it back before the waiting thread has woken, which starts that wait anew: with the default of 5 ms a
waiting thread was measured to starve for up to 3.8 s, with 0.1 ms for at most 19 ms (64 streams, engine
without delay, two cores). While no thread waits the setting costs nothing.

Must never do anything else to the interpreter.
"""

from __future__ import annotations

import sys

SWITCH_SECONDS = 1e-4


def let_threads_in() -> None:
    """Lower the interpreter's switch interval for this process; never raise it."""
    sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_SECONDS))
