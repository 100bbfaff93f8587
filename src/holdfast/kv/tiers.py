"""Where a worker keeps a block: on the device, in host memory, on disk.

Must never hold state.
"""

from __future__ import annotations

from enum import IntEnum


class Tier(IntEnum):
    """Storage tiers of one worker, nearest first."""

    DEVICE = 0
    HOST = 1
    DISK = 2


_MEDIUMS = {
    "GPU": Tier.DEVICE,
    "CPU": Tier.HOST,
    "CPU_PINNED": Tier.HOST,
    "CPU_TIER1": Tier.HOST,
    "DISK": Tier.DISK,
    "NVME": Tier.DISK,
    "CPU_TIER2": Tier.DISK,
}


def tier_of(medium: str) -> Tier | None:
    """Return the tier that an engine's ``medium`` stands for.

    None for what belongs to no single worker (``EXTERNAL``) and for names not known here: such blocks are not indexed.
    """
    return _MEDIUMS.get(medium.upper())
