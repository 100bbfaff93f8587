"""Whether a prefill worker and a decode worker of one model can work together, by what their cards say.

Block size, tokenizer and all else in `card.AGREED_FIELDS` is compared before, between all workers of a name. Must never
look at load or health.
"""

from __future__ import annotations

from holdfast.models.card import ModelCard

PAIRED_FIELDS = ("engine", "handoff", "handoff_phase")
"""What must be the same on both sides: who computes, in which protocol blocks pass, and when."""


def mismatch(prefill: ModelCard, decode: ModelCard) -> str | None:
    """Return the first field that keeps a prefill worker from handing over to a decode worker, or None."""
    for field in PAIRED_FIELDS:
        if getattr(prefill, field) != getattr(decode, field):
            return field
    return None if prefill.handoff else "handoff"


def explain(field: str, prefill: ModelCard, decode: ModelCard, decode_worker: str) -> str:
    """Return, for people, why that field keeps the pair apart and what to do."""
    mine, theirs = getattr(prefill, field) or "none", getattr(decode, field) or "none"
    return (
        f"gets no prompts of model {prefill.name!r}: its {field} ({mine}) is not that of decode worker {decode_worker} "
        f"({theirs}), nor of any other; start both with the same engine and KV transfer backend"
    )
