"""What passes between a prefill worker and a decode worker beside the KV blocks themselves.

There are two styles. ``after_prefill`` (vLLM with NIXL, TensorRT-LLM, the mock engine): the prefill leg ends with a
handle, and the decode leg starts with it. ``rendezvous`` (SGLang): both legs get the same handle, drawn by whoever
routes, the prefill leg as soon as the decode worker has accepted, and meet by themselves. Either way the decode leg
delivers every token, the first one included: the token that a prefill leg makes on its way is nobody's.

A handle says for which tokens it stands, so that a decode worker never continues from somebody else's blocks or from
half of them. Must never know an engine or a connection.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from xxhash import xxh3_64_intdigest

from holdfast.base.errors import HandoffMismatch

Role = Literal["aggregated", "prefill", "decode"]
"""What a worker does: the whole of a request, its prompt only, or the rest (and, when it has to, the whole)."""
HandoffPhase = Literal["after_prefill", "rendezvous"]
CancelUntil = Literal["anytime", "pre_handoff", "never"]
"""Until when an engine's decode leg can be cancelled without harm: at any time; until its blocks are on their way
(afterwards the cancel takes effect with the first token); or not at all (it runs to its end, unheard)."""


class KvHandoff(msgspec.Struct, frozen=True, omit_defaults=True):
    """The KV blocks of one sequence, as one worker offers them to another."""

    protocol: str
    """Who understands ``params``: ``nixl``, ``sglang``, ``trtllm``, ``mock`` …"""
    phase: HandoffPhase
    tokens: int
    """Length of the sequence (prompt and generated ids) whose blocks these are."""
    digest: int
    """`digest_of` its ids."""
    source: str = ""
    """Instance id of the prefill worker."""
    fingerprint: str = ""
    """Of the engine that computed them."""
    params: dict[str, Any] = {}
    """The engine's own words; in the style ``rendezvous`` ``bootstrap_host``, ``bootstrap_port``, ``bootstrap_room``
    and ``prefill_rank``, drawn by whoever routes."""


def digest_of(prompt_ids: bytes, generated_ids: bytes = b"") -> int:
    """Return XXH3-64 over the little-endian u32 ids of prompt and generated tokens, in this order."""
    return xxh3_64_intdigest(prompt_ids + generated_ids)


def verify(handoff: KvHandoff, prompt_ids: bytes, generated_ids: bytes, *, protocol: str) -> None:
    """Check a handle before anything is generated from it.

    Args:
        handoff: as it came.
        prompt_ids: of the request, little-endian u32.
        generated_ids: of the request, little-endian u32.
        protocol: what this engine understands.

    Raises:
        HandoffMismatch: another protocol, another length or other tokens.
    """
    if handoff.protocol != protocol:
        raise HandoffMismatch(
            f"The KV hand-off speaks {handoff.protocol!r} and this engine {protocol or 'none'!r}: prefill and decode "
            "workers of one model need the same engine and transfer backend."
        )
    length = (len(prompt_ids) + len(generated_ids)) // 4
    if handoff.tokens != length or handoff.digest != digest_of(prompt_ids, generated_ids):
        raise HandoffMismatch(
            f"The KV hand-off of worker {handoff.source or '?'} stands for other tokens ({handoff.tokens}) than the "
            f"request ({length}); nothing was generated from it."
        )
