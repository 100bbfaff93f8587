"""What the mock engine can do beside generating: adapters, pausing, sleeping, an emptied cache.

An adapter has no weights: its name alone changes every token (`tokens`) and every block's hash. Paused, the engine
takes no step; asleep, it has lost its cache as well and refuses work.

Must never compute a token.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec

from holdfast.base.errors import Conflict, EngineFailed, InvalidRequest, NotFound
from holdfast.base.ids import SequenceKey
from holdfast.engines.abilities import Adapter, PauseMode
from holdfast.engines.contract import DeathSink, EngineInfo, GenerateRequest, LoadProgress, StepSink
from holdfast.engines.mock.config import MockConfig
from holdfast.engines.mock.engine import MockEngine

_POLL = 0.002


class Extras:
    """The state behind the abilities of one mock engine.

    Args:
        max_loras: adapters at once; 0: none.
    """

    __slots__ = ("_adapters", "_max_loras", "asleep", "paused")

    def __init__(self, max_loras: int):
        self._max_loras = max_loras
        self._adapters: dict[str, Adapter] = {}
        self.paused = False
        self.asleep = False

    @property
    def resting(self) -> bool:
        """Whether no step may begin."""
        return self.paused or self.asleep

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """Those that are loaded."""
        return tuple(self._adapters.values())

    def check(self, lora: str | None) -> None:
        """Raise unless a request with this adapter can be taken."""
        if self.asleep:
            raise EngineFailed("The mock engine sleeps and takes nothing.")
        if lora is not None and lora not in self._adapters:
            raise InvalidRequest(f"The mock engine has no adapter {lora!r}.", param="model")

    def load(self, adapter: Adapter) -> None:
        """Make one usable. Raises Conflict or InvalidRequest."""
        if adapter.name in self._adapters:
            raise Conflict(f"The mock engine has an adapter {adapter.name!r} already.")
        if len(self._adapters) >= self._max_loras:
            raise InvalidRequest(f"The mock engine has room for {self._max_loras} adapters (DYN_MOCK_MAX_LORAS).")
        self._adapters[adapter.name] = adapter

    def unload(self, name: str) -> None:
        """Forget one. Raises NotFound."""
        if self._adapters.pop(name, None) is None:
            raise NotFound(f"The mock engine has no adapter {name!r}.")


class Abilities:
    """Adaptable, Pausable, Sleepable, Clearable, for one engine or for all ranks of one alike."""

    parts: Sequence[AbleMock] = ()
    """Those that do it."""

    def adapters(self) -> tuple[Adapter, ...]:
        """See `abilities.Adaptable`."""
        return self.parts[0].extras.adapters

    async def load_adapter(self, adapter: Adapter) -> None:
        """See `abilities.Adaptable`."""
        for part in self.parts:
            part.extras.load(adapter)

    async def unload_adapter(self, name: str) -> None:
        """See `abilities.Adaptable`."""
        for part in self.parts:
            part.extras.unload(name)

    async def pause_generation(self, mode: PauseMode = "keep") -> None:
        """See `abilities.Pausable`."""
        for part in self.parts:
            if mode == "abort":
                part.abort_all()
            while mode == "wait" and part.in_hand:  # noqa: ASYNC110  rare, and a step has no event for it
                await asyncio.sleep(_POLL)
            part.extras.paused = True

    async def resume_generation(self) -> None:
        """See `abilities.Pausable`."""
        for part in self.parts:
            part.extras.paused = False
            part.go_on()

    async def sleep(self, level: int = 1) -> None:
        """See `abilities.Sleepable`."""
        if level not in (1, 2):
            raise InvalidRequest(f"The mock engine sleeps at level 1 or 2, not {level}.", param="level")
        in_hand = sum(part.in_hand for part in self.parts)
        if in_hand:
            raise Conflict(f"The mock engine can't sleep with {in_hand} sequences in hand.")
        for part in self.parts:
            part.extras.asleep = True
        await self.clear_cache()

    async def wake_up(self) -> None:
        """See `abilities.Sleepable`."""
        for part in self.parts:
            part.extras.asleep = False
            part.go_on()

    async def clear_cache(self) -> None:
        """See `abilities.Clearable`."""
        for part in self.parts:
            part.forget_prefixes()


class AbleMock(Abilities, MockEngine):
    """The mock engine with all abilities."""

    def __init__(self, config: MockConfig | None = None):
        super().__init__(config)
        self.extras = Extras(self.config.max_loras)
        self.parts = (self,)

    async def start(self, sink: StepSink, on_death: DeathSink, on_load: LoadProgress) -> EngineInfo:
        """See `Engine.start`."""
        info = await super().start(sink, on_death, on_load)
        can = msgspec.structs.replace(info.capabilities, lora=self.config.max_loras > 0)
        return msgspec.structs.replace(info, capabilities=can)

    def submit(self, key: SequenceKey, request: GenerateRequest) -> None:
        """Queue a sequence; see `Engine.submit`."""
        self.extras.check(request.lora)
        super().submit(key, request)

    def go_on(self) -> None:
        """Rest is over: take up the step that it interrupted, or begin the next."""
        if self._timer is None and not self._dead and not self.extras.resting:
            self._timer = self._loop.call_soon(self._finish if self._batch is not None else self._begin)

    def abort_all(self) -> None:
        """End all sequences without a reason of theirs."""
        sequences = [*self._scheduler.running.values(), *self._scheduler.waiting]
        steps = [self._ended(sequence, "abort", []) for sequence in sequences]
        if steps:
            self._sink(steps)

    def forget_prefixes(self) -> None:
        """Empty the cache of what nobody uses."""
        self._pool.clear()

    def _wake(self) -> None:
        if not self.extras.resting:
            super()._wake()

    def _begin(self) -> None:
        if self.extras.resting:
            self._timer = None
        else:
            super()._begin()

    def _finish(self) -> None:
        if self.extras.resting:
            self._timer = None
        else:
            super()._finish()
