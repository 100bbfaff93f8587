"""An event loop whose clock jumps to the next timer instead of waiting for it."""

import asyncio
import selectors


class _JumpingSelector(selectors.SelectSelector):
    def __init__(self):
        super().__init__()
        self.now = 1000.0

    def select(self, timeout=None):
        ready = super().select(0)
        if not ready and timeout:
            self.now += timeout
        if not ready and timeout is None:
            raise RuntimeError("everything waits for something that never comes")
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """For code without sockets and threads."""

    def __init__(self):
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self):
        return self._jumping.now

    def jump(self, seconds):
        """Let the clock jump as it does when the loop is blocked."""
        self._jumping.now += seconds


def run(scenario):
    """Run a coroutine function on a virtual loop, within 600 virtual seconds."""
    loop = VirtualLoop()

    async def bounded():
        async with asyncio.timeout(600):
            return await scenario()

    try:
        return loop.run_until_complete(bounded())
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
