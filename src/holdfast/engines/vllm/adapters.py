"""LoRA adapters of a vLLM engine: loaded and unloaded while it runs, named by requests.

Must never load an adapter whose files were not looked at: vLLM's own errors come from a process far away.
"""

from __future__ import annotations

from typing import Any

from holdfast.base.errors import Conflict, EngineFailed, InvalidRequest, NotFound, UnsupportedFeature
from holdfast.engines.abilities import Adapter
from holdfast.models.adapter import read_adapter
from holdfast.models.files import locate


class Adapters:
    """Part of `engine.VllmEngine` (an `abilities.Adaptable`)."""

    llm: Any
    _next_id = 1

    @property
    def loaded(self) -> dict[str, Any]:
        """vLLM's ``LoRARequest`` by name."""
        known: dict[str, Any] = self.__dict__.setdefault("_loaded", {})
        return known

    def adapters(self) -> tuple[Adapter, ...]:
        """Return those that are loaded."""
        return tuple(Adapter(name, one.lora_path) for name, one in self.loaded.items())

    async def load_adapter(self, adapter: Adapter) -> None:
        """Make one usable; see `abilities.Adaptable`."""
        settings = self.llm.vllm_config.lora_config
        if settings is None:
            raise UnsupportedFeature("This vLLM was started without adapters; add --enable-lora.")
        if adapter.name in self.loaded:
            raise Conflict(f"An adapter {adapter.name!r} is loaded already; unload it first.", param="name")
        path = locate(adapter.path, what="adapter")
        hidden = self.llm.model_config.get_hidden_size()
        read_adapter(path, hidden_size=hidden, max_rank=settings.max_lora_rank)
        from vllm.lora.request import LoRARequest  # noqa: PLC0415

        request = LoRARequest(adapter.name, self._next_id, str(path))
        self._next_id += 1  # never used again: vLLM's prefix cache knows adapters by name and number
        try:
            done = await self.llm.add_lora(request)
        except Exception as error:
            raise InvalidRequest(f"vLLM refuses the adapter {path}: {error}", param="path") from error
        if not done:
            raise InvalidRequest(f"vLLM did not load the adapter {path}.", param="path")
        self.loaded[adapter.name] = request

    async def unload_adapter(self, name: str) -> None:
        """Forget one; see `abilities.Adaptable`."""
        request = self.loaded.pop(name, None)
        if request is None:
            raise NotFound(f"No adapter {name!r} is loaded.", param="name")
        if not await self.llm.remove_lora(request.lora_int_id):
            raise EngineFailed(f"vLLM did not unload the adapter {name!r}.")
