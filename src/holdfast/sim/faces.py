"""What a simulated connection shows of itself to those who only ask: water marks, names, protocol, whether it is open.

Must never send, receive or end anything; that is `streams`' business.
"""

from __future__ import annotations

import asyncio
from typing import Any

Names = tuple[tuple[str, int], tuple[str, int]]


class Face(asyncio.Transport):
    """See the module.

    Args:
        names: own address and the peer's, as ``(host, port)``.
        low: bytes that may wait in the process when its protocol may write again.
        high: bytes above which its protocol is asked to pause.
    """

    __slots__ = ("_closing", "_high", "_low", "_reading", "_usual_high", "_waiting_bytes", "lost", "names", "protocol")

    protocol: asyncio.Protocol

    def __init__(self, names: Names, *, low: int, high: int):
        super().__init__()
        self.names = names
        self._low, self._high = low, high
        self._usual_high = high
        self._waiting_bytes = 0
        self._reading = False
        self._closing = False
        self.lost = False
        """This end is over."""

    def is_closing(self) -> bool:
        """Whether it is closed or about to be."""
        return self._closing or self.lost

    def get_write_buffer_size(self) -> int:
        """Bytes written and not yet taken by the system."""
        return self._waiting_bytes

    def get_write_buffer_limits(self) -> tuple[int, int]:
        """Return low and high water mark."""
        return self._low, self._high

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Set the water marks, in bytes."""
        self._high = self._usual_high if high is None else high
        self._low = self._high // 4 if low is None else low

    def is_reading(self) -> bool:
        """Whether it reads."""
        return self._reading and not self.is_closing()

    def can_write_eof(self) -> bool:
        """Half-closed connections are not simulated."""
        return False

    def get_protocol(self) -> asyncio.BaseProtocol:
        """Return whose callbacks are called."""
        return self.protocol

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Replace the protocol."""
        assert isinstance(protocol, asyncio.Protocol)
        self.protocol = protocol

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Return ``sockname`` or ``peername``; everything else is unknown here."""
        return {"sockname": self.names[0], "peername": self.names[1]}.get(name, default)

    def writelines(self, list_of_data: Any) -> None:
        """Send several pieces as one."""
        self.write(b"".join(list_of_data))
