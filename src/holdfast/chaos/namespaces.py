"""A network namespace for one worker: a network of two, whose cable can be cut, so that not even a SYN is answered.

A pair of virtual interfaces connects the namespace with this machine. A direction is cut by a wrong entry in the
sender's neighbour table: packets leave for a machine that does not exist. Needs root and the ``ip`` command.

Must never touch an interface, an address or a namespace that it did not make.
"""

from __future__ import annotations

import asyncio
import random
import shutil

from holdfast.base.errors import HoldfastError
from holdfast.chaos.proxy import Direction

_NOBODY = "02:00:00:00:de:ad"
"""A locally administered address that no interface here has."""


class CannotSeparate(HoldfastError):
    """No namespace could be made: not permitted, or the tool is missing. The message has its own words."""

    code = "cannot_separate"
    fault = "caller"
    status = 400
    hint = "Run as root, with iproute2 installed."


class Namespace:
    """See the module. `start`, and `close` in the end.

    Args:
        rng: for its name and its addresses (10.213.0.0/16), so that several do not meet.
    """

    def __init__(self, rng: random.Random):
        self.name = f"holdfast-{rng.getrandbits(24):06x}"
        self._outer, self._inner = f"hf{self.name[-6:]}o", f"hf{self.name[-6:]}i"
        network = rng.randrange(0, 1 << 14) * 4
        self.outside = f"10.213.{network >> 8}.{(network & 255) + 1}"
        """This machine's address, as the namespace sees it."""
        self.inside = f"10.213.{network >> 8}.{(network & 255) + 2}"
        """The namespace's address."""

    @property
    def prefix(self) -> tuple[str, ...]:
        """What to put before a command line that shall run inside."""
        return ("ip", "netns", "exec", self.name)

    async def start(self) -> None:
        """Make it. Raises CannotSeparate when that is not permitted here."""
        if shutil.which("ip") is None:
            raise CannotSeparate("There is no `ip` command on this machine.")
        await _ip("netns", "add", self.name)
        try:
            await _ip("link", "add", self._outer, "type", "veth", "peer", "name", self._inner)
            await _ip("link", "set", self._inner, "netns", self.name)
            await _ip("addr", "add", f"{self.outside}/30", "dev", self._outer)
            await _ip("link", "set", self._outer, "up")
            for words in (
                ("addr", "add", f"{self.inside}/30", "dev", self._inner),
                ("link", "set", self._inner, "up"),
                ("link", "set", "lo", "up"),
            ):
                await _ip("-n", self.name, *words)
        except CannotSeparate:
            await self.close()
            raise

    async def close(self) -> None:
        """Remove it; its processes must have ended."""
        await _ip("netns", "del", self.name, check=False)
        await _ip("link", "del", self._outer, check=False)

    async def cut(self, directions: tuple[Direction, ...] = ("in", "out")) -> None:
        """Let no packet pass any more in these directions."""
        for direction in directions:
            await _ip(*self._neighbour(direction, "replace"), "lladdr", _NOBODY, "nud", "permanent")

    async def mend(self, directions: tuple[Direction, ...] = ("in", "out")) -> None:
        """Let packets pass again."""
        for direction in directions:
            await _ip(*self._neighbour(direction, "del"), check=False)

    def _neighbour(self, direction: Direction, do: str) -> tuple[str, ...]:
        if direction == "in":
            return ("neigh", do, self.inside, "dev", self._outer)
        return ("-n", self.name, "neigh", do, self.outside, "dev", self._inner)


async def _ip(*words: str, check: bool = True) -> None:
    process = await asyncio.create_subprocess_exec(
        "ip", *words, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
    )
    _, said = await process.communicate()
    if check and process.returncode:
        raise CannotSeparate(f"`ip {' '.join(words)}` failed: {said.decode('utf-8', 'replace').strip()}")
