"""A simulated engine behind each fake worker: steps, batched prefill, killers, freezes, restarts, bad manners."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from holdfast.base.errors import Disconnected, HoldfastError, PeerSilent
from tests.requests.fakes import FakeStream, FakeWorker, Fleet

STEP = 0.01

KillsAt = Callable[[FakeStream], bool]
"""Whether computing the next token of this stream kills the process."""


class Machine:
    """Drives one fake worker. The first token of an attempt takes one step of a batched prefill."""

    def __init__(
        self,
        worker: FakeWorker,
        *,
        kills: KillsAt = lambda _: False,
        restart_after: float | None = 0.5,
        prefill_batch: int = 8,
        accept_delay: float = 0.001,
        kills_at_door: bool = False,
    ):
        self.worker = worker
        self.kills = kills
        self.restart_after = restart_after
        self.prefill_batch = prefill_batch
        self.accept_delay = accept_delay
        self.kills_at_door = kills_at_door
        self.deaths = 0
        self.frozen = False
        self.step = STEP
        self.refuse: list[HoldfastError] = []
        self.spoil: list[Callable[[FakeStream], None]] = []
        """Applied to one running stream each, in the next step."""
        self.running: list[FakeStream] = []
        self._old: list[FakeStream] = []
        self._timer: asyncio.TimerHandle | None = None
        self._life = 0
        worker.on_open = self._opened

    @property
    def alive(self) -> bool:
        return self.worker.usable or self.frozen

    def _opened(self, stream: FakeStream) -> None:
        self._later(self.accept_delay, self._arrived, stream)

    def _later(self, seconds: float, call: Callable[..., None], *args: Any) -> asyncio.TimerHandle:
        life = self._life

        def run() -> None:
            if life == self._life:
                call(*args)

        return asyncio.get_running_loop().call_later(seconds, run)

    def _arrived(self, stream: FakeStream) -> None:
        if stream.over:
            return
        if self.frozen:
            self._old.append(stream)
            return
        if self.refuse:
            stream.refuse(self.refuse.pop())
            return
        if self.kills_at_door and self.kills(stream):
            self.die()
            return
        stream.accept()
        self.running.append(stream)
        if self._timer is None:
            self._timer = self._later(self.step, self._step)

    def _step(self) -> None:
        self._timer = None
        if self.frozen:
            return
        self.running = [s for s in self.running if not s.over]
        prefill = 0
        batch = []
        for stream in self.running:
            if len(stream.ids) == stream.begin:
                prefill += 1
                if prefill > self.prefill_batch:
                    continue
            if len(stream.ids) < stream.allowed:
                batch.append(stream)
        if any(self.kills(s) for s in batch):
            self.die()
            return
        while self.spoil and batch:
            self.spoil.pop()(batch.pop(0))
        with self.worker.fleet.read():
            for stream in batch:
                if stream.over:
                    continue
                stream.emit(1)
                if len(stream.ids) >= stream.request.stop.max_tokens:
                    stream.end("length", cached=1)
        if self.running:
            self._timer = self._later(self.step, self._step)

    def die(self) -> None:
        if not self.alive:
            return
        self.deaths += 1
        self._life += 1
        self.frozen = False
        self.running = []
        self._old = []
        self._timer = None
        self.worker.die(Disconnected(f"{self.worker.instance} was killed"))
        if self.restart_after is not None:
            asyncio.get_running_loop().call_later(self.restart_after, self._restart)

    def _restart(self) -> None:
        if not self.worker.usable:
            self.worker.restart()

    def freeze(self, seconds: float, found_after: float = 1.5) -> None:
        """Stop the process; the pool finds out; afterwards it says all that it had still to say."""
        if not self.worker.usable or self.frozen:
            return
        self.frozen = True
        self._old = list(self.running)
        self._later(found_after, self._found)
        self._later(seconds, self._thaw)

    def _found(self) -> None:
        if self.frozen:
            self.worker.die(PeerSilent(f"{self.worker.instance} is silent"))
            self.worker.fleet.deaths -= 1

    def _thaw(self) -> None:
        self.frozen = False
        old, self._old = self._old, []
        self.running = []
        with self.worker.fleet.read():
            for stream in old:
                index = len(stream.ids)
                stream.handler.on_tokens(index, stream.think(2), None)
        self.running = [s for s in old if not s.over]
        if not self.worker.usable:
            self.worker.usable = True
            self.worker.fleet.tell("state", self.worker)
        if self.running and self._timer is None:
            self._timer = self._later(self.step, self._step)


def machines(fleet: Fleet, **kwargs: Any) -> list[Machine]:
    return [Machine(worker, **kwargs) for worker in fleet.workers]
