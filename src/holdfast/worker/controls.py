"""Control routes of a worker's status server: tests on demand, and what its engine can do beside generating.

A route is there when the engine has the ability. Each goes by the names that vLLM, SGLang and Dynamo have for it, and
takes and gives their JSON. Must never do the work itself: `adapters` and `rest` do.
"""

from __future__ import annotations

import asyncio
import urllib.parse
from collections.abc import Iterable
from typing import Annotated, Any, TypeVar

import msgspec
from xxhash import xxh3_64_intdigest

from holdfast.base.errors import Conflict, EngineFailed, InvalidRequest, UnsupportedFeature
from holdfast.engines.abilities import Clearable, Pausable, PauseMode, Sleepable
from holdfast.engines.contract import Engine
from holdfast.health.control import ControlRoute, ControlRoutes
from holdfast.worker.adapters import Adapters
from holdfast.worker.endpoints import Controllable
from holdfast.worker.rest import PATIENCE, Rest
from holdfast.worker.vitals import Vitals

LORAS = "/v1/loras"
LONGEST_WAIT = 600.0
"""Seconds that streams may be waited for at most, so that the answer still finds its caller."""
_ID_BITS = 0x7FFF_FFFF
Arguments = dict[str, Any]
ArgumentsT = TypeVar("ArgumentsT", bound=msgspec.Struct)


class Source(msgspec.Struct, frozen=True):
    """Where an adapter is, in Dynamo's words."""

    uri: str


class LoadAdapter(msgspec.Struct, frozen=True):
    """vLLM names a path, Dynamo a source."""

    lora_name: str
    lora_path: str = ""
    source: Source | None = None

    @property
    def path(self) -> str:
        """Directory, or name in the Hugging Face cache. Raises UnsupportedFeature for what must be downloaded."""
        if self.source is None:
            return self.lora_path
        scheme, separator, rest = self.source.uri.partition("://")
        if not separator:
            return self.source.uri
        if scheme not in ("file", "hf"):
            raise UnsupportedFeature(
                f"Workers download nothing, so that {scheme}:// can't be used; copy the adapter to the worker's "
                "machine and name it by file://.",
                param="source.uri",
            )
        return urllib.parse.unquote(rest)


class UnloadAdapter(msgspec.Struct, frozen=True):
    """Names one."""

    lora_name: str


class Pause(msgspec.Struct, frozen=True):
    """How to come to rest."""

    mode: PauseMode = "abort"
    timeout: Annotated[float, msgspec.Meta(ge=0, le=LONGEST_WAIT)] = PATIENCE
    """Seconds; for ``wait``."""


class Sleep(Pause, frozen=True):
    """How deep to sleep."""

    level: int = 1


def add_controls(
    routes: ControlRoutes, engine: Engine, vitals: Vitals, rest: Rest, adapters: Adapters | None, *, commands: bool
) -> None:
    """Offer what the engine can do.

    Args:
        routes: of the status server.
        engine: started.
        vitals: of its worker.
        rest: pauses and wakes.
        adapters: None: the engine takes none.
        commands: whether it may be told to misbehave.
    """
    tests = _Tests(engine, vitals)
    routes.add("canary", tests.canary)
    routes.add("check", tests.check)
    if commands and isinstance(engine, Controllable):
        routes.add("control", tests.command)
    _Resting(engine, rest).add(routes)
    if isinstance(engine, Clearable):
        _under(routes, ("clear_cache", "reset_prefix_cache", "flush_cache", "clear_kv_blocks"), _Clearing(engine).clear)
    if adapters is not None:
        _Loras(adapters).add(routes)


def lora_id(name: str) -> int:
    """Return a number for an adapter's name, from 1 to 2³¹-1, the same on all workers; no engine knows it."""
    return xxh3_64_intdigest(name.encode()) & _ID_BITS or 1


class _Tests:
    def __init__(self, engine: Engine, vitals: Vitals):
        self._engine, self._vitals = engine, vitals

    async def canary(self, _: Arguments) -> Arguments:
        """Send a canary now, idle or not; its result counts."""
        vitals = self._vitals
        if vitals.resting:
            raise Conflict(f"No canary is sent: {vitals.resting}.")
        result = await vitals.canary.once()
        return {"result": result.kind, "why": result.why, "tokens": result.tokens, "state": vitals.state}

    async def check(self, _: Arguments) -> Arguments:
        """Ask the engine's own check; says so when it fails, and leaves the consequences to the watch."""
        try:
            async with asyncio.timeout(self._vitals.check_timeout):
                await self._engine.check()
        except EngineFailed as error:
            return {"ok": False, "why": error.message}
        except TimeoutError:
            return {"ok": False, "why": "no answer in time"}
        return {"ok": True}

    async def command(self, command: Arguments) -> Arguments:
        """Pass a command to the engine."""
        if not isinstance(self._engine, Controllable):
            raise UnsupportedFeature("This engine takes no commands.")
        return self._engine.control(command)


