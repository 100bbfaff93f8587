"""LoRA adapters of TensorRT-LLM: it loads one with the first request that names it, by number, name and directory.

Must never give a number twice: the engine's caches know adapters by it.
"""

from __future__ import annotations

import itertools
from typing import Any

from holdfast.base.errors import Conflict, ModelNotFound, NotFound, UnsupportedFeature
from holdfast.engines.abilities import Adapter
from holdfast.engines.trtllm.api import Api
from holdfast.engines.trtllm.config import TrtllmConfig
from holdfast.models.adapter import read_adapter
from holdfast.models.files import locate


class Adapters:
    """Part of `engine.TrtllmEngine` (an `abilities.Adaptable`)."""

    api: Api
    config: TrtllmConfig
    hidden_size: int

    def __init__(self, **more: Any):
        super().__init__(**more)
        self._loaded: dict[str, Any] = {}
        self._numbers = itertools.count(1)

    def adapters(self) -> tuple[Adapter, ...]:
        """Return those that requests may name."""
        return tuple(Adapter(name, one.lora_path) for name, one in self._loaded.items())

    async def load_adapter(self, adapter: Adapter) -> None:
        """Make one usable; see `abilities.Adaptable`."""
        if not self.config.enable_lora:
            raise UnsupportedFeature("This engine was started without adapters; set DYN_TRTLLM_ENABLE_LORA.")
        if adapter.name in self._loaded:
            raise Conflict(f"An adapter {adapter.name!r} is loaded already; unload it first.", param="name")
        path = locate(adapter.path, what="adapter")
        read_adapter(path, hidden_size=self.hidden_size)
        self._loaded[adapter.name] = self.api.LoRARequest(
            lora_name=adapter.name, lora_int_id=next(self._numbers), lora_path=str(path)
        )

    async def unload_adapter(self, name: str) -> None:
        """Take no more requests for one; the engine itself drops its weights when it needs the room."""
        if self._loaded.pop(name, None) is None:
            raise NotFound(f"No adapter {name!r} is loaded.", param="name")

    def adapter_request(self, name: str | None) -> Any:
        """Return the ``LoRARequest`` for a name; None for the base model. Raises ModelNotFound."""
        if name is None:
            return None
        try:
            return self._loaded[name]
        except KeyError:
            raise ModelNotFound(f"The adapter {name!r} is not loaded here.", param="model") from None
