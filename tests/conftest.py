"""What holds for every test, whoever started pytest."""

from __future__ import annotations

import signal


def pytest_sessionstart() -> None:
    """Let Ctrl-C reach the processes that tests start.

    A shell that starts pytest in the background has SIGINT ignored, and whatever is started inherits that. A handler of
    our own is reset to the default in every new program.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
