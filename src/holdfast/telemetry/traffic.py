"""What this process has sent to and received from other processes of the fleet.

One counter for the whole process, because connections come and go. Must never be read by anything that decides.
"""

from __future__ import annotations


class Traffic:
    """Bytes and lost connections since the start."""

    __slots__ = ("errors", "received", "sent")

    def __init__(self) -> None:
        self.sent = 0
        self.received = 0
        self.errors = 0


TRAFFIC = Traffic()
