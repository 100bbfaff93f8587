"""The adapters of this worker: checked, loaded into the engine, offered as models of their own; and back.

An adapter is offered after the engine has it, and the engine forgets it after nobody uses it any more: callers hear
first that it leaves, its streams have a while to finish, and what is left moves to workers that have it.

Must never know an engine's own ways, nor a route.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable

from holdfast.base.errors import Conflict, HoldfastError, InvalidRequest, NotFound
from holdfast.engines.abilities import Adaptable, Adapter
from holdfast.models.adapter import content_hash, read_adapter
from holdfast.models.card import ModelCard
from holdfast.models.files import locate
from holdfast.worker.card import adapter_card
from holdfast.worker.host import EngineHost
from holdfast.worker.lora_config import LoraConfig
from holdfast.worker.registration import Registration

log = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9][\w.:/@+-]{0,127}")
_POLL = 0.02
HEARD_SECONDS = 0.5
"""After callers were told that an adapter leaves, those that had not heard yet are still served for so long."""


class Adapters:
    """See the module.

    Args:
        engine: started.
        host: hosts it.
        base: card of the model that adapters change.
        config: which to have from the start, and how long streams may take to leave.
    """

    def __init__(self, engine: Adaptable, host: EngineHost, base: ModelCard, config: LoraConfig):
        self._engine, self._host, self._base, self._config = engine, host, base, config
        self._cards: dict[str, ModelCard] = {}
        self._busy: set[str] = set()
        """Names that are being loaded or unloaded."""
        self._lock = asyncio.Lock()
        """Of the engine and of the record: one change at a time."""
        self._registration: Registration | None = None
        """None until callers know this worker."""

    @property
    def cards(self) -> tuple[ModelCard, ...]:
        """What this worker offers, the base model first."""
        return (self._base, *self._cards.values())

    def listing(self) -> tuple[Adapter, ...]:
        """Return those that are offered, in the order in which they came."""
        paths = {adapter.name: adapter.path for adapter in self._engine.adapters()}
        return tuple(Adapter(name, paths.get(name, "")) for name in self._cards)

    async def begin(self) -> None:
        """Load those that the settings name, and offer what the engine has by itself.

        Raises:
            HoldfastError: one of them can't be loaded; the worker must not start without it.
        """
        for adapter in self._engine.adapters():
            await self._offer(adapter.name, await self._digest(adapter.path))
        for name, path in self._config.modules:
            if name not in self._cards:
                await self.load(name, path)

    async def publish_with(self, registration: Registration) -> None:
        """Callers know this worker now: let them hear of what comes and goes, and of what came meanwhile."""
        async with self._lock:
            self._registration = registration
            if registration.record.cards != self.cards:
                await registration.offer(self.cards)

    async def load(self, name: str, path: str) -> None:
        """Make an adapter usable and let callers know.

        Args:
            name: under which it is served.
            path: its directory on this machine, or a name in the Hugging Face cache; empty when the engine needs none.

        Raises:
            InvalidRequest: an impossible name, or files that are not those of a fitting adapter.
            Conflict: the name is taken.
            HoldfastError: the engine did not take it, or callers could not be told; it is not loaded then.
        """
        self._check_name(name)
        self._busy.add(name)
        try:
            found = await asyncio.to_thread(_checked, path) if path else ""
            digest = await self._digest(found)
            async with self._lock:
                await self._engine.load_adapter(Adapter(name, found))
                try:
                    await self._offer(name, digest)
                except HoldfastError:
                    await self._engine.unload_adapter(name)
                    raise
        finally:
            self._busy.discard(name)
        log.info("adapter %s of model %s is loaded (%s)", name, self._base.name, found or "no files")

    async def unload(self, name: str) -> int:
        """Let go of an adapter, its streams first; returns how many of them had to move elsewhere.

        Raises:
            NotFound: it is not here.
            Conflict: it is being loaded or unloaded already.
            HoldfastError: callers could not be told, and nothing has happened; or the engine kept it, unused.
        """
        if name in self._busy:
            raise Conflict(f"The adapter {name!r} is being loaded or unloaded already.", param="lora_name")
        if name not in self._cards:
            known = ", ".join(self._cards) or "none"
            raise NotFound(f"No adapter {name!r} is loaded here; there are: {known}.", param="lora_name")
        self._busy.add(name)
        try:
            moved = await self._withdraw(name)
            async with self._lock:
                await self._engine.unload_adapter(name)
        finally:
            self._busy.discard(name)
        log.info("adapter %s is unloaded; %d of its streams moved", name, moved)
        return moved

    async def _offer(self, name: str, digest: str) -> None:
        """Say that it is here; the engine has it. Raises as `Registration.offer`, and nothing is offered then."""
        self._cards[name] = adapter_card(self._base, name, digest)
        self._host.offer.add(name)
        if self._registration is not None:
            try:
                await self._registration.offer(self.cards)
            except HoldfastError:
                del self._cards[name]
                self._host.offer.remove(name)
                raise

    async def _withdraw(self, name: str) -> int:
        async with self._lock:
            card = self._cards.pop(name)
            try:
                if self._registration is not None:
                    await self._registration.offer(self.cards)
            except HoldfastError:
                self._cards[name] = card
                raise
        if self._registration is not None:
            await asyncio.sleep(HEARD_SECONDS)
        self._host.offer.remove(name)
        await _until(lambda: not self._host.streams_of(name), self._config.lora_unload_timeout)
        why = (
            f"The adapter {name!r} is being unloaded; its streams had {self._config.lora_unload_timeout:g} s to finish."
        )
        return self._host.send_adapter_elsewhere(name, why)

    async def _digest(self, path: str) -> str:
        return await asyncio.to_thread(content_hash, locate(path, what="adapter")) if path else ""

    def _check_name(self, name: str) -> None:
        if not _NAME.fullmatch(name):
            raise InvalidRequest(
                f"{name!r} is no name for a model: 1 to 128 letters, digits and . _ : / @ + - are.", param="lora_name"
            )
        if name == self._base.name or name in self._base.aliases:
            raise Conflict(f"{name!r} is the base model's own name.", param="lora_name")
        if name in self._busy or name in self._cards:
            raise Conflict(f"An adapter {name!r} is loaded here already; unload it first.", param="lora_name")


def _checked(path: str) -> str:
    """Return the adapter's directory. Raises InvalidRequest or UnsupportedFeature when it is no fit adapter."""
    return str(read_adapter(locate(path, what="adapter")).path)


async def _until(condition: Callable[[], bool], seconds: float) -> None:
    """Wait for a condition for so long at most."""
    loop = asyncio.get_running_loop()
    until = loop.time() + seconds
    while not condition() and loop.time() < until:  # noqa: ASYNC110  once per unloading; the host has no event for it
        await asyncio.sleep(_POLL)
