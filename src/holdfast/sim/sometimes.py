"""What a campaign must have met at least once, or it has proved less than it seems: faults, moves, ends, rejections.

Names are those of `Outcome.counters`. Must never count anything itself.
"""

from __future__ import annotations

from collections.abc import Mapping

from holdfast.sim.faults import kinds

MOVES = (
    "migration before accept",
    "migration before first token",
    "migration mid-stream",
    "migration at the end",
    "join exact",
)
RARE = ("completed without the end",)
"""Once in some thousand universes: the connection breaks between the last token and the end that follows it."""
ENDS = ("ended done", "ended cancelled", "ended failed", "ended expired", "ended rejected")
REJECTIONS = (
    "DYN_ENGINE_REQUEST_LIMIT",
    "DYN_ADMISSION_QUEUE_LIMIT",
    "DYN_ADMISSION_QUEUE_TIMEOUT_SECS",
    "DYN_ACTIVE_DECODE_BLOCKS_THRESHOLD",
    "DYN_ACTIVE_PREFILL_TOKENS_THRESHOLD",
    "DYN_HTTP_MAX_REQUESTS",
    "DYN_MIGRATION_MAX_WAITING",
    "capacity_exhausted shutdown",
    "no_workers",
    "poison_request",
    "migration_exhausted",
    "shutting_down",
    "deadline_exceeded",
    "invalid_request",
    "context_length_exceeded",
    "model_not_found",
)
"""Parts of what clients were told: settings that name a limit, and codes."""
OTHERS = (
    "client-leaves",
    "client-slow",
    "client-stalls",
    "worker suspect",
    "worker ejected",
    "worker inhibited",
    "old protocol",
    "prompt crash",
    "prompt freeze",
    "rolled worker",
    "rolled frontend",
)


def missing(counters: Mapping[str, int], *, thorough: bool = False) -> list[str]:
    """Return what never happened, in the order of this page.

    Args:
        counters: summed over all universes.
        thorough: the campaign was long enough for `RARE` things too.
    """
    wanted = [f"{word} {kind}" for kind in kinds() for word in ("fault", "hit")]
    lacking = [
        name for name in (*wanted, *MOVES, *ENDS, *OTHERS, *(RARE if thorough else ())) if not counters.get(name)
    ]
    told = [name for name, number in counters.items() if number and name.startswith("told ")]
    return lacking + [f"told {part}" for part in REJECTIONS if not any(part in name for name in told)]
