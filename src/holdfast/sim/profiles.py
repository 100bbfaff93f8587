"""What kind of trouble a universe is about: its profile, and the kinds of fault that each draws from.

A name that stands several times is drawn as often. Must never draw.
"""

from __future__ import annotations

from typing import Literal

Profile = Literal[
    "mixed", "discovery", "engines", "network", "rollout", "overload", "exodus", "blind", "bulk", "caches"
]
PROFILES: tuple[Profile, ...] = (
    "mixed", "mixed", "mixed", "mixed", "engines", "network", "rollout", "discovery", "overload", "exodus", "blind",
    "bulk", "caches",
)  # fmt: skip
KINDS: dict[Profile, tuple[str, ...]] = {
    "mixed": (
        "crash", "crash", "freeze", "freeze", "terminate", "reset", "partition", "power-loss", "engine-hang",
        "engine-error", "discovery-outage", "slow", "delay", "out-of-memory", "engine-abort", "wall-jump",
        "discovery-stale", "engine-miscount", "killer-prompt",
    ),
    "engines": (
        "engine-error", "engine-abort", "engine-refuse", "engine-hang", "engine-slow", "engine-compile",
        "engine-miscount", "out-of-memory",
    ),
    "network": ("reset", "partition", "delay", "partition", "crash"),
    "rollout": ("rolling-restart", "rolling-restart", "rolling-restart", "terminate", "crash", "engine-error"),
    "exodus": ("terminate", "terminate", "terminate", "crash"),
    "caches": (
        "kv-lost", "kv-repeated", "kv-reordered", "kv-lost", "crash", "terminate", "reset", "freeze", "partition",
        "engine-hang", "out-of-memory", "slow", "rolling-restart",
    ),
    "discovery": ("discovery-outage", "discovery-stale", "discovery-partial"),
    "bulk": (
        "crash", "freeze", "terminate", "reset", "partition", "delay", "slow", "engine-hang", "engine-error",
        "engine-miscount", "out-of-memory",
    ),
    "blind": (
        "discovery-stale", "discovery-stale", "discovery-partial", "discovery-outage", "crash", "crash", "terminate",
        "reset", "rolling-restart",
    ),
    "overload": ("overload", "overload", "crash", "freeze", "engine-refuse", "terminate", "killer-prompt"),
}  # fmt: skip
