"""What of the reference's router is accepted by name and does nothing here, told to whoever sets it.

A deployment that moves over keeps its flags and variables; what they would have changed must not be lost in silence.
Must never change what a setting does.
"""

from __future__ import annotations

from holdfast.routing.router_config import RouterSettings

_NO_SHARED_CACHE = (
    "{name} is set to {value} and has no effect: there is no cache here that all workers share, so no block earns "
    "credit for lying in one. Blocks in a worker's own host memory and on its disk do: "
    "DYN_ROUTER_HOST_CACHE_HIT_WEIGHT, DYN_ROUTER_DISK_CACHE_HIT_WEIGHT."
)


def without_effect(settings: RouterSettings) -> list[str]:
    """Return a sentence for each setting that somebody has set and that does nothing here."""
    said = (
        (settings.shared_cache_multiplier, _NO_SHARED_CACHE, "DYN_SHARED_CACHE_MULTIPLIER"),
        (settings.shared_cache_type.removeprefix("none"), _NO_SHARED_CACHE, "DYN_SHARED_CACHE_TYPE"),
    )
    return [sentence.format(name=name, value=value) for value, sentence, name in said if value]
