"""Rest: generation paused, or the engine asleep with its memory given back.

The worker leaves routing first: it is not ready and says why, callers send it nothing, and what they sent before they
knew is refused to be done elsewhere. It comes back when its engine has answered a canary.

Must never forget a stream: what runs when rest begins is kept, finished or moved, as the caller of the route asks.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from typing import Literal

from holdfast.base.errors import Conflict, EngineFailed
from holdfast.engines.abilities import Pausable, PauseMode, Sleepable
from holdfast.worker.host import EngineHost
from holdfast.worker.registration import Registration
from holdfast.worker.vitals import Vitals

log = logging.getLogger(__name__)

Kind = Literal["pause", "sleep"]
PATIENCE = 30.0
"""Seconds that running streams have to finish (mode ``wait``) unless the caller says otherwise."""
LETTING_GO = 10.0
"""Seconds within which an engine forgets sequences that were cancelled."""
_POLL = 0.02
CALL_SECONDS = 120.0
"""Bound on what the engine itself takes to rest or to come back: weights may have to be copied."""


class Rest:
    """Serves the routes; one change at a time."""

    def __init__(self, host: EngineHost, vitals: Vitals):
        self._host, self._vitals = host, vitals
        self._whys: dict[Kind, str] = {}
        self._lock = asyncio.Lock()
        self.registration: Registration | None = None

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """In which ways it rests now."""
        return tuple(self._whys)

    async def pause(self, engine: Pausable, mode: PauseMode = "abort", within: float = PATIENCE) -> int:
        """Generate nothing until `resume`; returns how many streams had to move elsewhere.

        Args:
            engine: the host's.
            mode: ``abort``: running streams move at once; ``wait``: they have ``within`` seconds to finish first;
                ``keep``: they stand still here, until their callers lose patience.
            within: seconds.
        """
        why = f"generation is paused (mode {mode}); /engine/resume_generation ends it"
        async with self._lock:
            rested = await self._begin("pause", why)
            try:
                moved = 0 if mode == "keep" else await self._emptied(mode, within, why)
                await _bounded(engine.pause_generation(mode), "pausing")
            except BaseException:
                if not rested:
                    await self._take_back("pause")
                raise
        log.info("worker rests: %s; %d streams moved", why, moved)
        return moved

    async def resume(self, engine: Pausable) -> None:
        """Go on. Raises EngineFailed when the engine then does not answer a canary; it is tried again by itself."""
        async with self._lock:
            await _bounded(engine.resume_generation(), "resuming")
            if await self._end("pause"):
                await self._prove("generation was resumed")

    async def sleep(
        self, engine: Sleepable, level: int = 1, mode: PauseMode = "abort", within: float = PATIENCE
    ) -> int:
        """Give memory back until `wake_up`; returns how many streams had to move elsewhere.

        Raises:
            Conflict: ``mode`` is ``keep``, or streams that were kept by a pause are still there.
            UnsupportedFeature: the engine can't at this level.
        """
        if mode == "keep":
            raise Conflict("An engine can't sleep with streams in it; use the mode abort or wait.", param="mode")
        why = f"the engine sleeps (level {level}); /engine/wake_up ends it"
        async with self._lock:
            rested = await self._begin("sleep", why)
            try:
                moved = await self._emptied(mode, within, why)
                await self._vitals.canary.still()
                await _bounded(_fall_asleep(engine, level), "going to sleep")
            except BaseException:
                if not rested:
                    await self._take_back("sleep")
                raise
        log.info("worker rests: %s; %d streams moved", why, moved)
        return moved

    async def wake_up(self, engine: Sleepable) -> None:
        """Take the memory again. Raises EngineFailed as `resume`."""
        async with self._lock:
            await _bounded(engine.wake_up(), "waking up")
            if await self._end("sleep"):
                await self._prove("the engine was woken up")

    async def _begin(self, kind: Kind, why: str) -> bool:
        """Return whether it rested in this way before."""
        rested = kind in self._whys
        self._whys[kind] = why
        await self._tell()
        return rested

    async def _end(self, kind: Kind) -> bool:
        """Return whether the worker works again because of it."""
        was = self._whys.pop(kind, None) is not None
        if was and not self._whys:
            self._vitals.canary.doubt("it has rested, and has answered no canary since")
        await self._tell()
        return was and not self._whys

    async def _take_back(self, kind: Kind) -> None:
        """It did not come to rest: work again at once if the engine answers, else as soon as it does."""
        if await self._end(kind):
            await self._vitals.canary.once()
            await self._tell()

    async def _tell(self) -> None:
        why = "; ".join(self._whys.values())
        self._host.offer.closed = why
        self._vitals.rest(why)
        if self.registration is not None:
            await self.registration.refresh()

    async def _emptied(self, mode: PauseMode, within: float, why: str) -> int:
        """Let streams finish if that is wished, and move what is left."""
        if mode == "wait":
            try:
                async with asyncio.timeout(within):
                    await self._host.idle()
            except TimeoutError:
                log.info("%d streams did not finish within %g s and move", self._host.in_flight, within)
        return self._host.send_elsewhere(f"This worker rests: {why}.")

    async def _prove(self, what: str) -> None:
        result = await self._vitals.canary.once()
        if self.registration is not None:
            await self.registration.refresh()
        if result.kind == "bad":
            raise EngineFailed(
                f"{what[0].upper()}{what[1:]}, but the canary failed: {result.why}. The worker gets no work; it is "
                "tested every second and comes back by itself when it answers."
            )
        log.info("worker works again: %s", what)


async def _fall_asleep(engine: Sleepable, level: int) -> None:
    """Put it to sleep as soon as it has let go of the sequences that were taken from it."""
    loop = asyncio.get_running_loop()
    until = loop.time() + LETTING_GO
    while True:
        try:
            return await engine.sleep(level)
        except Conflict:
            if loop.time() >= until:
                raise
        await asyncio.sleep(_POLL)


async def _bounded(step: Awaitable[None], what: str) -> None:
    try:
        async with asyncio.timeout(CALL_SECONDS):
            await step
    except TimeoutError as error:
        raise EngineFailed(f"The engine took more than {CALL_SECONDS:g} s for {what}.") from error
