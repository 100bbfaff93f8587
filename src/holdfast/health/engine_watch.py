"""Watches whether the engine is alive: its child processes by the kernel, its own check by asking.

An engine's word alone is not believed: one whose processes are gone is dead, whatever it says; so is one
whose check does not answer within its bound.

Must never end anything itself: it reports the death, once.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable

from holdfast.base.errors import EngineFailed, HoldfastError
from holdfast.engines.contract import Engine
from holdfast.health.config import CanaryConfig

log = logging.getLogger(__name__)

CHECK_FAILURES = 3
"""A check that raises something else than EngineFailed counts as death after so many times in a row."""


class EngineWatch:
    """See the module.

    Args:
        engine: started.
        on_dead: called once with the cause.
        config: how often and how patiently.
    """

    def __init__(self, engine: Engine, on_dead: Callable[[HoldfastError], None], config: CanaryConfig):
        self._engine = engine
        self._on_dead = on_dead
        self._config = config
        self._files: dict[int, int] = {}
        """pidfd by process id."""
        self._strange = 0
        self._dead = False

    async def run(self) -> None:
        """Watch until the engine is dead or the task is cancelled."""
        try:
            while not self._dead:
                self._watch_children()
                await asyncio.sleep(self._config.engine_health_check_interval)
                await self._check()
        finally:
            for pid in list(self._files):
                self._unwatch(pid)

    async def _check(self) -> None:
        bound = self._config.engine_health_check_timeout
        try:
            async with asyncio.timeout(bound):
                await self._engine.check()
        except TimeoutError:
            self._die(EngineFailed(f"the engine's check did not answer within {bound:g} s", threshold=bound))
        except EngineFailed as error:
            self._die(error)
        except Exception as error:
            self._strange += 1
            log.exception("the engine's check raised (%d of %d in a row)", self._strange, CHECK_FAILURES)
            if self._strange >= CHECK_FAILURES:
                self._die(EngineFailed(f"the engine's check keeps raising {type(error).__name__}: {error}"))
        else:
            self._strange = 0

    def _watch_children(self) -> None:
        """Watch processes that are new, forget those that the engine replaced on its own."""
        pids = set(self._engine.child_pids())
        for pid in self._files.keys() - pids:
            self._unwatch(pid)
        for pid in pids - self._files.keys():
            try:
                self._files[pid] = os.pidfd_open(pid)
            except ProcessLookupError:
                self._gone(pid)
                return
            except (OSError, AttributeError) as error:  # a platform without pidfd: the check has to do
                log.debug("process %d cannot be watched: %s", pid, error)
                continue
            asyncio.get_running_loop().add_reader(self._files[pid], self._gone, pid)

    def _gone(self, pid: int) -> None:
        self._unwatch(pid)
        self._die(EngineFailed(f"the engine's process {pid} is gone", pid=pid))

    def _unwatch(self, pid: int) -> None:
        file = self._files.pop(pid, None)
        if file is not None:
            asyncio.get_running_loop().remove_reader(file)
            os.close(file)

    def _die(self, error: HoldfastError) -> None:
        if not self._dead:
            self._dead = True
            self._on_dead(error)
