"""What can be done to a vLLM engine beside generating: pause, sleep, forget its cache (`engines.abilities`).

Must never change what is generated.
"""

from __future__ import annotations

from typing import Any

from holdfast.base.errors import Conflict, EngineFailed, UnsupportedFeature
from holdfast.engines.abilities import PauseMode
from holdfast.engines.attempt import Attempt


class Controls:
    """Part of `engine.VllmEngine`."""

    llm: Any
    attempts: tuple[Attempt, ...]
    _depth = 0
    """Level of the present sleep; 0: awake."""

    async def pause_generation(self, mode: PauseMode = "keep") -> None:
        """Generate nothing until `resume_generation`; what is cached stays."""
        await self.llm.pause_generation(mode=mode, clear_cache=False)

    async def resume_generation(self) -> None:
        """Go on."""
        await self.llm.resume_generation()

    async def sleep(self, level: int = 1) -> None:
        """Give memory back; see `abilities.Sleepable`."""
        if not self.llm.model_config.enable_sleep_mode:
            raise UnsupportedFeature("This vLLM was started without sleep mode; add --enable-sleep-mode (GPUs only).")
        if level > 1 and self.llm.vllm_config.lora_config is not None:
            raise UnsupportedFeature(
                "Sleep of level 2 forgets adapters, and vLLM does not load them again; use level 1."
            )
        if self.attempts:
            raise Conflict(f"{len(self.attempts)} sequences are in flight; drain this worker first.")
        await self.llm.sleep(level)
        self._depth = self._depth or level  # vLLM sleeps on as deep as it did when it is told again

    async def wake_up(self) -> None:
        """Take the memory again, and fill it: after level 2 vLLM has room for its weights, but not their values."""
        if self._depth > 1:
            await self.llm.wake_up(["weights"])
            await self.llm.collective_rpc("reload_weights")
            await self.llm.wake_up(["kv_cache"])
        else:
            await self.llm.wake_up()
        self._depth = 0

    async def clear_cache(self) -> None:
        """Forget the cached prefixes that nobody uses."""
        if not await self.llm.reset_prefix_cache():
            raise EngineFailed("vLLM did not clear its cache: blocks are in use; drain or pause this worker first.")