class _Resting:
    def __init__(self, engine: Engine, rest: Rest):
        self._engine, self._rest = engine, rest

    def add(self, routes: ControlRoutes) -> None:
        if isinstance(self._engine, Pausable):
            _under(routes, ("pause_generation", "pause"), self._pause)
            _under(routes, ("resume_generation", "resume", "continue_generation"), self._resume)
            routes.add("is_paused", self._is_paused, reads=True)
        if isinstance(self._engine, Sleepable):
            _under(routes, ("sleep", "release_memory_occupation"), self._sleep)
            _under(routes, ("wake_up", "resume_memory_occupation"), self._wake_up)
            routes.add("is_sleeping", self._is_sleeping, reads=True)

    async def _pause(self, arguments: Arguments) -> Arguments:
        how = _read(arguments, Pause)
        assert isinstance(self._engine, Pausable)
        moved = await self._rest.pause(self._engine, how.mode, how.timeout)
        return {"status": "ok", "message": f"Generation is paused (mode {how.mode}).", "streams_moved": moved}

    async def _resume(self, _: Arguments) -> Arguments:
        assert isinstance(self._engine, Pausable)
        await self._rest.resume(self._engine)
        return {"status": "ok", "message": "Generation goes on."}

    async def _sleep(self, arguments: Arguments) -> Arguments:
        how = _read(arguments, Sleep)
        assert isinstance(self._engine, Sleepable)
        moved = await self._rest.sleep(self._engine, how.level, how.mode, how.timeout)
        return {"status": "ok", "message": f"The engine sleeps (level {how.level}).", "streams_moved": moved}

    async def _wake_up(self, _: Arguments) -> Arguments:
        assert isinstance(self._engine, Sleepable)
        await self._rest.wake_up(self._engine)
        return {"status": "ok", "message": "The engine is awake."}

    async def _is_paused(self, _: Arguments) -> Arguments:
        return {"is_paused": "pause" in self._rest.kinds}

    async def _is_sleeping(self, _: Arguments) -> Arguments:
        return {"is_sleeping": "sleep" in self._rest.kinds}


class _Clearing:
    def __init__(self, engine: Clearable):
        self._engine = engine

    async def clear(self, _: Arguments) -> Arguments:
        await self._engine.clear_cache()
        return {"status": "success", "message": "Cached prefixes that nobody uses are forgotten."}


class _Loras:
    def __init__(self, adapters: Adapters):
        self._adapters = adapters

    def add(self, routes: ControlRoutes) -> None:
        _under(routes, ("load_lora_adapter", "load_lora"), self._load)
        _under(routes, ("unload_lora_adapter", "unload_lora"), self._unload)
        for name in ("list_lora_adapters", "list_loras"):
            routes.add(name, self._list, reads=True)
        routes.mount(LORAS, {"GET": self._list, "POST": self._load, "DELETE": self._unload}, item="lora_name")

    async def _load(self, arguments: Arguments) -> Arguments:
        wanted = _read(arguments, LoadAdapter)
        await self._adapters.load(wanted.lora_name, wanted.path)
        return _said(wanted.lora_name, "loaded")

    async def _unload(self, arguments: Arguments) -> Arguments:
        name = _read(arguments, UnloadAdapter).lora_name
        moved = await self._adapters.unload(name)
        return {**_said(name, "unloaded"), "streams_moved": moved}

    async def _list(self, _: Arguments) -> Arguments:
        loaded = self._adapters.listing()
        return {
            "status": "success",
            "loras": {adapter.name: lora_id(adapter.name) for adapter in loaded},
            "adapters": [
                {"lora_name": one.name, "lora_id": lora_id(one.name), "lora_path": one.path} for one in loaded
            ],
            "count": len(loaded),
        }


def _said(name: str, what: str) -> Arguments:
    message = f"LoRA adapter '{name}' {what} successfully."
    return {"status": "success", "message": message, "lora_name": name, "lora_id": lora_id(name)}


def _under(routes: ControlRoutes, names: Iterable[str], route: ControlRoute) -> None:
    for name in names:
        routes.add(name, route)


def _read(arguments: Arguments, form: type[ArgumentsT]) -> ArgumentsT:
    try:
        return msgspec.convert(arguments, form)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"The body does not fit: {error}.") from error
