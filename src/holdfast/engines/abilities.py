"""What only some engines can do beside generating. An engine has an ability when it has its methods.

The worker offers what is there as control routes (``/engine/…``) and says in the model card what callers need to know.
Must never hold behaviour.
"""

from __future__ import annotations

from typing import Literal, Protocol, runtime_checkable

import msgspec

PauseMode = Literal["keep", "wait", "abort"]
"""What becomes of the sequences that run: kept where they are, finished first, or ended as ``abort`` (they migrate)."""


class Adapter(msgspec.Struct, frozen=True, omit_defaults=True):
    """A LoRA adapter that an engine has loaded; it is served as a model of its own."""

    name: str
    path: str = ""
    """Directory with its weights, on the worker's machine."""


@runtime_checkable
class Adaptable(Protocol):
    """Adapters come and go while it runs; a request names one in ``GenerateRequest.lora``."""

    def adapters(self) -> tuple[Adapter, ...]:
        """Return those that are loaded."""

    async def load_adapter(self, adapter: Adapter) -> None:
        """Make one usable. Raises InvalidRequest (no such files, wrong shape) or Conflict (the name is taken)."""

    async def unload_adapter(self, name: str) -> None:
        """Forget one. Raises NotFound."""


@runtime_checkable
class Pausable(Protocol):
    """Generation can be halted, to change weights for instance."""

    async def pause_generation(self, mode: PauseMode = "keep") -> None:
        """Generate nothing until `resume_generation`."""

    async def resume_generation(self) -> None:
        """Go on; harmless when it was not paused."""


@runtime_checkable
class Sleepable(Protocol):
    """Memory can be given back for a while. Nothing may be in flight."""

    async def sleep(self, level: int = 1) -> None:
        """Give memory back: 1 the KV cache (weights kept aside), 2 the weights too. Raises UnsupportedFeature."""

    async def wake_up(self) -> None:
        """Take it again."""


@runtime_checkable
class Clearable(Protocol):
    """The prefix cache can be emptied."""

    async def clear_cache(self) -> None:
        """Forget all cached prefixes that nobody uses."""
