"""What one look at the installation found. Must never look by itself."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

Level = Literal["ok", "note", "warning", "problem"]
"""``note``: a fact that is neither good nor bad; ``warning``: works, with less than it could; ``problem``: will not."""
LEVELS: tuple[Level, ...] = ("ok", "note", "warning", "problem")


class Finding(msgspec.Struct, frozen=True, omit_defaults=True):
    """One fact with what to do about it."""

    area: str
    """``engines``, ``gpu``, ``model``, ``memory``, ``ports``, ``limits`` …"""
    level: Level
    what: str
    """Measured value and limit, to what."""
    fix: str = ""
    """What to do; never empty for a problem."""
    facts: dict[str, Any] = {}
    """The same for machines."""


def worst(findings: list[Finding]) -> Level:
    """Return the worst level; ``ok`` of nothing."""
    return max((finding.level for finding in findings), key=LEVELS.index, default="ok")
