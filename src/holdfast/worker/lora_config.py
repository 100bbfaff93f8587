"""Settings of adapters. Must never hold behaviour."""

from __future__ import annotations

from typing import Annotated

import msgspec

from holdfast.base.settings import InvalidSetting, setting


class LoraConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Which adapters a worker serves from its start, and how they leave."""

    lora_modules: Annotated[
        tuple[str, ...],
        setting(
            "DYN_LORA_MODULES",
            "Adapters to serve from the start, as name=directory, separated by commas; /engine/load_lora_adapter loads "
            "more.",
        ),
    ] = ()
    """Those that are loaded at run time are gone after a restart; these are not."""
    lora_unload_timeout: Annotated[
        float,
        setting(
            "DYN_LORA_UNLOAD_TIMEOUT_SECS",
            "Streams of an adapter that is unloaded have so many seconds to finish here; then they move.",
            ge=0,
        ),
    ] = 30.0
    """Nothing new comes meanwhile."""

    @property
    def modules(self) -> tuple[tuple[str, str], ...]:
        """Names and directories. Raises InvalidSetting."""
        found = []
        for entry in self.lora_modules:
            name, equals, path = entry.partition("=")
            if not name.strip() or not equals:
                raise InvalidSetting(f"DYN_LORA_MODULES has the entry {entry!r}; expected name=directory.")
            found.append((name.strip(), path.strip()))
        return tuple(found)
