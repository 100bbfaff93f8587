"""What can be done to a running SGLang beside generating: adapters, pause, sleep, forgetting (`engines.abilities`).

Must never change what is generated.
"""

from __future__ import annotations

import asyncio
from typing import Any

from holdfast.base.errors import Conflict, EngineFailed, InvalidRequest, NotFound, UnsupportedFeature
from holdfast.engines.abilities import Adapter, PauseMode
from holdfast.engines.attempt import Attempt
from holdfast.models.adapter import read_adapter
from holdfast.models.files import locate

_WAIT_POLL = 0.02
_KV_CACHE, _WEIGHTS = "kv_cache", "weights"
"""SGLang's names for what can be released."""


class Abilities:
    """Part of `engine.SglangEngine`."""

    manager: Any
    server_args: Any
    hidden_size: int
    attempts: tuple[Attempt, ...]
    _asleep: tuple[str, ...] = ()

    # adapters

    @property
    def loaded(self) -> dict[str, str]:
        """Directories of the adapters, by name."""
        known: dict[str, str] = self.__dict__.setdefault("_loaded", {})
        return known

    def adapters(self) -> tuple[Adapter, ...]:
        """Return those that are loaded."""
        return tuple(Adapter(name, path) for name, path in self.loaded.items())

    async def load_adapter(self, adapter: Adapter) -> None:
        """Make one usable; see `abilities.Adaptable`."""
        if not self.server_args.enable_lora:
            raise UnsupportedFeature(
                "This SGLang was started without adapters; add --enable-lora --max-lora-rank 64 --lora-target-modules "
                "all, or what fits yours."
            )
        if adapter.name in self.loaded:
            raise Conflict(f"An adapter {adapter.name!r} is loaded already; unload it first.", param="name")
        path = locate(adapter.path, what="adapter")
        read_adapter(path, hidden_size=self.hidden_size, max_rank=self.server_args.max_lora_rank or 0)
        from sglang.srt.managers.io_struct import LoadLoRAAdapterReqInput  # noqa: PLC0415

        done = await self.manager.load_lora_adapter(
            LoadLoRAAdapterReqInput(lora_name=adapter.name, lora_path=str(path), pinned=False)
        )
        if not done.success:
            raise InvalidRequest(f"SGLang refuses the adapter {path}: {done.error_message}", param="path")
        self.loaded[adapter.name] = str(path)

    async def unload_adapter(self, name: str) -> None:
        """Forget one; SGLang waits for those that use it. See `abilities.Adaptable`."""
        if name not in self.loaded:
            raise NotFound(f"No adapter {name!r} is loaded.", param="name")
        from sglang.srt.managers.io_struct import UnloadLoRAAdapterReqInput  # noqa: PLC0415

        done = await self.manager.unload_lora_adapter(UnloadLoRAAdapterReqInput(lora_name=name))
        if not done.success:
            raise EngineFailed(f"SGLang did not unload the adapter {name!r}: {done.error_message}")
        del self.loaded[name]

    # pause

    async def pause_generation(self, mode: PauseMode = "keep") -> None:
        """Generate nothing until `resume_generation`; see `abilities.Pausable`."""
        from sglang.srt.managers.io_struct import PauseGenerationReqInput  # noqa: PLC0415

        if mode == "wait":
            while self.attempts:  # noqa: ASYNC110  they end in many ways and tell nobody; who asks has a deadline
                await asyncio.sleep(_WAIT_POLL)
        how = "abort" if mode == "abort" else "in_place"
        await self.manager.pause_generation(PauseGenerationReqInput(mode=how))

    async def resume_generation(self) -> None:
        """Go on."""
        from sglang.srt.managers.io_struct import ContinueGenerationReqInput  # noqa: PLC0415

        await self.manager.continue_generation(ContinueGenerationReqInput())

    # memory

    async def sleep(self, level: int = 1) -> None:
        """Give memory back: 1 the KV cache, 2 the weights too; see `abilities.Sleepable`."""
        if not self.server_args.enable_memory_saver:
            raise UnsupportedFeature("This SGLang keeps its memory; start it with --enable-memory-saver (GPUs only).")
        if self.attempts:  # its scheduler would end with an assertion
            raise Conflict(f"{len(self.attempts)} sequences are in flight; drain this worker first.")
        from sglang.srt.managers.io_struct import ReleaseMemoryOccupationReqInput  # noqa: PLC0415

        tags = (_KV_CACHE,) if level == 1 else (_KV_CACHE, _WEIGHTS)
        await self.manager.release_memory_occupation(ReleaseMemoryOccupationReqInput(tags=list(tags)))
        self._asleep = tags

    async def wake_up(self) -> None:
        """Take the memory again."""
        tags, self._asleep = self._asleep, ()
        if not tags:
            return
        from sglang.srt.managers.io_struct import ResumeMemoryOccupationReqInput  # noqa: PLC0415

        await self.manager.resume_memory_occupation(ResumeMemoryOccupationReqInput(tags=list(tags)))

    async def clear_cache(self) -> None:
        """Forget the cached prefixes."""
        done = await self.manager.flush_cache()
        if not done.success:
            raise EngineFailed(
                f"SGLang did not clear its cache ({done.message or 'sequences are in flight'}); drain or pause this "
                "worker first."
            )
